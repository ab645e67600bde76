"""The live page: its addresses, its files, and what a real browser makes of them."""

from __future__ import annotations

import asyncio
import contextlib
import html
import json
import math
import re
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

fastapi = pytest.importorskip("fastapi", reason="THE LIVE PAGE IS NOT TESTED: fastapi is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="THE LIVE PAGE IS NOT TESTED: uvicorn is not installed")

from fastapi import Depends, FastAPI, HTTPException, Request  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402

from bitdial.serving.metrics import ModelMetrics  # noqa: E402
from bitdial.serving.page import file_bytes  # noqa: E402
from bitdial.serving.page.routes import STATIC, history_json, page_router  # noqa: E402
from bitdial.serving.protocol.response import plain_json  # noqa: E402

RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)
ACCURACY = (0.9302, 0.9296, 0.9281, 0.9243, 0.9187)
HOSTILE = '<img src=x onerror="document.title=1">\u202e"&'
KEY = "s3cret-key"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="THE LIVE PAGE IS NOT TESTED IN A BROWSER: neither chromium nor google-chrome is installed"
)


class Source:
    """What a server would tell: one model with six minutes of rising and falling load, one with an odd name and no traffic."""

    def __init__(self, seconds: int = 360) -> None:
        self.begun = time.monotonic() - seconds
        self.metrics = {
            "vgg-cifar": ModelMetrics(None, "vgg-cifar", RATIOS, ACCURACY, 0.05),
            HOSTILE: ModelMetrics(None, HOSTILE, (0.0, 1.0), (None, None), 0.1),
        }
        self.restart_seen = 0
        self._fill(self.metrics["vgg-cifar"], seconds)

    def _fill(self, metrics: ModelMetrics, seconds: int) -> None:
        rng = np.random.default_rng(5)
        switches, before = 0, 0
        for second in range(seconds):
            load = 70 + 60 * math.sin(second / 40) + (55 if 180 <= second < 215 else 0)
            index = min(4, max(0, round((load - 70) / 22)))
            switches += index != before
            before = index
            crowded = max(0.0, (load - 120) / 60)
            count = int(rng.poisson(load))
            for k in range(count):
                now = self.begun + second + k / count
                metrics.arrived(now, 16)
                if crowded and rng.random() < 0.12 * crowded:
                    metrics.shed(now, "overloaded")
                    continue
                queue = float(rng.exponential(0.004 + 0.012 * crowded))
                compute = (0.0125 - 0.0012 * index) * float(rng.normal(1, 0.05))
                total = queue + compute + 0.001
                metrics.answered(
                    now, index=index, queue=queue, compute=compute, total=total, samples=16, met=total <= 0.05
                )
                metrics.batch(now, index=index, samples=16 * (1 + int(rng.integers(0, 2))), requests=1)
            metrics.gauges(
                self.begun + second + 0.99,
                index=index,
                queue_depth=int(rng.poisson(1 + 14 * crowded)),
                queue_samples=32,
                oldest_wait=0.0123,
                switches=switches,
                workers=1,
            )

    def live_metrics(self, model: str) -> ModelMetrics | None:
        return self.metrics.get(model)

    def live_state(self) -> Any:
        batches = (1, 2, 4, 8, 16, 32)
        seconds = [[(1.2 - 0.14 * i) * 1e-3 * (0.4 + 0.78 * b) for b in batches] for i in range(5)]
        layers = [
            {"name": "features.0", "kind": "conv", "macs": 1769472, "eligible": False, "low_share": [0.0] * 5},
            {
                "name": "features.3",
                "kind": "conv",
                "macs": 37748736,
                "eligible": True,
                "low_share": [0, 0.125, 0.5, 0.75, 1],
            },
            {
                "name": "features.7",
                "kind": "conv",
                "macs": 18874368,
                "eligible": True,
                "low_share": [0, 0.375, 0.5, 0.75, 1],
            },
            {
                "name": f"head{HOSTILE}",
                "kind": "linear",
                "macs": 5120,
                "eligible": True,
                "low_share": [0, 0, 0.25, 0.75, 1],
            },
        ]
        tensors = {
            "inputs": [{"name": "input", "dtype": "float32", "shape": [-1, 3, 32, 32], "batch_factor": 1}],
            "outputs": [{"name": "logits", "dtype": "float32", "shape": [-1, 10], "batch_factor": 1}],
        }
        return {
            "server": {
                "version": "0.1.0",
                "uptime_s": time.monotonic() - self.begun,
                "processor": "AMD EPYC, 2 cores",
            },
            "models": [
                {
                    "name": "vgg-cifar", "state": "ready", "ratios": RATIOS, "accuracy": ACCURACY, "slo_ms": 50.0,
                    "policy": "lookahead", **tensors, "workers": 2, "digest": "3f" * 32, "layers": layers,
                    "engine": {"name": "cpu", "isa": "avx512vnni", "threads": 1},
                    "table": {"ratios": RATIOS, "batches": batches, "seconds": seconds, "accuracy": ACCURACY},
                },
                {"name": HOSTILE, "state": "starting", "message": f"loading {HOSTILE}", "accuracy": (math.nan, None)},
            ],
        }  # fmt: skip


