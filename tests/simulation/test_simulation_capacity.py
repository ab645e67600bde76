"""Fleet sizes, bent traces, the picture and the command."""

from __future__ import annotations

import json

import numpy as np
import pytest
import typer

from bitdial.cli.simulate import simulate as command
from bitdial.errors import ConfigError, DataError
from bitdial.loadtest import arrivals
from bitdial.serving.control import ServiceTable, Settings
from bitdial.serving.control.policies import Scripted
from bitdial.simulation import Fleet, Load, Noise, Sizing, machines_saved, simulate, smallest_fleet, summarize
from bitdial.simulation.shaping import overload

TABLE = ServiceTable((0.0, 0.5, 1.0), (1,), ((0.010,), (0.008,), (0.005,)), (0.90, 0.895, 0.87))
WANTED = Settings(slo=0.06, max_batch=1)


def poisson(rate: float, n: int, seed: int = 0) -> np.ndarray:
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, n))


@pytest.mark.parametrize("policy", ["fixed:0", "fixed:1", "lookahead"])
def test_the_fleet_found_is_the_smallest(policy):
    load, sizing = Load(poisson(1000, 2500)), Sizing(attainment=0.99)
    found = smallest_fleet(TABLE, WANTED, policy, load, sizing)
    assert found.replicas is not None
    for replicas in range(max(1, found.replicas - 3), found.replicas + 1):
        outcome = simulate(TABLE, WANTED, policy, load, Fleet(replicas=replicas))
        assert sizing.met(summarize(outcome, TABLE, WANTED.slo)) == (replicas == found.replicas)
    assert len(found.tried) < 16


def test_the_dial_saves_machines_until_accuracy_is_asked_for():
    load = Load(poisson(1000, 2500))
    fixed = smallest_fleet(TABLE, WANTED, "fixed:0", load, Sizing(attainment=0.99))
    dial = smallest_fleet(TABLE, WANTED, "lookahead", load, Sizing(attainment=0.99))
    accurate = smallest_fleet(TABLE, WANTED, "lookahead", load, Sizing(attainment=0.99, accuracy=0.895))
    assert fixed.replicas is not None and dial.replicas is not None and accurate.replicas is not None
    assert dial.replicas < accurate.replicas <= fixed.replicas
    saved = machines_saved(fixed, dial)
    assert saved == pytest.approx(1 - dial.replicas / fixed.replicas) and saved > 0.3
    assert accurate.summary.accuracy >= 0.895


def test_a_fleet_that_cannot_be_found():
    found = smallest_fleet(TABLE, WANTED, "fixed:0", Load(poisson(1500, 1000)), Sizing(attainment=0.99, most=3))
    assert found.replicas is None and max(found.tried) == 3
    assert machines_saved(found, found) is None
    assert json.dumps(found.as_json())


def test_a_trace_is_bent_to_an_overload():
    times = np.sort(np.concatenate([poisson(5, 2000, 1), 100 + poisson(15, 1000, 2)]))
    bent = overload(times, 80.0, 0.2, 1.0)
    counts = np.bincount(bent.times.astype(int))
    assert 0.2 <= bent.share < 0.3 and bent.share == pytest.approx((counts > 80).mean(), abs=0.02)
    assert bent.peak >= counts.max() / 80 - 1e-9
    assert np.allclose(np.diff(bent.times) * bent.speed, np.diff(times))
    with pytest.raises(ConfigError, match="once"):
        overload(np.zeros(5), 80.0, 0.2, 1.0)


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """run("--poisson", "100", ...) -> (text, error text); the table is in the folder."""
    (tmp_path / "times.json").write_text(json.dumps(TABLE.as_json()))
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    app.command()(command)

    def run(*arguments):
        capsys.readouterr()
        code = app(args=list(arguments), standalone_mode=False)
        captured = capsys.readouterr()
        assert not code or code == 1
        return captured.out, captured.err

    return run


def test_the_command_compares_and_writes(run, tmp_path):
    arguments = ["times.json", "--poisson", "120", "--duration", "5s", "--slo-ms", "60", "--compare"]
    out, _ = run(*arguments, "--json", "-o", "all.json")
    content = json.loads(out)
    policies = [row["policy"] for row in content["rows"]]
    assert policies == ["planned", "lookahead", "slackfit", "ladder", "fixed:0", "fixed:0.5", "fixed:1", "oracle"]
    assert json.loads((tmp_path / "all.json").read_text())["rows"] == content["rows"]
    assert sum(row["arrived"] for row in content["series"]["ladder"]) == content["load"]["requests"]
    text, _ = run(*arguments)
    assert "oracle" in text and "events in" in text and "2.00x" in text


