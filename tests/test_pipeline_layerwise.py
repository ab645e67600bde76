"""Layer-wise compilation: two runs counted, budgets, bfloat16 layers, conversions, the choice of a fusion, both engines."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bitdial
from bitdial.artifact import from_bytes, to_bytes
from bitdial.engines.base import available_engines, create_engine
from bitdial.engines.reference.executor import Executor
from bitdial.engines.reference.layer_metrics import CarriedNoise, Carrier, float_run, layer_outputs
from bitdial.errors import ArtifactError, BudgetError, CalibrationError, ConfigError, ExportError, GraphError
from bitdial.graph import interpreter
from bitdial.graph.bfloat16 import from_bits, rounded, to_bits
from bitdial.graph.capture import capture
from bitdial.graph.ir import Graph
from bitdial.graph.passes import add_options, fold, fused, optimize
from bitdial.graph.verify import verify
from bitdial.pipeline import layerwise_analysis
from bitdial.pipeline.layerwise import Compilation, compile_layerwise
from bitdial.pipeline.layerwise_analysis import Analysis, analyse
from bitdial.quantization.borders import best_fusion, count_borders, with_precisions
from bitdial.quantization.program import Program
from bitdial.selection.layerwise import ALL_METRICS, PRECISIONS, LayerwiseConfig

CONFIG = LayerwiseConfig(budget_size="85%", precisions=PRECISIONS, calibration_images=32, batch_size=16, patches=128)


@pytest.fixture(scope="module")
def images(helpers: Any) -> Tensor:
    out: Tensor = helpers.images(32, seed=3)
    return out


@pytest.fixture(scope="module")
def graph(conv_net: nn.Module, images: Tensor) -> Graph:
    return capture(conv_net, (images[:2],))


def test_a_plan_keeps_low_weights_of_their_own(
    graph: Graph, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the choice of shifts stores for an encoding goes into every program with that encoding, and into the size."""
    choose = layerwise_analysis.choose_shifts

    def storing(program: Program, samples: Any, *rest: Any) -> Any:
        scores = choose(program, samples, *rest)
        for name in samples:
            layer = program.layers[name]
            layer.low_weight = np.full_like(layer.weight, 3)
        return scores

    monkeypatch.setattr(layerwise_analysis, "choose_shifts", storing)
    config = CONFIG.updated(dial=True, precisions=("int8", "low"))
    analysis = analyse(graph, [images], config)
    low = [n for n in analysis.layers if "low" in analysis.possible(n)]
    plan = dict.fromkeys(analysis.layers, "int8") | dict.fromkeys(low, "low")
    for _ in range(2):  # chosen, then known
        program = analysis.program(plan)
        for name, layer in program.layers.items():
            assert (layer.low_weight is not None) == (name in low) and (layer.low_weight is None or (layer.low_weight == 3).all())
    options = next(o for o in Compilation(analysis, config).options if o.name == low[0]).options
    sizes = {o.precision: o.size for o in options}
    assert sizes["low"] > sizes["int8"]


@pytest.fixture(scope="module")
def analysis(graph: Graph, images: Tensor) -> Analysis:
    return analyse(graph, [images], CONFIG)


def ops(program: Program) -> Counter[str]:
    return Counter(node.op for node in program.graph.nodes)