def application(source: Source, key: str | None = None) -> FastAPI:
    def check(request: Request) -> None:
        if key is not None and request.headers.get("authorization") != f"Bearer {key}":
            raise HTTPException(401, "an API key is needed")

    app = FastAPI()
    app.include_router(page_router(source, [Depends(check)]))
    return app


@pytest.fixture(scope="module")
def source() -> Source:
    return Source()


@pytest.fixture(scope="module")
def client(source: Source) -> TestClient:
    return TestClient(application(source))


# ---- addresses and files -----------------------------------------------------------------------------------------------------


def test_page_and_files_have_a_strict_policy(client: TestClient) -> None:
    for path in ["/", *(f"/static/{name}" for name in STATIC)]:
        answer = client.get(path)
        assert answer.status_code == 200 and answer.content, path
        policy = answer.headers["content-security-policy"]
        assert "default-src 'self'" in policy and "style-src 'self'" in policy and "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert client.get("/").headers["content-type"].startswith("text/html")
    assert (
        client.get("/static/app.js").headers["content-type"].startswith("text/javascript")
    )  # else modules are not run


@pytest.mark.parametrize(
    "name", ["routes.py", "grafana.json", "index.html", "..%2froutes.py", "%2e%2e/routes.py", "a/b", ""]
)
def test_only_listed_files_are_served(client: TestClient, name: str) -> None:
    assert client.get(f"/static/{name}").status_code == 404


def test_files_load_nothing_from_elsewhere_and_hold_no_inline_code() -> None:
    index = file_bytes("index.html").decode()
    assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\son\w+=|\sstyle=|javascript:", index, re.I)
    for link in re.findall(r'(?:src|href)="([^"]*)"', index):
        assert link == "/metrics" or link.removeprefix("/static/") in STATIC, link
    for name in [*STATIC, "index.html"]:
        text = file_bytes(name).decode()
        assert set(re.findall(r"(?:https?:)?//[a-z0-9]+\.[^\s\"']+", text)) <= {"http://www.w3.org/2000/svg"}, name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text), (
            name
        )
        for imported in re.findall(r"from '\./([^']+)'", text):
            assert imported in STATIC


def test_ids_that_the_script_uses_are_in_the_page() -> None:
    index, script = file_bytes("index.html").decode(), file_bytes("app.js").decode()
    used = set(re.findall(r"\$\('([\w-]+)'\)", script))
    assert used and used <= set(re.findall(r'\bid="([\w-]+)"', index))
    labelled = set(re.findall(r'aria-labelledby="([\w-]+)"', index))
    assert labelled <= set(re.findall(r'\bid="([\w-]+)"', index))


