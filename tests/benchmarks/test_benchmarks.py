"""The benchmark commands: options, result files and resuming, machine description, tables. Figures here are made up."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitdial.errors import ConfigError, DataError, EngineError, OutputError
from bitdial.pipeline import prepare, quantize_prepared
from bitdial.quantization.config import QuantizeConfig

MODULES = (
    "machine", "results", "common", "measure", "accuracy_rows", "accuracy_table", "accuracy", "search", "shift",
    "single_layer", "artifact_size",
)  # fmt: skip


def cpuinfo(vendor: str, family: int, model: int, flags: str = "") -> str:
    one = (
        f"vendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: {model}\nmodel name\t: Test CPU\nflags\t: {flags}\n"
    )
    return f"processor\t: 0\n{one}\nprocessor\t: 1\n{one}"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (cpuinfo("AuthenticAMD", 25, 17, "avx2 avx512_vnni"), "amd-zen4"),
        (cpuinfo("AuthenticAMD", 25, 1, "avx2"), "amd-zen3"),
        (cpuinfo("AuthenticAMD", 26, 2, "avx2 avx512_vnni"), "amd-zen5"),
        (cpuinfo("AuthenticAMD", 23, 49, "avx2"), "amd-zen2"),
        (cpuinfo("AuthenticAMD", 99, 1, "avx2 avx512f"), "amd-avx512"),
        (cpuinfo("GenuineIntel", 6, 143, "avx2 avx512_vnni amx_int8"), "intel-sapphire-rapids"),
        (cpuinfo("GenuineIntel", 6, 85, "avx2 avx512f avx512_vnni"), "intel-cascade-lake"),
        (cpuinfo("GenuineIntel", 6, 85, "avx2 avx512f"), "intel-skylake"),
        (cpuinfo("GenuineIntel", 6, 9999, "avx2 amx_int8"), "intel-amx"),
        ("processor : 0\nCPU implementer : 0x41\nFeatures : asimd asimddp i8mm\n", "arm-i8mm"),
    ],
)
def test_machine_kind(bench: dict[str, ModuleType], text: str, kind: str) -> None:
    described = bench["machine"].describe_machine(text)
    assert described["kind"] == kind
    assert described["cores"] >= 1 and described["threads"] >= 1
    json.dumps(described, allow_nan=False)


def test_this_machine_has_a_kind_that_suits_a_file_name(bench: dict[str, ModuleType]) -> None:
    kind = bench["machine"].describe_machine()["kind"]
    assert kind and all(c.isalnum() or c in "-." for c in kind)
    memory = bench["machine"].resident_memory()
    assert 0 < memory["now"] <= memory["peak"]


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=5))
def test_settings_hash_ignores_the_order_of_keys(bench: dict[str, ModuleType], settings: dict[str, Any]) -> None:
    digest = bench["results"].settings_hash
    assert digest(settings) == digest(dict(reversed(settings.items())))
    assert digest(settings) != digest({**settings, "one more": 1})


class WrongEngine:
    """Runs a program, and is off by one step in one number of the first batch."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def run(self, x: torch.Tensor, ratio: float) -> torch.Tensor:
        outputs: torch.Tensor = self.engine.run(x, ratio).clone()
        outputs.view(-1)[3] += 1e-3
        return outputs


