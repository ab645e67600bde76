"""Replicas on Ray Serve: settings and the replica's application without Ray, then a real cluster of two replicas."""

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

import bitdial
from bitdial.artifact import load_program
from bitdial.cli import deploy
from bitdial.engines.base import create_engine
from bitdial.errors import ConfigError
from bitdial.serving.ray import deployment
from bitdial.serving.ray.config import BUILDER, DEPLOYMENT, make_deploy_config, serve_document, serve_options
from bitdial.serving.ray.errors import DeployError, RayMissing
from bitdial.serving.ray.scaling import ScalingSettings
from bitdial.serving.ray.store import MemoryFile

RATIOS = (0.0, 0.5, 1.0)
SHAPE = (3, 8, 8)
DIGITS = "tiny"  # the model's name
PATIENCE = 60.0  # seconds for anything the cluster is waited for


# ---- settings --------------------------------------------------------------------------------------------------------------


def content(**changes: Any) -> dict[str, Any]:
    return {"models": [{"name": "m", "path": "/models/m.bitdial", "slo_ms": 50, "max_queue": 100}], **changes}


def test_the_replicas_own_queue_is_the_one_that_refuses() -> None:
    config = make_deploy_config(content(min_replicas=2, max_replicas=8))
    options = serve_options(config)
    assert options["max_ongoing_requests"] > config.model.max_queue + config.model.max_batch
    scaling = options["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["initial_replicas"], scaling["max_replicas"]) == (2, 2, 8)
    assert scaling["upscale_delay_s"] == scaling["downscale_delay_s"] == 0
    assert ScalingSettings(**scaling["policy"]["policy_kwargs"]) == config.scaling()
    assert options["ray_actor_options"] == {"num_cpus": 1}


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"min_replicas": 3, "max_replicas": 2}, "max_replicas"),
        ({"utilization": 0}, "utilization"),
        ({"route_prefix": "cats"}, "route_prefix"),
        ({"route_prefix": "/cats/"}, "route_prefix"),
        ({"record": "x.jsonl"}, "record"),
        ({"models": []}, "models"),
        ({"models": [{"name": "m", "path": "a", "engine": "npu"}]}, "no time that replicas could be scaled by"),
        ({"models": [{"name": "m", "path": "a", "workers": 2}]}, "worker"),
        ({"models": [{"name": "a", "path": "a"}, {"name": "b", "path": "b"}]}, "one model"),
        ({"tls_cert": "a.pem"}, "tls"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_settings_that_cannot_be_deployed_are_named(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"(?i){named}"):
        make_deploy_config(content(**wrong))


def test_the_document_makes_the_same_deployment_again() -> None:
    config = make_deploy_config(content(max_replicas=4, up_delay=7))
    document = json.loads(json.dumps(serve_document(config)))
    (application,) = document["applications"]
    assert application["import_path"] == BUILDER
    assert make_deploy_config(application["args"]) == config
    assert application["deployments"][0]["name"] == DEPLOYMENT
    for wrong in ({"ship": True}, {"api_key": "a-long-secret"}):
        with pytest.raises(ConfigError) as caught:
            serve_document(make_deploy_config(content(**wrong)))
        assert "a-long-secret" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:The `metrics_interval_s` field:DeprecationWarning")
def test_the_document_is_one_that_ray_takes() -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="RAY IS NOT INSTALLED: pip install bitdial[ray]")
    parsed = schema.ServeDeploySchema.model_validate(serve_document(make_deploy_config(content(max_replicas=4))))
    (found,) = parsed.applications[0].deployments
    assert found.autoscaling_config["max_replicas"] == 4
    config = pytest.importorskip("ray.serve.config")
    policy = config.AutoscalingConfig(**found.autoscaling_config).policy
    assert policy.get_policy()(**policy.policy_kwargs).settings.max_replicas == 4