def test_the_command_sizes_a_fleet(run):
    out, _ = run("times.json", "--poisson", "500", "--duration", "3s", "--slo-ms", "60", "--replicas", "auto", "--json")
    sizing = json.loads(out)["sizing"]
    assert [fleet["policy"] for fleet in sizing["fleets"]] == ["fixed:0", "planned"]
    assert sizing["machines_saved"] > 0.2


def test_the_command_records_and_replays(run, tmp_path):
    run("times.json", "--step", "50:1s,180:2s", "--slo-ms", "60", "--record", "run.jsonl", "-q")
    out, _ = run("--replay", "run.jsonl")
    assert "all decisions come out the same" in out
    lines = (tmp_path / "run.jsonl").read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if '"index": 0' in line)
    lines[at] = lines[at].replace('"index": 0', '"index": 1')
    (tmp_path / "run.jsonl").write_text("\n".join(lines))
    out, _ = run("--replay", "run.jsonl")
    assert "1 decisions differ" in out


def test_the_oracle_s_schedule_is_written(run, tmp_path):
    run(
        "times.json",
        "--poisson",
        "120",
        "--duration",
        "3s",
        "--slo-ms",
        "60",
        "--policy",
        "oracle",
        "--save-schedule",
        "s.json",
    )
    script = Scripted.read(str(tmp_path / "s.json"))
    times = arrivals.poisson(120, 3.0, 0)
    assert len(script.indices) == times.size
    outcome = simulate(TABLE, WANTED, lambda: script, Load(times), noise=Noise(batch=0.0))
    assert summarize(outcome, TABLE, WANTED.slo).attainment == 1.0
    assert set(script.indices) == {0, 1, 2}


def test_the_command_plays_a_trace(run, tmp_path):
    times = np.sort(np.concatenate([poisson(5, 400, 1), 30 + poisson(15, 200, 2)]))
    (tmp_path / "trace.csv").write_text("arrival_s\n" + "\n".join(f"{t:.6f}" for t in times))
    out, _ = run("times.json", "--trace", "trace.csv", "--overload", "20%", "--slo-ms", "60", "--json")
    assert "times as fast" in json.loads(out)["load"]["text"]
    out, _ = run(
        "times.json", "--trace", "trace.csv", "--speed", "4", "--slo-ms", "60", "--json", "--policy", "fixed:1"
    )
    assert json.loads(out)["load"]["requests"] == 600


def test_the_picture(run, tmp_path):
    pytest.importorskip("matplotlib")
    run("times.json", "--step", "50:2s,180:2s", "--slo-ms", "60", "--compare", "--plot", "run.svg", "-q")
    first = (tmp_path / "run.svg").read_bytes()
    run("times.json", "--step", "50:2s,180:2s", "--slo-ms", "60", "--compare", "--plot", "run.svg", "-q")
    assert (tmp_path / "run.svg").read_bytes() == first
    assert b"p99 latency, ms" in first and b"lookahead" in first


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (["times.json"], ConfigError, "one of --trace"),
        (["times.json", "--poisson", "5", "--step", "5:1s"], ConfigError, "one of --trace"),
        (["times.json", "--poisson", "5", "--speed", "2"], ConfigError, "bend a trace"),
        (["times.json", "--poisson", "5", "--replicas", "many"], ConfigError, "--replicas"),
        (["times.json", "--poisson", "5", "--policy", "best"], ConfigError, "unknown"),
        (
            ["times.json", "--poisson", "5", "--replicas", "auto", "--plot", "a.svg", "--duration", "1s"],
            ConfigError,
            "--plot",
        ),
        (["times.json", "--poisson", "5", "--save-schedule", "s.json", "--duration", "1s"], ConfigError, "--compare"),
        (["none.json", "--poisson", "5"], DataError, "none.json"),
        (["--replay", "none.jsonl"], DataError, "none.jsonl"),
        ([], ConfigError, "--save-table"),
    ],
)
def test_the_command_says_what_is_wrong(run, arguments, error, said):
    with pytest.raises(error, match=said):
        run(*arguments)
