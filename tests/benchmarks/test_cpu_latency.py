"""The latency benchmark: options, worker processes in lock-step, resuming, ratios and tables. Figures here are made up,
except in the end-to-end test."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from bitdial.benchmarking.timing import Plan, Samples
from bitdial.errors import ConfigError

MODULES = (
    "machine", "results", "common", "peers", "peers.inputs", "peers.networks", "peers.models", "peers.protocol",
    "peers.contestants", "peers.cell", "peers.memory", "peers.tables", "cpu_latency",
)  # fmt: skip


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BITDIAL_DATA", str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--networks", "lenet"], "--networks"),
        (["--networks", ","], "--networks"),
        (["--batches", "0"], "--batches"),
        (["--threads", "one"], "--threads"),
        (["--repeats", "0"], "--repeats"),
        (["--peers", "tensorrt"], "--peers"),
        (["--isa", "mmx", "--engine", "reference"], "--isa"),
        (["--engine", "psychic", "--isa", "all"], "--isa none"),
        (["--artifacts", "no-such-folder"], "--artifacts"),
    ],
)
def test_wrong_options(bench: dict[str, ModuleType], no_data: None, arguments: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        bench["cpu_latency"].read_options(["--isa", "none", *arguments])


def test_missing_peers_are_named_and_left_out(
    bench: dict[str, ModuleType], no_data: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    hidden = ("openvino", "onnxruntime", "onnx", "nncf")
    monkeypatch.setattr(
        bench["peers.contestants"].importlib.util, "find_spec", lambda n, *a: None if n in hidden else found(n, *a)
    )
    options = bench["cpu_latency"].read_options(["--isa", "none", "--networks", "resnet20"])
    assert {c.library for c in options.contestants} <= {"torch"}
    told = capsys.readouterr().err
    assert "openvino/float32 left out: openvino, onnx not installed" in told and "requirements-peers.txt" in told
    assert "DATA FOLDER MISSING" in told


def test_choices(bench: dict[str, ModuleType], no_data: None) -> None:
    read = bench["cpu_latency"].read_options
    options = read(["--isa", "none", "--peers", "torch/float32,torch/bfloat16", "--batches", "8,1,8", "--threads", "1"])
    assert [c.name for c in options.contestants] == ["torch/float32", "torch/bfloat16"]
    assert options.batches == (8, 1) and options.threads == (1,)
    own = read(["--engine", "reference", "--peers", "none"]).contestants
    assert [c.name for c in own] == ["bitdial/reference"]
    many = read(["--isa", "none", "--peers", "none", "--threads", "1,100000"])
    assert many.threads == (1,)


def test_the_portable_path_runs_at_its_batches_only(bench: dict[str, ModuleType], no_data: None) -> None:
    from dataclasses import replace

    make = bench["peers.contestants"].bitdial_contestant
    options = bench["cpu_latency"].read_options(["--isa", "none", "--peers", "none", "--portable-batches", "1,2"])
    options = replace(options, contestants=(make("avx2"), make("portable")))
    names = lambda batch: [c.name for c in bench["cpu_latency"].cell_contestants(options, batch)]  # noqa: E731
    assert names(2) == ["bitdial/avx2", "bitdial/portable"] and names(8) == ["bitdial/avx2"]


def test_a_worker_answers_fails_and_ends(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    protocol = bench["peers.protocol"]
    worker = protocol.Worker("bitdial_peer", tmp_path / "logs" / "w.log")
    with pytest.raises(protocol.PeerError, match=r"absent\.npy"):
        worker.ask("load", model="x.bitdial", inputs=str(tmp_path / "absent.npy"), engine="reference", threads=1)
    memory = worker.ask("memory")  # it goes on after a failure
    assert 0 < memory["now_bytes"] <= memory["peak_bytes"]
    with pytest.raises(protocol.PeerError, match="unknown request"):
        worker.ask("dance")
    worker.close()
    assert worker.process.returncode == 0
    with pytest.raises(protocol.PeerError, match="ended"):
        worker.ask("memory")
    broken = protocol.Worker("no_such_peer", tmp_path / "b.log")
    with pytest.raises(protocol.PeerError, match="no_such_peer"):
        broken.ask("load")
    broken.process.kill()
    broken.process.wait()
    with pytest.raises(protocol.PeerError, match="exit status -9"):
        broken.ask("load")
    broken.close()


def test_a_worker_that_says_nothing_is_ended(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    protocol = bench["peers.protocol"]
    worker = protocol.Worker("bitdial_peer", tmp_path / "w.log")
    with pytest.raises(protocol.PeerError, match="no answer to 'memory'"):
        worker.ask("memory", timeout=0.0)  # the interpreter takes longer than that to start
    worker.close()
    assert worker.process.returncode is not None


def test_networks_carry_a_signal(bench: dict[str, ModuleType]) -> None:
    networks = bench["peers.networks"]
    (a,), (b,) = networks.input_batch("resnet20", 4), networks.input_batch("resnet20", 4)
    assert a.shape == (4, 3, 32, 32) and a.dtype == np.float32 and (a == b).all()
    model = networks.float_network("resnet20", None)
    with torch.no_grad():
        y = model(torch.from_numpy(a))
        again = networks.float_network("resnet20", None)(torch.from_numpy(a))
    assert torch.equal(y, again)  # every process builds the same network
    assert y.std(0).mean() > 0.01 and torch.isfinite(y).all()  # the answer depends on the image


def test_cache_holds_whole_files_and_stays_out_of_the_project(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    files = bench["peers.models"].ModelFiles(tmp_path / "cache", None, lambda stage, share: None)
    path = files.inputs("resnet20", 2)
    assert [x.shape for x in bench["peers.inputs"].read_inputs(path)] == [(2, 3, 32, 32)]
    text = files.inputs("minilm_l6_128", 2)
    assert [x.shape for x in bench["peers.inputs"].read_inputs(text)] == [(2, 128), (2, 128)]
    text.unlink()
    before = path.stat().st_mtime_ns
    assert files.inputs("resnet20", 2) == path and path.stat().st_mtime_ns == before

    def failing(partial: Path) -> None:
        partial.write_text("half")
        raise OSError("no space")

    with pytest.raises(OSError):
        files._made("x", ".onnx", failing)
    assert sorted(p.name for p in path.parent.iterdir()) == [".gitignore", path.name]
    assert (path.parent / ".gitignore").read_text() == "*\n"


def test_proof_of_precision(bench: dict[str, ModuleType]) -> None:
    proof = bench["peers.contestants"].low_precision_share
    peers = {c.name: c for c in bench["peers.contestants"].PEERS}
    ort = {"operators": {"Conv": 3, "QLinearConv": 17, "QGemm": 1}}
    assert proof(peers["onnxruntime/int8"], ort) == (18, 21)
    assert proof(peers["onnxruntime/float32"], ort) == (3, 21)
    vino = {"primitives": {"Convolution u8 brgconv_avx512_I8": 17, "Convolution f32 jit": 2, "FullyConnected i8 x": 1}}
    assert proof(peers["openvino/int8 QDQ"], vino) == (18, 20)
    assert proof(peers["openvino/bfloat16"], vino) == (0, 20)
    assert proof(peers["torch/float32"], {}) is None


def made_up_cases(bench: dict[str, ModuleType]) -> dict[str, dict[str, Any]]:
    """TEST DATA: figures and paired ratios of a made-up cell with drift: every round is slower than the last."""
    times = {
        "bitdial/a/0 %": 10.0, "bitdial/a/50 %": 8.0, "bitdial/a/100 %": 5.0, "bitdial/b/0 %": 20.0, "p/int8": 10.5,
        "q/int8": 11.0, "p/bfloat16": 9.0,
    }  # fmt: skip
    ratios = {"0 %": 0.0, "50 %": 0.5, "100 %": 1.0}
    samples = {n: Samples(n, {i: [1e-3 * t * (1 + i)] for i in range(3)}) for n, t in times.items()}
    figures: dict[str, dict[str, Any]] = {}
    for name in times:
        contestant, _, last = name.rpartition("/")
        own = {"contestant": contestant, "precision": "int8", "ratio": ratios[last]} if last in ratios else None
        figures[name] = own or {"contestant": name, "precision": last}
        figures[name] |= samples[name].summary() | {"snr_db": 30.0}
    bench["peers.cell"].add_ratios(figures, samples)
    return figures


def test_ratios_and_gains(bench: dict[str, ModuleType]) -> None:
    cases = made_up_cases(bench)
    assert cases["bitdial/a/100 %"]["to_bitdial_0"] == pytest.approx(0.5)
    assert cases["bitdial/b/0 %"]["to_bitdial_0"] == pytest.approx(2.0)
    assert cases["bitdial/b/0 %"]["to_own_0"] == pytest.approx(1.0)
    assert cases["p/int8"]["to_int8_peer"] == pytest.approx(1.0) and cases["p/int8"]["to_own_0"] is None
    assert cases["q/int8"]["to_bitdial_0_and_int8_peer_are"] == ["bitdial/a/0 %", "p/int8"]
    row = {"cases": cases, "loads": {}, "settings": {"network": "test-net", "batch": 1, "threads": 1}}
    gains = bench["peers.tables"].gains(row, "bitdial/a")
    assert gains == {
        "speedup_50": pytest.approx(1.25), "speedup_100": pytest.approx(2.0), "half_gain": pytest.approx(0.4),
        "to_int8_peer": pytest.approx(10 / 10.5), "to_any_peer": pytest.approx(5 / 9),
    }  # fmt: skip
    assert bench["peers.tables"].gains(row, "bitdial/b")["half_gain"] is None
    assert bench["peers.tables"].gains(row, "p/int8") is None


def test_tables_of_made_up_rows(bench: dict[str, ModuleType]) -> None:
    tables = bench["peers.tables"]
    row = {"cases": made_up_cases(bench), "loads": {}, "settings": {"network": "test-net", "batch": 8, "threads": 2}}
    table = tables.latency_table("test-net", 2, {8: row})
    lines = table.markdown().splitlines()
    assert lines[0] == "**test-net, 2 threads**"
    assert "| p/int8 | 21.0* | 1.05 | 1.00 |" in lines  # three rounds only: marked
    assert len({line.count("|") for line in lines[2:]}) == 1
    gained = tables.gains_table([row])
    assert gained.rows[0][:4] == ("test-net, batch 8, 2 thr. bitdial/a", "1.25", "2.00", "40 %")
    assert tables.proof_table([row]).rows[0][-1] == "30.0"
    assert tables.failures([{"failed": {"x": "broken"}}, {"failed": {"x": "again"}}, {}]) == ["x left out: broken"]


def test_peers_alone_have_no_bitdial_ratio(bench: dict[str, ModuleType]) -> None:
    samples = {"p/int8": Samples("p/int8", {0: [1.0]})}
    figures = {"p/int8": {"contestant": "p/int8", "precision": "int8", **samples["p/int8"].summary()}}
    bench["peers.cell"].add_ratios(figures, samples)
    assert figures["p/int8"]["to_bitdial_0"] is None and figures["p/int8"]["to_int8_peer"] == 1.0
    json.dumps(figures, allow_nan=False)


def test_wrong_answers_are_found(bench: dict[str, ModuleType]) -> None:
    cell = bench["peers.cell"]
    exact = np.random.default_rng(0).standard_normal((2, 10)).astype(np.float32)

    class Liar:
        def ask(self, do: str, path: str, **arguments: Any) -> dict[str, Any]:
            np.save(path, exact[:, ::-1])
            return {}

    peers = {c.name: c for c in bench["peers.contestants"].PEERS}
    with pytest.raises(bench["peers.protocol"].PeerError, match="dB"):
        cell.check_output(Liar(), peers["onnxruntime/int8"], exact)
    assert cell.snr_db(exact, exact) == 200.0
    assert cell.snr_db(exact, 0.9 * exact) == pytest.approx(20.0, abs=0.1)


def test_rows_of_another_build_are_measured_again_if_asked(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    file = bench["results"].ResultFile(tmp_path / "x.json", "cpu_latency", {})
    needs = bench["cpu_latency"].needs_measuring
    row = file.put("cell", {}, {"extension": "a"})
    assert needs(file, None, "a", False)
    assert not needs(file, row, "a", True) and not needs(file, row, "b", False) and needs(file, row, "b", True)
    assert not needs(file, {**row, "failed": {"torch/float32 compiled": "no compiler"}}, "a", False)
    assert needs(file, {**row, "failed": {"bitdial/avx2": "no module"}}, "a", False)


@pytest.mark.slow
def test_end_to_end(
    bench: dict[str, ModuleType], no_data: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ResNet-20 with random weights, the reference engine beside torch; a second run measures nothing."""
    arguments = [
        "--networks", "resnet20", "--batches", "2", "--threads", "1", "--repeats", "2", "--engine", "reference",
        "--peers", "torch/float32,torch/bfloat16", "--cache", str(tmp_path / "cache"), "--results", str(tmp_path),
    ]  # fmt: skip
    main = bench["cpu_latency"].main
    main(arguments)
    kind = bench["machine"].describe_machine()["kind"]
    path = tmp_path / f"cpu_latency.{kind}.json"
    (row,) = bench["results"].read_rows(path, "cpu_latency").values()
    assert row["failed"] == {}
    assert list(row["cases"])[:2] == ["bitdial/reference/0 %", "bitdial/reference/25 %"] and len(row["cases"]) == 7
    assert row["cases"]["torch/float32"]["snr_db"] > 60 and row["cases"]["bitdial/reference/0 %"]["snr_db"] > 8
    assert row["cases"]["bitdial/reference/0 %"]["to_bitdial_0"] == 1.0
    assert all(case["repeats"] == 2 for case in row["cases"].values())
    before = path.read_bytes()
    out = capsys.readouterr().out
    assert "resnet20, 1 thread" in out and "torch/bfloat16" in out
    main(arguments)
    assert path.read_bytes() == before
    main([*arguments, "--markdown"])
    assert "| torch/float32 |" in capsys.readouterr().out


def test_plan_of_a_cell_is_json(bench: dict[str, ModuleType], no_data: None) -> None:
    options = bench["cpu_latency"].read_options(["--isa", "none", "--peers", "torch/float32"])
    settings = bench["cpu_latency"].cell_settings(options, options.contestants, Plan(), "resnet20", 1, 1)
    assert bench["results"].settings_hash(settings) and "torch" in settings["versions"]
    assert settings["contestants"]["torch/float32"][0] == "torch_peer"