def test_state_and_history_are_json(client: TestClient, source: Source) -> None:
    state = client.get("/live/state")
    assert state.headers["cache-control"] == "no-store"
    body = json.loads(state.text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert [m["name"] for m in body["models"]] == ["vgg-cifar", HOSTILE]
    assert body["models"][1]["accuracy"] == [None, None]  # NaN cannot be told

    full = client.get("/live/history", params={"model": "vgg-cifar"}).json()
    assert len(full["rows"]) >= 359 and full["present"]["ratio"] in RATIOS
    since = full["now"] - 10
    some = client.get("/live/history", params={"model": "vgg-cifar", "since": since}).json()
    expected = [row for row in full["rows"] if row["t"] + 1 > since]
    assert some["rows"][: len(expected)] == expected  # a second may have passed between the two
    assert client.get("/live/history", params={"model": HOSTILE}).json()["rows"] == []


@pytest.mark.parametrize(
    "query", ["", "model=x&since=nan", "model=x&since=inf", "model=x&since=soon", f"model={'x' * 2000}"]
)
def test_malformed_queries_are_refused(client: TestClient, query: str) -> None:
    assert client.get(f"/live/history?{query}").status_code == 422


def test_unknown_model_is_not_found(client: TestClient) -> None:
    assert client.get("/live/history?model=nobody").status_code == 404


def test_guard_covers_the_figures_but_not_the_page(source: Source) -> None:
    client = TestClient(application(source, KEY))
    assert client.get("/").status_code == client.get("/static/app.js").status_code == 200
    assert client.get("/live/state").status_code == client.get("/live/history?model=vgg-cifar").status_code == 401
    assert client.get("/live/state", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200


def test_history_asks_for_fresh_gauges() -> None:
    metrics = ModelMetrics(None, "m", RATIOS, ACCURACY, 0.05, clock=lambda: 12.5)

    def refresh() -> None:
        metrics.gauges(12.5, index=3, queue_depth=7, queue_samples=9, oldest_wait=0.5, switches=2, workers=1)

    metrics.on_read = refresh
    answer = json.loads(history_json(metrics))
    assert answer["now"] == 12.5
    assert answer["present"]["queue_depth"] == 7 and answer["present"]["ratio"] == 0.75


def test_plain_json_drops_what_json_cannot_hold() -> None:
    assert plain_json({"a": (1.5, math.inf), 2: [math.nan, "x", None, True]}) == {
        "a": [1.5, None],
        "2": [None, "x", None, True],
    }


# ---- in a browser ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The application on a free loopback port, in a thread."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        until = time.monotonic() + 60
        while not server.started and time.monotonic() < until:
            time.sleep(0.01)
        assert server.started
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(60)


def command(profile: str, *more: str) -> list[str]:
    assert BROWSER is not None
    return [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-extensions",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
        "--no-proxy-server", "--hide-scrollbars", f"--user-data-dir={profile}", *more,
    ]  # fmt: skip


class Tab:
    """A page of a headless browser, driven over its debugging port."""

    def __init__(self, send: Callable[..., Any], problems: list[str]) -> None:
        self.send, self.problems = send, problems

    async def js(self, expression: str) -> Any:
        answer = await self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def until(self, expression: str, seconds: float = 60.0) -> Any:
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            value = await self.js(expression)
            if value:
                return value
            await asyncio.sleep(0.05)
        raise AssertionError(f"{expression} did not come true; page problems: {self.problems}")


def drive(steps: Callable[[Tab], Any]) -> list[str]:
    """Run steps in a browser; returns what went wrong in the page (errors, violations of the policy, failed requests)."""
    aiohttp = pytest.importorskip("aiohttp", reason="THE LIVE PAGE IS NOT TESTED BY HAND: aiohttp is not installed")
    problems: list[str] = []

    async def run(profile: str) -> None:
        waiting: dict[int, asyncio.Future[Any]] = {}
        port_file = Path(profile) / "DevToolsActivePort"
        end = time.monotonic() + 60
        while not (port_file.exists() and port_file.read_text().count("\n") >= 1):
            assert time.monotonic() < end, "the browser did not start"
            await asyncio.sleep(0.05)
        port = port_file.read_text().split()[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                target = next(t for t in await answer.json() if t["type"] == "page")
            async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket_:

                async def listen() -> None:
                    async for message in socket_:
                        data = json.loads(message.data)
                        if "id" in data:
                            waiting.pop(data["id"]).set_result(data)
                        elif data["method"] == "Runtime.exceptionThrown":
                            problems.append(
                                str(data["params"]["exceptionDetails"].get("exception", {}).get("description"))
                            )
                        elif data["method"] == "Log.entryAdded" and data["params"]["entry"]["level"] == "error":
                            problems.append(data["params"]["entry"]["text"])

                async def send(method: str, **parameters: Any) -> Any:
                    number = send.count = getattr(send, "count", 0) + 1  # type: ignore[attr-defined]
                    waiting[number] = asyncio.get_running_loop().create_future()
                    await socket_.send_json({"id": number, "method": method, "params": parameters})
                    answer = await asyncio.wait_for(waiting[number], 60)
                    assert "error" not in answer, answer
                    return answer["result"]

                listener = asyncio.ensure_future(listen())
                for domain in ("Runtime", "Log", "Page"):
                    await send(f"{domain}.enable")
                try:
                    await steps(Tab(send, problems))
                finally:
                    listener.cancel()

    with tempfile.TemporaryDirectory(prefix="bitdial-page-", ignore_cleanup_errors=True) as profile:
        browser = subprocess.Popen(
            command(profile, "--remote-debugging-port=0", "about:blank"),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            asyncio.run(run(profile))
        finally:
            browser.terminate()
            try:
                browser.wait(60)
            except subprocess.TimeoutExpired:
                browser.kill()
                browser.wait(60)
    return problems


@needs_browser
def test_page_shows_the_figures(source: Source) -> None:
    """The page as a browser has it after some seconds: tiles, charts and tables show what the server told."""
    with served(application(source)) as url, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        done = subprocess.run(
            command(profile, "--virtual-time-budget=4000", "--dump-dom", url),
            capture_output=True,
            timeout=300,
            check=True,
        )
    page = done.stdout.decode()

    def text_of(identifier: str, tag: str) -> str:
        found = re.search(rf'<{tag}[^>]*\bid="{identifier}".*?</{tag}>', page, re.S)
        assert found, f"#{identifier} is not in the page"
        return html.unescape(re.sub(r"<[^>]*>", " ", found[0])).replace("\u00a0", " ")

    metrics = source.metrics["vgg-cifar"]
    rows = metrics.history.rows(time.monotonic())
    assert text_of("title", "h1").strip() == "vgg-cifar" and text_of("state", "span").strip() == "ready"
    assert "AMD EPYC" in text_of("server", "p") and "up 6 min" in text_of("server", "p")

    # Over the last 5 minutes (the page looked some seconds ago, so its window began a little earlier).
    for tile, key in (("tile-ratio", "ratio"), ("tile-accuracy", "accuracy")):
        shown = float(re.search(r"(\d+\.\d+) %", text_of(tile, "div"))[1]) / 100  # type: ignore[index]
        expected = [
            np.average([r[key] for r in part], weights=[r["answered_samples"] for r in part])
            for part in ([r for r in rows[60 - back :] if r["answered_samples"]] for back in range(-20, 20))
        ]
        assert min(expected) - 1e-3 <= shown <= max(expected) + 1e-3, (tile, shown, expected)
    assert "against ratio 0 %" in text_of("tile-accuracy", "div") and "1 of 2" in text_of("tile-workers", "div")
    slo = text_of("tile-slo", "div")
    shed = int(re.search(r"([\d,]+) shed", slo)[1].replace(",", ""))  # type: ignore[index]
    assert 0 < shed <= metrics.outcomes["shed"].count

    charts = re.findall(r'<figure id="(chart-\w+)">(.*?)</figure>', page, re.S)
    assert [name for name, _ in charts] == [
        f"chart-{n}" for n in ("load", "latency", "ratio", "accuracy", "time", "queue")
    ]
    for name, chart in charts:
        lines = re.findall(r'<path class="line[^"]*" d="([^"]*)" data-series', chart)
        assert lines, name
        assert max(line.count("L") for line in lines) >= 50, f"{name} draws no line"
        assert "NaN" not in chart and "Infinity" not in chart and "undefined" not in chart, name
        label = re.search(r'role="img"[^>]*aria-label="([^"]*)"', chart) or re.search(r'aria-label="([^"]*)"', chart)
        assert label and "last 5 minutes" in label[1], name
    assert "SLO 50 ms" in dict(charts)["chart-latency"].replace("\u00a0", " ").replace("&nbsp;", " ")

    table = text_of("service", "table")
    assert "ratio 25 %" in table and "92.96 %" in table and "Samples/s" in table
    assert page.count('data-index="0"') == 1 + 6 + 3
    layers = text_of("layers", "table")
    assert "features.3" in layers and "37.7 M" in layers and "always 8-bit" in layers and "4 layers" in layers
    share = {i: layer["low_share"] for i, layer in enumerate(source.live_state()["models"][0]["layers"])}[1][
        metrics.index
    ]
    assert f"{100 * share:.1f} %" in layers
    assert "lookahead" in text_of("facts", "dl") and "input: float32 [batch, 3, 32, 32]" in text_of("facts", "dl")
    assert "<img" not in page and "\u202e" not in page and "\\u202e" in page  # names stay text, and cannot reorder it


@needs_browser
def test_key_model_window_and_recording_by_hand(source: Source) -> None:
    """A browser that is refused asks for the key; then models and times can be chosen, and the recording is complete."""

    async def steps(tab: Tab) -> None:
        await tab.send("Page.navigate", url=url)
        await tab.until("document.getElementById('key-dialog')?.open")
        assert await tab.js("document.getElementById('content').hidden")
        enter = "key.value = {}; document.querySelector('#key-form button').click()"
        await tab.js("const key = document.getElementById('key'); " + enter.format("'wrong'"))
        await tab.until("!document.getElementById('key-error').hidden && document.getElementById('key-dialog').open")
        await tab.js(enter.format(f"'{KEY}'"))
        await tab.until("!document.getElementById('content').hidden && !document.getElementById('key-dialog').open")
        assert await tab.js("sessionStorage.getItem('bitdial-api-key')") == KEY
        assert await tab.js("localStorage.length") == 0
        refused = len(tab.problems)
        assert all("401" in problem for problem in tab.problems), tab.problems

        chart = "document.querySelector('#chart-load [role=img]').getAttribute('aria-label')"
        await tab.until(f"{chart}?.includes('last 5 minutes')")
        await tab.js("document.querySelector('input[name=window][value=\"60\"]').click()")
        await tab.until(f"{chart}.includes('last 1 minute')")
        assert await tab.js("document.documentElement.scrollWidth <= innerWidth")

        # The recording: caught where the page hands it to the browser.
        await tab.js("URL.createObjectURL = (blob) => { window.saved = blob.text(); return '#'; }")
        await tab.js("document.getElementById('export').click()")
        saved = json.loads(await tab.js("window.saved"))
        assert saved["format"] == "bitdial-live-recording" and len(saved["rows"]) >= 359
        assert saved["model"]["digest"] == "3f" * 32
        assert saved["rows"][100] in source.metrics["vgg-cifar"].history.rows(time.monotonic())

        # The model with the odd name: no traffic, and its name is text.
        await tab.js(
            "{ const list = document.getElementById('model'); list.selectedIndex = 1; list.dispatchEvent(new Event('change')) }"
        )
        await tab.until("document.getElementById('title').textContent.startsWith('<img')")
        assert await tab.js("document.getElementById('state').textContent") == "starting"
        await tab.until("document.getElementById('trouble').textContent.startsWith('loading <img')")
        assert await tab.js("document.images.length") == 0
        await tab.until(
            "document.querySelector('#chart-ratio [role=img]').getAttribute('aria-label').includes('no data')"
        )
        assert await tab.js("/NaN|undefined|Infinity/.test(document.body.innerText)") is False

        # On a phone nothing is cut off.
        await tab.send("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=True)
        await tab.js("{ const list = document.getElementById('model'); list.selectedIndex = 0; "
                     "list.dispatchEvent(new Event('change')) }")  # fmt: skip
        await tab.until("document.getElementById('title').textContent === 'vgg-cifar'")
        await tab.until("document.documentElement.scrollWidth <= 360")
        await tab.until("document.querySelector('#chart-load svg[role=img]').getBoundingClientRect().right <= 360")
        assert len(tab.problems) == refused, tab.problems

    with served(application(source, KEY)) as url:
        drive(steps)


@needs_browser
def test_page_says_when_the_server_is_gone_and_recovers(source: Source) -> None:
    """While figures fail to come the page says so; when they come again the notice goes."""
    broken = {"now": False}
    app = application(source)

    @app.middleware("http")
    async def fail(request: Request, proceed: Callable[[Request], Any]) -> Any:
        if broken["now"] and request.url.path.startswith("/live/"):
            return fastapi.Response(status_code=500)
        return await proceed(request)

    async def steps(tab: Tab) -> None:
        await tab.send("Page.navigate", url=url)
        await tab.until("document.getElementById('content') && !document.getElementById('content').hidden")
        broken["now"] = True
        await tab.until("!document.getElementById('trouble').hidden")
        assert "500" in await tab.js("document.getElementById('trouble').textContent")
        broken["now"] = False
        await tab.until("document.getElementById('trouble').hidden")

    with served(app) as url:
        drive(steps)