def test_the_network_runs_exactly_twice(graph: Graph, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sample passes every layer once in float and once in integers, whatever is planned afterwards."""
    samples: Counter[tuple[str, str]] = Counter()
    evaluate, step = interpreter.evaluate_node, Executor.step

    def count_float(node: Any, operands: Any, batch: int) -> Tensor:
        if node.op in ("conv", "linear"):
            samples["float", node.name] += batch
        return evaluate(node, operands, batch)

    def count_integers(self: Executor, one: Any, values: Any, settings: Any, batch: int) -> Tensor:
        if one.operation in ("conv", "linear"):
            samples["quantized", one.name] += batch
        return step(self, one, values, settings, batch)

    monkeypatch.setattr(interpreter, "evaluate_node", count_float)
    monkeypatch.setattr(Executor, "step", count_integers)
    compiled = compile_layerwise(graph, [images], CONFIG)
    layers = [e.name for e in compiled.analysis.evidence]
    assert samples == {(run, name): len(images) for run in ("float", "quantized") for name in layers}
    assert compiled.program.provenance["layerwise"]["inferences"] == {"float": 1, "quantized": 1, "finishing": 0}


def test_fused_graphs_compute_values_of_the_unfused_one(graph: Graph, images: Tensor) -> None:
    base = fold(graph)
    default, origins = fused(base)
    assert str(default) == str(optimize(graph))
    seen: list[dict[str, Tensor]] = [{}, {}]
    for own, kept in zip((base, default), seen, strict=True):
        interpreter.run_graph(own, [images[:3]], observe=kept.__setitem__)
    assert all(torch.equal(value, seen[0][origins[name]]) for name, value in seen[1].items())


def test_evidence_tells_precisions_apart(analysis: Analysis) -> None:
    for e in analysis.evidence:
        for noise in (e.weight_noise, e.activation_noise, e.added_noise, e.propagated_noise):
            own = [noise[p] for p in e.precisions]
            assert own == sorted(own, reverse=True) and own[-1] == 0.0 and own[0] > 0.0
        assert e.output_noise > 0.0 and e.output_error > 0.0
    capable = [e for e in analysis.evidence if "low" in e.precisions]
    assert len(capable) == len(analysis.evidence) - 1  # all but the depthwise convolution


class Branches(nn.Module):
    """Residual branches of the same kind, which count more and less."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.branches = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(4))
        self.head = nn.Linear(16, 5)
        with torch.no_grad():
            for branch, scale in zip(self.branches, (3.0, 1.0, 0.3, 0.1), strict=True):
                branch.weight *= scale
                branch.bias *= scale

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for branch in self.branches:
            x = x + torch.relu(branch(x))
        return self.head(x.mean(dim=(2, 3)))


def test_carried_noise_is_measured_at_the_places_of_the_float_run(graph: Graph, images: Tensor) -> None:
    base = fold(graph)
    batches = [[images[:20]], [images[20:]]]
    run = float_run(base, batches, {}, {}, patch_count=40, value_count=16, seed=3)
    values: list[dict[str, Tensor]] = [{}, {}]
    for batch, kept in zip(batches, values, strict=True):
        interpreter.run_graph(base, batch, observe=kept.__setitem__)
    for name in run.patches:
        node = base.node(name)
        assert node.weight is not None
        weight, groups = base.constants[node.weight], node.attrs.get("groups", 1)
        order = np.random.default_rng(0).permutation(values[0][node.inputs[0]].shape[1 if node.op == "conv" else -1])
        if groups > 1:
            order = np.arange(len(order))
        own = weight[:, order] if groups == 1 else weight
        found = {}
        for noise in (0.0, 1.0):
            carried = CarriedNoise(Carrier(node, own, groups, order), run)
            for number, kept in enumerate(values):
                x = kept[node.inputs[0]]
                axis = 1 if node.op == "conv" else x.dim() - 1
                carried.add((x + noise * x).index_select(axis, torch.from_numpy(order)), number)
            found[noise] = carried.mean_square
        # Noise equal to the signal is carried as the signal is.
        exact = layer_outputs(weight, run.patches[name], groups)
        assert found[0.0] == 0.0 and found[1.0] == pytest.approx(float(np.square(exact).mean()), rel=1e-4)


def test_propagated_noise_is_what_a_layer_does_to_the_output(helpers: Any) -> None:
    """On average over sets of images: of one it is off by up to twenty times, whatever the number of patches, since the mean over
    the map adds what errors of neighbouring places have in common, and that is no noise."""
    model = Branches().eval()
    shares: list[list[float]] = []  # told over measured: of every layer alone, then of all together
    for seed in (3, 4, 5, 6, 7):
        images = helpers.images(32, seed=seed)
        config = LayerwiseConfig(budget_size="80%", calibration_images=len(images), patches=256)
        analysis = analyse(model, [images], config)
        with torch.no_grad():
            exact = model(images)

        def noise(low: set[str], analysis: Analysis = analysis, images: Tensor = images, exact: Tensor = exact) -> float:
            program = analysis.program({n: "low" if n in low else "float32" for n in analysis.layers})
            outputs = create_engine(program, "reference").run(images, program.ratios[-1])
            return float((outputs - exact).square().sum() / exact.square().sum())

        told = {e.name: e.propagated_noise["low"] for e in analysis.evidence}
        together = sum(told.values()) / noise(set(analysis.layers))
        shares.append([*(told[n] / noise({n}) for n in analysis.layers), together])
        branches = analysis.layers[1:5]
        assert [told[n] for n in branches] == sorted((told[n] for n in branches), reverse=True)
        local = {e.name: e.added_noise["low"] for e in analysis.evidence}
        assert max(local[n] for n in branches) < 30 * min(local[n] for n in branches)  # local metrics hardly tell
    *alone, together = np.exp(np.log(shares).mean(axis=0))
    assert len(alone) == 6 and all(0.2 < share < 5.0 for share in alone), alone
    assert together == pytest.approx(1.0, rel=0.7)


def test_programs_near_the_float_network_in_the_order_of_their_precisions(
    analysis: Analysis, conv_net: nn.Module, images: Tensor, helpers: Any
) -> None:
    with torch.no_grad():
        exact = conv_net(images)
    snr = []
    for precision in PRECISIONS:
        program = analysis.program(dict.fromkeys(analysis.layers, precision))
        snr.append(helpers.snr(exact, create_engine(program, "reference").run(images, program.ratios[-1])))
    assert snr == sorted(snr) and snr[0] > 5 and snr[1] > 25 and snr[2] > 40 and snr[3] > 100


@pytest.mark.parametrize("metric", [*ALL_METRICS, "combined"])
def test_size_budgets_are_met_by_the_file_itself(metric: str, analysis: Analysis) -> None:
    for budget in ("85%", 30_500.0):
        config = CONFIG.updated(metric=metric, budget_size=budget)
        compilation = Compilation(analysis, config)
        compiled = compilation.run()
        assert compilation.size_limit is not None
        size = len(to_bytes(compiled.program))
        assert size <= compilation.size_limit and compiled.reached["size"] == pytest.approx(size, rel=0.02)
        assert {"low"} < set(compiled.plan.precisions.values())


def test_latency_budgets_are_met_and_refused(analysis: Analysis) -> None:
    config = LayerwiseConfig(budget_latency="88%", calibration_images=32)
    compiled = Compilation(analysis, config).run()
    assert 0.75 < compiled.reached["latency_share_of_int8"] <= 0.88
    with pytest.raises(BudgetError, match=r"latency budget.*fastest plan.*75") as caught:
        Compilation(analysis, config.updated(budget_latency="70%")).run()
    assert caught.value.nearest > 0


def test_a_size_out_of_reach_is_refused_with_the_smallest_file(analysis: Analysis) -> None:
    with pytest.raises(BudgetError, match="smallest file") as caught:
        Compilation(analysis, CONFIG.updated(budget_size=2000)).run()
    nearest = int(caught.value.nearest)
    reachable = Compilation(analysis, CONFIG.updated(budget_size=nearest + 200)).run()
    assert len(to_bytes(reachable.program)) <= nearest + 200


def test_an_accuracy_floor_is_met_or_refused(analysis: Analysis) -> None:
    def accuracy(program: Program) -> float:
        return 0.5 + 0.4 * (1 - program.low_share(len(program.ratios) - 1))

    config = LayerwiseConfig(accuracy_floor=0.8, calibration_images=32)
    compiled = Compilation(analysis, config).run(accuracy)
    assert accuracy(compiled.program) >= 0.8 and "low" in compiled.plan.precisions.values()
    with pytest.raises(BudgetError, match=r"accuracy floor.*90\.00 %"):
        Compilation(analysis, config.updated(accuracy_floor=0.95)).run(accuracy)
    with pytest.raises(BudgetError, match="within the other budgets"):
        Compilation(analysis, config.updated(accuracy_floor=0.89, budget_latency="78%")).run(accuracy)
    with pytest.raises(ConfigError, match="validation"):
        Compilation(analysis, config).run()


@pytest.mark.parametrize("fusion", ["best", "none", "isolated"])
def test_both_engines_give_the_same_bits(fusion: str, analysis: Analysis, images: Tensor) -> None:
    if available_engines()["cpu"]:
        pytest.skip(f"CPU ENGINE MISSING: {available_engines()['cpu']}")
    names = analysis.layers
    mixed = {name: PRECISIONS[i % 4] for i, name in enumerate(names)}
    for precisions in (dict.fromkeys(names[::2], "low"), mixed):
        compilation = Compilation(analysis, CONFIG.updated(fusion=fusion))
        program = from_bytes(to_bytes(compilation.build(precisions)))
        reference = create_engine(program, "reference").run(images)
        assert torch.equal(reference, create_engine(program, "cpu", kernels="fixed").run(images))
        assert float(reference.std()) > 0.01


def test_the_dial_can_stay(analysis: Analysis) -> None:
    plan = {name: "low" if i < 3 else "int8" for i, name in enumerate(analysis.layers)}
    kept = Compilation(analysis, CONFIG.updated(dial=True, budget_size=1e6)).build(plan)
    assert kept.ratios == [0.0, 1.0] and kept.eligible_share(1) == 1.0 and kept.low_share(0) == 0.0
    alone = Compilation(analysis, CONFIG.updated(budget_size=1e6)).build(plan)
    assert alone.ratios == [1.0] and len(to_bytes(alone)) < len(to_bytes(kept))
    described = create_engine(alone, "reference").describe()
    shown = {layer["name"]: layer["precision"] for layer in described["layers"]}
    assert [shown[n].startswith("low at every ratio") for n in analysis.layers] == [i < 3 for i in range(len(plan))]


# -- conversions and fusions -----------------------------------------------------------------------------------------------


def test_conversions_are_counted_as_they_are_built(analysis: Analysis) -> None:
    for index, name in enumerate(analysis.layers[::3]):
        plan = {**dict.fromkeys(analysis.layers, "int8"), name: ("bfloat16", "float32")[index % 2]}
        floats = {name: plan[name]}
        for fusion in ("default", "best", "none", "isolated"):
            compilation = Compilation(analysis, CONFIG.updated(fusion=fusion))
            program, borders = compilation.build(plan), compilation.borders(plan)
            counted = borders["unfused" if fusion == "none" else fusion]
            built = ops(program)
            assert (built["quantize"], built["dequantize"]) == (counted["quantize"], counted["dequantize"])
            outputs = sum(n not in program.qparams for n in program.layers)
            assert outputs == counted["float_outputs"]
        marked = with_precisions(analysis.base, floats)
        assert count_borders(marked, isolate=True).pairs >= borders["unfused"]["pairs"] >= borders["best"]["pairs"]


class TwoBranches(nn.Module):
    """Either branch can take the add; the later one, which does by default, is the one left in float below."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.first, self.later = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.head = nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        first = self.first(x)
        out: Tensor = self.head(torch.relu(first + self.later(x)))
        return out


def test_the_fusion_with_the_fewest_conversions_is_taken(images: Tensor) -> None:
    torch.manual_seed(4)
    model = TwoBranches().eval()
    base = fold(capture(model, (images[:2],)))
    (add, options), = add_options(base).items()
    names = {node.source: node.name for node in base.nodes if node.op == "conv"}
    assert options == (names["later"], names["first"], "")
    plain = best_fusion(base, {})
    assert plain.choice[add] == names["later"] and plain.borders == plain.default  # nothing to gain: the default stays
    assert plain.borders.pairs == 1
    best = best_fusion(base, {names["later"]: "float32"})
    assert best.choice[add] == names["first"] and best.compared >= 3
    assert best.borders.conversions < best.default.conversions
    other = best_fusion(base, {names["first"]: "float32"})
    assert other.choice[add] == names["later"]
    # the program built from it has those conversions, from ranges of the one float run
    config = LayerwiseConfig(budget_size=1e6, precisions=("int8", "float32"), patches=64)
    own = analyse(capture(model, (images[:2],)), [images], config)
    plan = {name: "float32" if name == names["later"] else "int8" for name in own.layers}
    results = {}
    for fusion in ("best", "default", "none"):
        program = Compilation(own, config.updated(fusion=fusion)).build(plan)
        assert ("table" in ops(program) or "relu" in ops(program)) == (fusion == "none")  # no activation of its own, if fused
        results[fusion] = create_engine(program, "reference").run(images)
        built = ops(program)
        if fusion != "none":
            counted = best.borders if fusion == "best" else best.default
            assert (built["quantize"], built["dequantize"]) == (counted.quantize, counted.dequantize)
    with torch.no_grad():
        exact = model(images)
    for result in results.values():
        assert float((result - exact).square().mean() / exact.var()) < 1e-3


# -- bfloat16 --------------------------------------------------------------------------------------------------------------


def test_bfloat16_rounds_as_torch_does() -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(20_000) * np.exp2(rng.integers(-130, 127, 20_000))).astype(np.float32)
    ties = from_bits(rng.integers(0, 0x7F7F, 2000).astype(np.uint16)).view(np.uint32) + np.uint32(0x8000)
    x = np.concatenate([x, ties.view(np.float32), [0.0, -0.0, np.inf, -np.inf]]).astype(np.float32)
    expected = torch.from_numpy(x).bfloat16()
    assert np.array_equal(to_bits(x), expected.view(torch.int16).numpy().view(np.uint16))
    assert np.array_equal(rounded(x), expected.float().numpy())
    assert np.isnan(rounded(np.array([np.nan], np.float32)))[0]


def test_bfloat16_layers_compute_with_rounded_operands_and_float32_sums(analysis: Analysis, images: Tensor) -> None:
    name = analysis.layers[0]
    program = analysis.program({name: "bfloat16"})
    node = program.graph.node(name)
    assert node.weight is not None and node.bias is not None
    weight = program.graph.constants[node.weight]
    assert weight.dtype == np.uint16 and name not in program.layers and program.float_reasons[name] == "bfloat16 layer"
    seen: dict[str, Tensor] = {}
    executor = Executor(program)
    executor.run([images], executor.settings(0), observe=seen.__setitem__)
    w, x = torch.from_numpy(from_bits(weight)).double(), torch.from_numpy(rounded(images.numpy())).double()
    exact = torch.relu(nn.functional.conv2d(x, w, torch.from_numpy(program.graph.constants[node.bias]).double(), padding=1))
    assert float((seen[name].double() - exact).abs().max()) < 1e-5 * float(exact.abs().max())
    described = create_engine(program, "reference").describe()
    (entry,) = [op for op in described["float_operators"] if op["name"] == name]
    assert entry["precision"] == "bfloat16" and entry["reason"] == "bfloat16 layer"


def test_bfloat16_weights_take_two_bytes_in_a_file_and_come_back(analysis: Analysis, images: Tensor) -> None:
    programs = {p: analysis.program(dict.fromkeys(analysis.layers, p)) for p in ("bfloat16", "float32")}
    data = {p: to_bytes(program) for p, program in programs.items()}
    weights = sum(e.parameters for e in analysis.evidence)
    assert len(data["float32"]) - len(data["bfloat16"]) == pytest.approx(2 * weights, rel=0.05)
    loaded = from_bytes(data["bfloat16"])
    assert to_bytes(loaded) == data["bfloat16"]
    runs = [create_engine(p, "reference").run(images) for p in (programs["bfloat16"], loaded)]
    assert torch.equal(*runs)


def test_bad_bfloat16_is_refused(analysis: Analysis) -> None:
    name, other = analysis.layers[0], analysis.layers[1]

    def broken(edit: Any) -> Program:
        program = analysis.program({name: "bfloat16", other: "float32"})
        edit(program, program.graph.node(name), program.graph.node(other))
        return program

    def infinite(program: Program, node: Any, _: Any) -> None:
        bits = program.graph.constants[node.weight].copy()
        bits.flat[3] = 0x7F80
        program.graph.constants[node.weight] = bits

    def wrong_dtype(program: Program, node: Any, _: Any) -> None:
        program.graph.constants[node.weight] = from_bits(program.graph.constants[node.weight])

    def bits_without_the_word(program: Program, node: Any, _: Any) -> None:
        node.attrs["precision"] = "float32"

    def unknown(program: Program, node: Any, _: Any) -> None:
        node.attrs["precision"] = "float8"

    def bits_as_bias(program: Program, node: Any, second: Any) -> None:
        program.graph.constants[second.bias] = to_bits(program.graph.constants[second.bias])

    for edit in (infinite, wrong_dtype, bits_without_the_word, unknown, bits_as_bias):
        with pytest.raises(ArtifactError):
            to_bytes(broken(edit))
    graph = fold(analysis.base).copy()
    graph.node(name).attrs["precision"] = "float8"
    with pytest.raises(GraphError, match="float8"):
        verify(graph)


def test_exports_give_their_own_answer(analysis: Analysis, images: Tensor, tmp_path: Path) -> None:
    from bitdial.export.c import export_c

    program = analysis.program({analysis.layers[1]: "bfloat16"})
    with pytest.raises(ExportError, match="bfloat16 layer"):
        export_c(program)
    onnxruntime = pytest.importorskip("onnxruntime")
    from bitdial.export.onnx import export_onnx

    export_onnx(program, tmp_path / "m.onnx", 0.0)
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    expected = create_engine(program, "reference").run(images.numpy(), 0.0)
    assert np.abs(found - expected).max() < 0.05 * expected.std()


# -- the whole, and bad input ----------------------------------------------------------------------------------------------


def test_compile_from_python(conv_net: nn.Module, images: Tensor, tmp_path: Path) -> None:
    labels = torch.zeros(len(images), dtype=torch.int64)
    model = bitdial.compile(conv_net, images, CONFIG, evaluation=[(images, labels)], engine="reference")
    assert model.ratios == [1.0] and model.ratio == 1.0 and len(model.program.curve) == 1
    path = tmp_path / "m.bitdial"
    model.save(path)
    again = bitdial.load(path, "reference")
    assert torch.equal(again(images), model(images))
    plan = again.program.provenance["layerwise"]
    assert {row["precision"] for row in plan["layers"]} <= set(PRECISIONS) and len(plan["layers"]) == 8
    assert set(plan["layers"][0]["metrics"]) == {"propagated"}


def test_transformers_and_finishing_runs(transformer: nn.Module, images: Tensor) -> None:
    config = LayerwiseConfig(budget_size="90%", bias="runs", patches=64, precisions=("low", "int8", "bfloat16"))
    compiled = compile_layerwise(transformer, [images[:16]], config)
    assert compiled.analysis.inferences["finishing"] > 0  # counted, since asked for
    assert torch.isfinite(create_engine(compiled.program, "reference").run(images)).all()
    assert all(e.output_noise > 0.0 for e in compiled.analysis.evidence)


def test_bad_input(graph: Graph, images: Tensor) -> None:
    with pytest.raises(CalibrationError, match="empty"):
        compile_layerwise(graph, [images[:0]], CONFIG)
    with pytest.raises(CalibrationError, match="NaN"):
        compile_layerwise(graph, [torch.full_like(images, float("nan"))], CONFIG)
    with pytest.raises(ConfigError, match="matches nothing"):
        compile_layerwise(graph, [images], CONFIG.updated(ignored=("nowhere*",)))
    with pytest.raises(ConfigError, match="bias"):
        CONFIG.updated(bias="some")