def test_the_command_prints_the_document_and_names_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    app = typer.Typer()
    app.command()(deploy.deploy)

    def run(*arguments: str) -> None:
        app(args=["m.bitdial", *arguments], standalone_mode=False)

    run(
        "--slo-ms",
        "50",
        "--max-replicas",
        "8",
        "--max-queue",
        "100",
        "--threads",
        "2",
        "--utilization",
        "60",
        "--dry-run",
    )
    (application,) = json.loads(capsys.readouterr().out)["applications"]
    config = make_deploy_config(application["args"])
    assert (config.max_replicas, config.threads, config.utilization, config.name) == (8, 2, 0.6, "m")
    assert config.model.path == Path("m.bitdial").absolute()
    for arguments, named in ((["--detach"], "--address"), (["--max-ratio", "x"], "--max-ratio")):
        with pytest.raises(ConfigError, match=named):
            run(*arguments)
    with pytest.raises(ConfigError, match="max_replicas"):
        run("--min-replicas", "3", "--max-replicas", "2", "--dry-run")


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RayMissing, match=r"pip install 'bitdial\[ray\]'"):
        deployment.deploy(make_deploy_config(content()))


def test_importing_bitdials_part_loads_no_ray() -> None:
    code = "import sys, bitdial.serving.ray.deployment, bitdial.cli.deploy; print('ray' in sys.modules, 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


def test_bytes_can_be_opened_and_leave_nothing(model_file: Path) -> None:
    data = model_file.read_bytes()
    file = MemoryFile(data, "m")
    assert Path(file.path).read_bytes() == data
    path = file.path
    file.close()
    file.close()
    assert not Path(path).exists()


# ---- the replica's application, without Ray ----------------------------------------------------------------------------------


def test_a_replica_answers_below_its_prefix_and_says_who_it_is(model_file: Path) -> None:
    from bitdial.serving.metrics.exposition import make_registry
    from bitdial.serving.ray.replica import make_app, start_model

    config = make_deploy_config(
        content(models=[{"name": DIGITS, "path": str(model_file), "slo_ms": 2000, "max_batch": 2}])
    )

    async def go() -> None:
        registry = make_registry()
        file = MemoryFile(model_file.read_bytes(), DIGITS)
        with pytest.raises(DeployError, match="not the same file"):
            await start_model(config, None, None, make_registry(), "00" * 32)
        model = await start_model(config, None, file, registry, hashlib.sha256(model_file.read_bytes()).hexdigest())
        app = make_app(config, model, "r-1", registry)

        async def call(
            method: str, path: str, prefix: str = "", body: bytes = b""
        ) -> tuple[int, dict[bytes, bytes], Any]:
            sent: list[Any] = []
            scope = {
                "type": "http", "method": method, "path": prefix + path, "root_path": prefix, "query_string": b"",
                "headers": [(b"content-length", str(len(body)).encode())], "http_version": "1.1", "scheme": "http",
            }  # fmt: skip

            async def receive() -> dict[str, Any]:
                return {"type": "http.request", "body": body, "more_body": False}

            async def send(message: Any) -> None:
                sent.append(message)

            await app(scope, receive, send)
            answer = b"".join(m.get("body", b"") for m in sent[1:])
            return sent[0]["status"], dict(sent[0]["headers"]), json.loads(answer) if answer else None

        for prefix in ("", "/cats"):
            status, headers, found = await call("GET", "/v2/models", prefix)
            assert (status, headers[b"bitdial-replica"], found) == (200, b"r-1", {"models": [DIGITS]})
            status, headers, found = await call(
                "POST", f"/v2/models/{DIGITS}/infer", prefix, json_request(images(1), 1.0)
            )
            assert status == 200 and headers[b"bitdial-replica"] == b"r-1"
        status, headers, found = await call("POST", "/v2/models/none/infer")
        assert status == 404 and headers[b"bitdial-replica"] == b"r-1"
        status, _, found = await call("POST", f"/v2/repository/models/{DIGITS}/load")
        assert status == 400 and "deploy" in found["error"]
        assert model.metrics is not None and model.metrics.arrived_samples == 2
        await model.stop()
        file.close()

    asyncio.run(go())


# ---- a real cluster ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny network; ratios 0, 0.5 and 1 give different outputs."""
    import torch
    from torch import nn

    torch.manual_seed(5)
    network = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    ).eval()  # fmt: skip
    # Of random weights no ratio is sound.
    config = bitdial.QuantizeConfig(target="paper", selector="greedy", ratios=RATIOS, keep_answers=0.0)
    model = bitdial.quantize(network, torch.randn(16, *SHAPE), config)
    path = tmp_path_factory.mktemp("model") / f"{DIGITS}.bitdial"
    model.save(path)
    return path


