"""The ASGI application: inference on a short path of its own, all else through FastAPI; keys and size limits for both."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from bitdial.errors import BitdialError
from bitdial.serving.errors import BadRequest, Gone, NotFound, ServingError, TooLarge, WrongMethod
from bitdial.serving.protocol.encoding import decode_body
from bitdial.serving.protocol.request import InferRequest
from bitdial.serving.protocol.response import VERSION, answer_parameters, error_body, infer_response_steps
from bitdial.serving.server.access import Access
from bitdial.serving.server.connection import connection_of
from bitdial.serving.server.model import ServedModel
from bitdial.serving.server.turns import Turns

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

SMALL_BODY = 1 << 16  # bytes that requests other than inference may send
LEAST_BODY = 1 << 20  # bytes of an inference request that are always taken
JSON_BODY = 1 << 22  # bytes of an inference request in JSON that are taken where nothing else is said
_JSON = (b"content-type", b"application/json")
_BINARY = (b"content-type", b"application/octet-stream")
_LINGER, _LINGER_BYTES = 1.0, 1 << 26
_MAX_BODY = "--max-body-mb"
_MAX_JSON = "--max-json-mb; tensors may follow the JSON in binary"

logger = logging.getLogger("bitdial.serving")


class Application:
    """models: by the name in the URL. api: the ASGI application of everything else. max_body: bytes of an inference request;
    None: as much as the largest request of any model needs as JSON text (known once the models are). max_json: bytes of JSON in
    it; None: 4 MiB, or what one sample needs."""

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        api: Any,
        access: Access | None = None,
        max_body: int | None = None,
        max_json: int | None = None,
    ) -> None:
        self.models, self.api, self.access = models, api, access or Access(None)
        self.max_body, self.max_json = max_body, max_json
        self._turns = Turns()

    def body_limit(self, model: ServedModel) -> int:
        """Bytes that a request to this model may have, before and after it is decompressed."""
        if self.max_body is not None:
            return self.max_body
        return max(LEAST_BODY, model.largest_body())

    def json_limit(self, model: ServedModel) -> int:
        """Bytes of JSON that a request to this model may have."""
        most = max(JSON_BODY, model.sample_body()) if self.max_json is None else self.max_json
        return min(most, self.body_limit(model))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await _lifespan(receive, send)
            return
        headers = dict(scope["headers"])
        path = without_slash(scope["path"])
        try:
            self.access.check(path, headers.get(b"authorization", b""), headers.get(b"x-api-key", b""))
            infers = path.endswith("/infer") and path.startswith("/v2/models/")
            if infers and scope["method"] == "POST":
                await self._infer(path, scope, headers, receive, send)
                return
            body = await read_body(headers, receive, SMALL_BODY)
            if infers:
                self._model(path)
                raise WrongMethod("this address does not know this method: send the request with POST", "POST")
            await self.api({**scope, "path": path}, _replay(body, receive), send)
        except Gone:
            pass
        except BitdialError as error:
            status = getattr(error, "status", 500)
            await send_error(send, status, str(error), error, receive)
        except Exception:
            logger.exception("a request failed unexpectedly")
            await send_error(send, 500, "the server failed unexpectedly; its log says how", None, receive)

    async def _infer(self, path: str, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send) -> None:
        model = self._model(path)
        limit, setting = self.body_limit(model), _MAX_BODY
        json = self.json_limit(model)
        if json < limit and b"inference-header-content-length" not in headers:
            limit, setting = json, _MAX_JSON
        body = await read_body(headers, receive, limit, setting)
        arrived = model.clock()
        connection = connection_of(scope)
        gone = False
        if connection is not None:
            task = asyncio.current_task()
            assert task is not None

            def leave() -> None:
                nonlocal gone
                gone = True
                task.cancel()

            connection.gone = leave
        try:
            try:
                request = await self._read(model, headers, body, limit, json)
            except ServingError:
                model.invalid()
                raise
            answer = await model.infer(
                request.inputs, request.samples,
                slo=request.slo, max_ratio=request.max_ratio, timeout=request.timeout, arrived=arrived,
            )  # fmt: skip
            content, header_length = await self._turns.run(infer_response_steps(
                model.name, model.output_names, answer.outputs, request.outputs, request.id,
                answer_parameters(answer.ratio, answer.queue, answer.compute, answer.batch, model.dilation),
            ))  # fmt: skip
        except asyncio.CancelledError:
            if gone:
                raise Gone("the client has left") from None
            raise
        finally:
            if connection is not None:
                connection.gone = None
        length = (b"content-length", b"%d" % len(content))
        if header_length is None:
            response: Headers = [_JSON, length]
        else:
            response = [_BINARY, length, (b"inference-header-content-length", b"%d" % header_length)]
        if model.closing:
            response.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": 200, "headers": response})
        await send({"type": "http.response.body", "body": content})

    async def _read(
        self, model: ServedModel, headers: dict[bytes, bytes], body: bytes, limit: int, json: int
    ) -> InferRequest:
        encoding = headers.get(b"content-encoding")
        if encoding is not None:  # zlib lets others run meanwhile
            body = await asyncio.to_thread(decode_body, body, encoding.decode("latin-1"), limit)
        length = _header_length(headers)
        if length is not None and json < length <= len(body):
            raise TooLarge(f"the JSON part of the body has {length} bytes, and this server takes {json} ({_MAX_JSON})")
        return await self._turns.run(model.reader().steps(body, length))

    def _model(self, path: str) -> ServedModel:
        """The model of /v2/models/{m}[/versions/1]/infer. Raises NotFound."""
        parts = path.split("/")
        if len(parts) == 7 and parts[4] == "versions":
            return find_model(self.models, parts[3], parts[5])
        if len(parts) != 5:
            raise NotFound("there is nothing at this address")
        return find_model(self.models, parts[3])


def without_slash(path: str) -> str:
    """The path as the server's addresses are written: one slash at its end makes no other address, whatever the method."""
    return path[:-1] if path.endswith("/") and len(path) > 1 else path