def test_figures_are_those_of_the_reference_engine(bench: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever engine evaluates, and one that differs in a single number is found out."""
    measure = bench["measure"]
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(),
                                torch.nn.Linear(16 * 64, 5)).eval()  # fmt: skip
    pixels = torch.randn(8, 3, 8, 8)
    config = QuantizeConfig(target="paper", ratios=(0.0, 1.0), selector="greedy", lower_first_last=True)
    program = quantize_prepared(prepare(model, [pixels], QuantizeConfig()), config)
    images = SimpleNamespace(labels=np.zeros(8, np.int64))
    monkeypatch.setattr(measure, "batches", lambda given: [(pixels[:5], None), (pixels[5:], None)])
    exact = measure.reference_outputs(program, pixels, 1.0)
    outputs, now = measure.TestBench(model, images).outputs(program, 1.0)
    assert now and np.array_equal(outputs, exact)
    digests = [measure.program_digest(program, index) for index in range(2)]
    layer = next(layer for layer in program.layers.values() if layer.low_weight is not None)
    with monkeypatch.context() as patch:  # low weights of their own are part of what is run low
        patch.setattr(layer, "low_weight", -layer.low_weight)
        assert [measure.program_digest(program, index) == digests[index] for index in range(2)] == [True, False]
    right = measure.make_engine
    monkeypatch.setattr(measure, "make_engine", lambda given: WrongEngine(right(given)))
    with pytest.raises(EngineError, match="differ at 100 %"):
        measure.TestBench(model, images).outputs(program, 1.0)


def test_rows_are_measured_once_per_settings(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    results = bench["results"]
    path = tmp_path / "deep" / "x.json"
    calls: list[int] = []

    def measure() -> dict[str, Any]:
        calls.append(1)
        return {"accuracy": len(calls) / 10}

    def file(**options: Any) -> Any:
        return results.ResultFile(path, "test", {"cpu": "test"}, **options)

    first, now = file().measure("row", {"images": 5}, measure)
    assert now and path.exists()
    again, now = file().measure("row", {"images": 5}, measure)  # a new process finds the row
    assert not now and again == json.loads(json.dumps(first)) and len(calls) == 1
    _, now = file().measure("row", {"images": 6}, measure)
    assert now and len(calls) == 2
    _, now = file(fresh=True).measure("row", {"images": 6}, measure)
    assert now and len(calls) == 3
    assert list(path.parent.iterdir()) == [path]


def test_rows_of_other_sources_are_told_apart(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    file = bench["results"].ResultFile(path, "test", {})
    file.put("row", {"a": 1}, {})
    content = json.loads(path.read_text())
    content["rows"]["row"]["code"] = "0" * 16
    path.write_text(json.dumps(content))
    file = bench["results"].ResultFile(path, "test", {})
    assert file.stale() == ["row"]
    assert file.find("row", {"a": 1}) is not None
    assert file.find("row", {"a": 1}, changed=True) is None


def test_an_interrupted_row_leaves_the_others(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    def interrupted() -> dict[str, Any]:
        raise KeyboardInterrupt

    path = tmp_path / "x.json"
    file = bench["results"].ResultFile(path, "test", {})
    file.put("first", {}, {"accuracy": 0.5})
    with pytest.raises(KeyboardInterrupt):
        file.measure("second", {}, interrupted)
    assert list(bench["results"].read_rows(path, "test")) == ["first"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"benchmark": "other", "format": 1, "rows": {}}', '{"rows": 3}'])
def test_a_file_of_another_kind_is_refused(bench: dict[str, ModuleType], tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(DataError, match="x.json"):
        bench["results"].ResultFile(path, "test", {})
    bench["results"].ResultFile(path, "test", {}, fresh=True)


def test_an_unwritable_place_is_named(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="--results"):
        bench["results"].ResultFile(tmp_path / "file" / "x.json", "test", {}).put("row", {}, {})


def test_options(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    common = bench["common"]
    parser = common.make_parser("test", "", common.NETWORKS, None)
    arguments = ["--networks", "vgg,resnet20", "--images", "50", "--population", "4", "--results", str(tmp_path)]
    options = common.read_options(parser, arguments, common.NETWORKS)
    assert options.networks == ("vgg", "resnet20") and options.images == 50 and options.results == tmp_path
    config = options.config(seed=3)
    assert (config.population, config.seed) == (4, 3)
    assert config.generations == QuantizeConfig().generations
    for wrong in (["--networks", "lenet"], ["--networks", ","], ["--images", "0"], ["--threads", "-1"]):
        with pytest.raises(ConfigError):
            common.read_options(parser, wrong, common.NETWORKS)


def test_missing_data_end_a_command_loudly(
    bench: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BITDIAL_DATA", str(tmp_path / "nowhere"))
    for name in ("accuracy", "search", "shift", "single_layer", "artifact_size"):
        main = bench[name].main
        with pytest.raises(SystemExit) as ended:
            bench["common"].run_command(lambda main=main: main(["--results", str(tmp_path / "results")]))
        assert ended.value.code == 2
        assert "DATA FOLDER MISSING" in capsys.readouterr().err


def test_rows_change_one_factor_and_are_valid(bench: dict[str, ModuleType]) -> None:
    rows = bench["accuracy_rows"].accuracy_rows()
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    assert names[:4] == ["baseline", "greedy", "random", "naive"]
    for name in ("group_size=8", "group_size=32", "extraction=dynamic", "bias_correction=off", "low_bits=5", "crude"):
        assert name in names
    default = QuantizeConfig()
    for row in rows:
        config = QuantizeConfig(**{"ratios": row.ratios, "seed": row.seed, **row.changes})
        assert all(getattr(config, setting) == value for setting, value in row.changes.items())
        assert row.name == "crude" or all(getattr(default, setting) != value for setting, value in row.changes.items())
        if row.name != "crude":
            assert len(row.changes) <= 1
    assert [row.name for row in bench["accuracy_rows"].choose_rows("random,baseline")] == ["baseline", "random"]
    with pytest.raises(ConfigError, match="nosuch"):
        bench["accuracy_rows"].choose_rows("baseline,nosuch")


def test_preparations_are_shared_only_where_layout_and_calibration_agree(bench: dict[str, ModuleType]) -> None:
    key = bench["accuracy_rows"].preparation_key
    base = key(QuantizeConfig(), 0)
    assert key(QuantizeConfig(selector="random", low_bits=5, seed=7), 0) == base
    assert key(QuantizeConfig(), 1) != base
    for changes in ({"group_size": 8}, {"sort_channels": False}, {"calibration": "minmax"}, {"keep_8bit": ("x",)}):
        assert key(QuantizeConfig(**changes), 0) != base


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_paired_difference(bench: dict[str, ModuleType], flags: list[bool], random: Any) -> None:
    measure = bench["measure"]
    a = np.array(flags)
    b = np.array([random.random() < 0.5 for _ in flags])
    assert (measure.unpack_flags(measure.pack_flags(a), len(a)) == a).all()
    mean, error = measure.paired_difference(a, b)
    assert mean == pytest.approx(sum(map(int, a)) / len(a) - sum(map(int, b)) / len(b))
    won, lost = int((a & ~b).sum()), int((b & ~a).sum())
    if len(a) > 1:
        expected = ((won + lost) - (won - lost) ** 2 / len(a)) / (len(a) - 1) / len(a)
        assert error == pytest.approx(expected**0.5)
    assert measure.paired_difference(a, a) == (0.0, 0.0)


def made_up_row(bench: dict[str, ModuleType], accuracies: dict[float, float], n: int = 100) -> dict[str, Any]:
    """TEST DATA: a row as in a result file, with made-up figures."""
    entries = []
    for ratio, accuracy in accuracies.items():
        flags = np.arange(n) < round(accuracy * n)
        entries.append(
            {
                "ratio": ratio,
                "accuracy": accuracy,
                "to_float": accuracy - 0.9,
                "to_float_standard_error": 0.01,
                "correct": bench["measure"].pack_flags(flags),
            }
        )
    return {"ratios": entries, "samples": n, "settings": {}}


def test_markdown_of_made_up_rows(bench: dict[str, ModuleType]) -> None:
    curve = {0.0: 0.9, 0.25: 0.89, 0.5: 0.88, 0.75: 0.87, 1.0: 0.86}
    networks = {
        "test-net": {
            "float32": {"accuracy": 0.9, "samples": 100, "settings": {}},
            "baseline": made_up_row(bench, curve),
            "baseline.seed1": made_up_row(bench, {**curve, 0.5: 0.86}),
            "greedy": made_up_row(bench, {**curve, 0.5: 0.85}),
            "low_bits=5": made_up_row(bench, {0.0: 0.9, 0.5: 0.9, 1.0: 0.89}),
        },
        "other-test-net": {"float32": {"accuracy": 0.5, "samples": 100, "settings": {}}},
    }
    lines = bench["accuracy_table"].markdown(networks, "test data").splitlines()
    assert lines[0] == "| top-1, % | test-net | other-test-net |"
    assert "| float32 | 90.00 | 50.00 |" in lines
    assert "| 75 % low | 87.00 | - |" in lines
    assert "| low_bits 5: 50 / 100 % | 90.00 / 89.00 | - |" in lines
    assert "| 100 %, to float | -4.00 ± 1.00 | - |" in lines
    assert any("mean over seeds" in line and "87.00 ± 1.00 (n=2)" in line for line in lines)
    assert any("- greedy, 50 %, paired" in line and "+3.00" in line for line in lines)
    assert not any("selector random: " in line for line in lines), "rows without a figure are left out"
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_nesting_table_of_made_up_rows(bench: dict[str, ModuleType]) -> None:
    def row(fitness: float, accuracy: float) -> dict[str, Any]:
        return {**made_up_row(bench, {0.3: accuracy}), "fitness": [fitness]}

    pairs = [(row(0.5, 0.8), row(0.4, 0.9)), (row(0.7, 0.8), row(0.6, 0.9))]
    assert bench["search"].nesting_rows(pairs) == [
        ["30 %", "0.6000 ± 0.1000", "0.5000 ± 0.1000", "0.1000 ± 0.0000", "80.00 ± 0.00", "90.00 ± 0.00",
         "-10.00 ± 0.00"]
    ]  # fmt: skip


def test_changed_pixels(bench: dict[str, ModuleType]) -> None:
    shift = bench["shift"]
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    assert (shift.changed_pixels(pixels, "clean") == pixels).all()
    assert (shift.changed_pixels(pixels, "dimmed x 0.5") == np.rint(pixels / 2.0)).all()
    noisy = shift.changed_pixels(np.full((4, 32, 32, 3), 128, np.uint8), "noise, sigma 8").astype(float)
    assert noisy.std() == pytest.approx(8.0, rel=0.05)
    flat = shift.changed_pixels(pixels, "contrast x 0.6").astype(float)
    assert np.allclose(flat.mean(axis=(1, 2, 3)), pixels.mean(axis=(1, 2, 3)), atol=0.5)
    assert flat.std() == pytest.approx(0.6 * pixels.astype(float).std(), rel=0.05)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=12), st.floats(0, 1))
def test_lowest_takes_the_smallest_scores(bench: dict[str, ModuleType], scores: list[float], share: float) -> None:
    macs = np.full(len(scores), 3)
    mask = bench["single_layer"].lowest(np.array(scores), macs, share)
    assert abs(mask.mean() - share) <= 0.5 / len(scores) + 1e-9
    if mask.any() and not mask.all():
        assert np.array(scores)[mask].max() <= np.array(scores)[~mask].min()


@pytest.mark.slow
@pytest.mark.needs_data
def test_accuracy_end_to_end(bench: dict[str, ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fifty images, a tiny search; the shared preparation gives what quantizing from scratch gives."""
    import torch

    import bitdial
    from bitdial.engines.reference.engine import ReferenceEngine

    common = bench["common"]
    arguments = ["--networks", "resnet20", "--images", "50", "--population", "3", "--generations", "1"]
    arguments += ["--results", str(tmp_path), "--rows", "baseline,greedy,low_bits=5"]
    bench["accuracy"].main(arguments)
    kind = bench["machine"].describe_machine()["kind"]
    path = tmp_path / f"accuracy.resnet20.{kind}.json"
    rows = bench["results"].read_rows(path, "accuracy")
    assert set(rows) == {"float32", "baseline", "greedy", "low_bits=5"}
    assert [e["ratio"] for e in rows["baseline"]["ratios"]] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert rows["greedy"]["prepare_shared"] and 0.0 not in rows["greedy"]["evaluated"]
    assert rows["baseline"]["ratios"][0]["agreement"] == 1.0
    assert rows["float32"]["accuracy"] > 0.7 and rows["low_bits=5"]["ratios"][2]["accuracy"] > 0.7
    before = path.read_bytes()
    capsys.readouterr()
    bench["accuracy"].main(arguments)
    assert path.read_bytes() == before, "a second run measures nothing"
    assert "resnet20" in capsys.readouterr().out
    # The same configuration from scratch, run without the benchmark's code.
    config = QuantizeConfig(target="paper", selector="greedy", low_bits=4, population=3, generations=1)
    model = bitdial.quantize(common.trained_network("resnet20"), common.calibration_images(), config)
    engine = ReferenceEngine(model.program, check_finite=False)
    images = common.test_images(50)
    x, labels = torch.from_numpy(images.array()), images.labels
    for entry in rows["greedy"]["ratios"]:
        right = engine.run(x, entry["ratio"]).argmax(1).numpy() == labels
        assert entry["accuracy"] == pytest.approx(right.mean())
        assert (bench["measure"].unpack_flags(entry["correct"], 50) == right).all()