def images(count: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).standard_normal((count, *SHAPE), dtype=np.float32)


INPUT = "input"


def json_request(batch: np.ndarray[Any, Any], max_ratio: float) -> bytes:
    tensor = {"name": INPUT, "shape": list(batch.shape), "datatype": "FP32", "data": batch.ravel().tolist()}
    return json.dumps({"inputs": [tensor], "parameters": {"max_ratio": max_ratio}}).encode()


class Running:
    """`bitdial deploy` in a process of its own; every process that it starts carries a mark in its environment."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        self.mark, self.folder = uuid.uuid4().hex, folder
        keep = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        environment = {
            **keep, "BITDIAL_TEST_MARK": self.mark, "HOME": str(folder), "BITDIAL_CACHE_DIR": str(folder / "cache"),
            "RAY_TMPDIR": str(folder), "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_AUTO_CONNECT": "0",
        }  # fmt: skip
        code = "import sys; from bitdial.cli import app, main; from bitdial.cli.deploy import deploy; "
        code += "any(c.callback is deploy for c in app.registered_commands) or app.command()(deploy); sys.exit(main())"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "deploy", *arguments],
            env=environment, stdout=subprocess.PIPE, stderr=open(folder / "stderr", "wb"), text=True,  # noqa: SIM115
        )  # fmt: skip

    def said(self) -> str:
        return (self.folder / "stderr").read_text(errors="replace")[-4000:]

    def document(self) -> dict[str, Any]:
        """The object that it prints when it is there."""
        lines: list[str] = []
        assert self.process.stdout is not None
        timer = threading.Timer(PATIENCE, self.process.kill)
        timer.start()
        try:
            for line in self.process.stdout:
                lines.append(line)
                if line.rstrip() == "}":
                    break
        finally:
            timer.cancel()
        return dict(json.loads("".join(lines) or "{}"))

    def processes(self, title: str = "") -> list[int]:
        """All that are left of it, by their mark (and what their command line begins with)."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                ours = self.mark.encode() in (entry / "environ").read_bytes()
                if ours and (entry / "cmdline").read_bytes().startswith(title.encode()):
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def end(self) -> None:
        for process in self.processes():
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(PATIENCE)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path: Ray's sockets lie below it, and their paths may have about a hundred characters."""
    path = Path(tempfile.mkdtemp(prefix="fr", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def infer(url: str, batch: np.ndarray[Any, Any], max_ratio: float) -> tuple[str, float, np.ndarray[Any, Any]]:
    """(replica, ratio, output) of a request whose tensors are binary."""
    tensor = {
        "name": INPUT, "shape": list(batch.shape), "datatype": "FP32", "parameters": {"binary_data_size": batch.nbytes}
    }  # fmt: skip
    parameters = {"max_ratio": max_ratio, "binary_data_output": True}
    head = json.dumps({"inputs": [tensor], "parameters": parameters}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
    request = urllib.request.Request(f"{url}/v2/models/{DIGITS}/infer", head + batch.tobytes(), headers)
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        body = answer.read()
        length = int(answer.headers["Inference-Header-Content-Length"])
        said = json.loads(body[:length])
        output = np.frombuffer(body[length:], np.float32).reshape(said["outputs"][0]["shape"])
        return answer.headers["bitdial-replica"], said["parameters"]["ratio"], output


class Clients:
    """Two threads that send requests one after another until stopped; every answer is compared bit by bit."""

    def __init__(self, url: str, expected: dict[float, np.ndarray[Any, Any]], batch: np.ndarray[Any, Any]) -> None:
        self.replicas: list[str] = []
        self.ratios: set[float] = set()
        self.failures: list[str] = []
        self.stopping = threading.Event()
        self.pool = concurrent.futures.ThreadPoolExecutor(2)

        def send(max_ratio: float) -> None:
            while not self.stopping.is_set():
                try:
                    replica, ratio, output = infer(url, batch, max_ratio)
                except (OSError, urllib.error.URLError) as error:
                    self.failures.append(repr(error))
                    time.sleep(0.05)
                    continue
                assert ratio <= max_ratio  # less if it shared its batch with a request that wanted less
                self.ratios.add(ratio)
                np.testing.assert_array_equal(output, expected[ratio])
                self.replicas.append(replica)

        self.running = [self.pool.submit(send, ratio) for ratio in (0.0, 1.0)]

    def until(self, enough: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + PATIENCE
        while not enough():
            assert time.monotonic() < end, f"{what} not within {PATIENCE:g} s; failures: {self.failures[-3:]}"
            assert not any(f.done() for f in self.running), [f.exception() for f in self.running if f.done()]
            time.sleep(0.05)

    def stop(self) -> None:
        self.stopping.set()
        for future in self.running:
            future.result()
        self.pool.shutdown()


@pytest.mark.slow
def test_two_replicas_for_real(model_file: Path, folder: Path) -> None:
    """One replica, shipped to the cluster; work brings the second; both answer as the engine does; one is killed and requests go
    on; SIGTERM drains, and no process is left."""
    pytest.importorskip("ray.serve", reason="RAY IS NOT INSTALLED: pip install bitdial[ray]")
    batch = images(2, 3)
    engine = create_engine(load_program(model_file))
    expected = {ratio: np.asarray(engine.run(batch, ratio)) for ratio in (0.0, 1.0)}
    assert not np.array_equal(expected[0.0], expected[1.0])
    arguments = [
        str(model_file),
        "--json",
        "--port",
        str(free_port()),
        "--slo-ms",
        "5000",
        "--policy",
        "fixed:1",
        "--ship",
    ]
    arguments += ["--min-replicas", "1", "--max-replicas", "2", "--num-cpus", "0.5", "--max-batch", "4"]
    arguments += ["--up-delay", "0", "--utilization", "0.0001", "--route-prefix", "/cats", "--drain-timeout", "10"]
    running = Running(arguments, folder)
    try:
        document = running.document()
        if "url" not in document and "could not be started on this machine" in running.said():
            pytest.skip(f"RAY CANNOT START HERE: {running.said()[-500:]}")
        assert document.get("application") == DIGITS, running.said()
        assert document["url"].endswith("/cats") and document["own_cluster"] is True
        clients = Clients(document["url"], expected, batch)
        try:
            clients.until(lambda: len(clients.replicas) >= 20, "answers")
            clients.until(lambda: len(set(clients.replicas[-50:])) == 2, "answers of two replicas")
            assert not clients.failures
            assert clients.ratios == {0.0, 1.0}
            metrics = urllib.request.urlopen(f"{document['url']}/metrics", timeout=PATIENCE).read().decode()
            assert "bitdial" in metrics

            replicas = running.processes("ray::ServeReplica")
            assert len(replicas) == 2
            before = set(clients.replicas)
            os.kill(replicas[0], signal.SIGKILL)
            done = len(clients.replicas)
            clients.until(lambda: len(clients.replicas) > done + 50, "answers after a replica was killed")
            clients.until(lambda: len(set(clients.replicas[-50:]) - before) == 1, "answers of the replica in its place")
            assert len(clients.failures) <= 4, clients.failures  # those that the killed replica held
        finally:
            clients.stop()

        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(PATIENCE) == 0, running.said()
        end = time.monotonic() + PATIENCE
        while (left := running.processes()) and time.monotonic() < end:
            time.sleep(0.1)
        assert not left, [Path(f"/proc/{p}/cmdline").read_bytes() for p in left if Path(f"/proc/{p}").exists()]
    finally:
        running.end()


def test_a_bad_file_and_a_taken_port_are_told_of_before_a_cluster_starts(model_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray.serve", reason="RAY IS NOT INSTALLED: pip install bitdial[ray]")
    bad = tmp_path / "bad.bitdial"
    bad.write_bytes(model_file.read_bytes()[:1000])
    with pytest.raises(bitdial.errors.ArtifactError):
        deployment.deploy(make_deploy_config(content(models=[{"name": "bad", "path": str(bad)}])))
    with pytest.raises(DeployError, match="none.bitdial cannot be read"):
        deployment.deploy(make_deploy_config(content(models=[{"name": "m", "path": str(tmp_path / "none.bitdial")}])))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(DeployError, match=f"{port}.*--port"):
            deployment.deploy(make_deploy_config(content(models=[{"name": "m", "path": str(model_file)}], port=port)))