def find_model(models: Mapping[str, ServedModel], name: str, version: str = VERSION) -> ServedModel:
    """Raises NotFound."""
    model = models.get(name)
    if model is None:
        raise NotFound(f"there is no model '{name[:100]}' here; /v2/models lists them")
    if version != VERSION:
        raise NotFound(f"model '{name}' has no version '{version[:20]}': it has one, '{VERSION}'")
    return model


async def read_body(headers: Mapping[bytes, bytes], receive: Receive, limit: int, setting: str = _MAX_BODY) -> bytes:
    """The request's body. setting: what raises the limit. Raises TooLarge, before more than `limit` bytes are held, and Gone."""
    length = headers.get(b"content-length", b"0")
    if not length.isdigit() or len(length) > 18:
        raise BadRequest("Content-Length must be a whole number")
    if int(length) > limit:
        raise TooLarge(f"the body has {int(length)} bytes, and this server takes {limit} ({setting})")
    message = await receive()
    if message["type"] == "http.disconnect":
        raise Gone("the client has left")
    body: bytes = message.get("body", b"")
    if not message.get("more_body", False):
        if len(body) > limit:
            raise TooLarge(f"the body has more than the {limit} bytes that this server takes ({setting})")
        return body
    parts, size = [body], len(body)
    while message.get("more_body", False):
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone("the client has left")
        body = message.get("body", b"")
        size += len(body)
        if size > limit:
            raise TooLarge(f"the body has more than the {limit} bytes that this server takes ({setting})")
        parts.append(body)
    return b"".join(parts)


def _header_length(headers: Mapping[bytes, bytes]) -> int | None:
    value = headers.get(b"inference-header-content-length")
    if value is None:
        return None
    if not value.isdigit() or len(value) > 18:
        raise BadRequest("Inference-Header-Content-Length must be a whole number: the bytes of the body's JSON part")
    return int(value)


async def send_error(
    send: Send, status: int, message: str, error: BaseException | None = None, receive: Receive | None = None
) -> None:
    """Answer {"error": message}. After an answer to a body that is still coming the connection ends, but not before the client
    has had a moment to read it: a connection closed with unread data takes the answer with it."""
    body = error_body(message)
    headers: Headers = [_JSON, (b"content-length", b"%d" % len(body))]
    retry = error.retry_header() if isinstance(error, ServingError) else None
    if retry is not None:
        headers.append((b"retry-after", b"%d" % retry))
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if isinstance(error, WrongMethod):
        headers.append((b"allow", error.allow.encode()))
    if isinstance(error, ServingError) and error.closes:
        headers.append((b"connection", b"close"))
    lingers = status == 413 and receive is not None
    if lingers:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": lingers})
    if lingers and receive is not None:
        await _linger(receive)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _linger(receive: Receive) -> None:
    """Take what still comes, for a moment."""
    loop = asyncio.get_running_loop()
    until, taken = loop.time() + _LINGER, 0
    while taken < _LINGER_BYTES and loop.time() < until:
        try:
            message = await asyncio.wait_for(receive(), until - loop.time())
        except asyncio.TimeoutError:
            return
        if message["type"] != "http.request" or not message.get("more_body", False):
            return
        taken += len(message.get("body", b""))


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` for an application that is to see a body that has been read already."""
    told = False

    async def again() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
