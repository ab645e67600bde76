"""`bitdial inspect`: what is in a .bitdial file, and what an engine makes of it. Needs no torch."""

from __future__ import annotations

from typing import Annotated, Any

from bitdial.cli import options
from bitdial.cli.configs import command
from bitdial.cli.inspect_engine import EngineOptions, examine_engine, print_engine
from bitdial.cli.options import option
from bitdial.cli.terminal import Terminal, count_name, ratio_name, size_name
from bitdial.errors import ArtifactError


@command
def inspect(
    *,
    model: options.Model,
    layers: Annotated[bool, option("--layers", "", "A table of all layers: precision, groups, shifts.")] = False,
    graph: Annotated[bool, option("--graph", "", "The network's graph as text.")] = False,
    verify: Annotated[
        bool, option("--verify", "", "Compare every tensor with its hash and check every rule; exit code 2 if broken.")
    ] = False,
    engine: Annotated[
        str | None,
        option(
            "--engine", "cpu|npu",
            "Load the model into this engine too and show its layers there: kernel by ratio, milliseconds, GMAC/s and "
            "share of the measured peak, what hinders a faster kernel, bytes of weights; npu: modelled cycles, use of the "
            "array, traffic, energy.", options.ENGINE_PANEL,
        ),
    ] = None,
    isa: options.Isa = None,
    threads: Annotated[
        int | None, option("--threads", "N", "Threads of the engine. Default: 1.", options.ENGINE_PANEL, min=1)
    ] = None,
    batch: Annotated[
        int | None,
        option(
            "--batch", "N",
            "Samples per run that kernels are chosen for and timed with. Default: 1.", options.ENGINE_PANEL, min=1,
        ),
    ] = None,
    kernels: Annotated[
        str | None,
        option(
            "--kernels", "auto|fixed|NAME",
            "auto (default): by timing, remembered on this machine; fixed: by rule; or one of direct, fip, winograd, "
            "winograd_fip, narrow wherever it is exact.", options.ENGINE_PANEL,
        ),
    ] = None,
    memory: options.Memory = None,
    npu: options.Npu,
    terminal: Terminal,
) -> None:  # fmt: skip
    """Show what a .bitdial file holds: sizes, settings, layers, what runs in float and why, the stored curve.

    With --engine cpu also how it runs on this machine: which kernel computes each layer at each ratio, and how fast;
    with --engine npu what a model of the NPU says.
    """
    asked = EngineOptions(engine, isa, threads, batch, kernels, memory, npu)
    asked.check()
    from bitdial.artifact import inspect_file, load_program, verify_file

    if verify:
        findings = verify_file(model)
        for finding in findings:
            terminal.note(f"damaged: {finding}")
        if findings:
            raise ArtifactError(f"{model} is not sound: {findings[0]}")
    file = inspect_file(model)
    if file["damaged"]:
        raise ArtifactError(file["damaged"][0])
    from bitdial.engines.describe import describe_program
    from bitdial.quantization.answers import kept_answers

    program = load_program(model)
    described = describe_program(program)
    _print_file(terminal, file, described, verify)
    if program.curve:
        from bitdial.cli.measure import print_curve, report_rows

        evaluation = program.provenance.get("evaluation")
        terminal.say()
        print_curve(terminal, program.curve, report_rows(evaluation), program.ratios[0], _measured_on(evaluation))
    else:
        terminal.say("no curve is stored; bitdial evaluate measures one")
    if (kept := kept_answers(program)) is not None:
        terminal.say(kept.summary())
    _print_float(terminal, described)
    if (plan := program.provenance.get("layerwise")) is not None:
        print_plan(terminal, plan)
    if layers:
        _print_layers(terminal, described)
    if graph:
        terminal.say()
        terminal.say(str(program.graph))
    content: dict[str, Any] = {"command": "inspect", "file": file, "description": described, "verified": verify}
    if graph:
        content["graph"] = str(program.graph)
    if asked.name is not None:
        content["engine"] = examine_engine(program, asked)
        print_engine(terminal, content["engine"])
    terminal.emit(content)


def _measured_on(evaluation: dict[str, Any] | None) -> str:
    if not evaluation:
        return "stored curve"
    images, split, data = (evaluation.get(key, "?") for key in ("images", "split", "data"))
    return f"stored curve, {images} {split} images of {data}"


def _print_file(terminal: Terminal, file: dict[str, Any], described: dict[str, Any], verified: bool) -> None:
    provenance = file["provenance"] or {}
    config, source = provenance.get("config") or {}, provenance.get("source") or {}
    sizes = file["sizes"]
    terminal.say(f"{file['path']}: format version {file['version']}, {size_name(sizes['total'])}")
    terminal.say("  hashes of all tensors match" + ("; every rule of the format holds" if verified else ""))
    planes = {"low_planes": "low weights"} if file["plane_layers"] else {}
    parts = {"weights": "weights", **planes, "tables": "tables", "float_leftovers": "float constants", "manifest": "manifest"}
    terminal.say("  " + ", ".join(f"{name} {size_name(sizes[key])}" for key, name in parts.items()))
    if file["packed_layers"]:
        terminal.say(f"  {file['packed_layers']} layers hold weights packed at the low width")
    if file["plane_layers"]:
        terminal.say(f"  {file['plane_layers']} layers hold low weights of their own beside the 8-bit ones")
    if file["band"]:
        low, high = file["band"]
        terminal.say(f"  saved for the band {ratio_name(low)} to {ratio_name(high)}")
    made = [
        source.get("model"),
        f"bitdial {provenance['bitdial']}" if "bitdial" in provenance else None,
        f"torch {provenance['torch']}" if "torch" in provenance else None,
    ]
    if any(made):
        terminal.say(f"made from {', '.join(str(m) for m in made if m)}")
    if config:
        terminal.say(
            f"  {config.get('selector')} selection, seed {config.get('seed')}, groups of {config.get('group_size')}, "
            f"{low_bits_of(config, provenance.get('target'))}, weight shifts per {config.get('weight_granularity')}"
        )
    if isinstance(told := provenance.get("warnings"), list):
        for text in told:
            terminal.say(f"warning: {text}")
    if provenance.get("finetuning"):
        terminal.say(_finetuned(provenance["finetuning"]))
    ratios = ", ".join(ratio_name(r) for r in described["ratios"])
    terminal.say(
        f"ratios: {ratios}; extraction {described['extraction']}; {'nested' if described['nested'] else 'not nested'}"
    )
    eligible = [layer for layer in described["layers"] if not layer["reason"]]
    groups = [layer["groups"] for layer in eligible]
    spread = f" with {min(groups)} to {max(groups)} groups" if groups else ""
    terminal.say(f"layers: {len(described['layers'])} in integers, {len(eligible)} of them may run low{spread}")
    low = described["low_weights"]
    if low["kind"] != "none":
        size = f", {size_name(low['bytes'])} in {low['layers']} layers" if low["layers"] else ""
        terminal.say(f"low weights: {low['kind']}{size}")
    if described["reorders"]:
        terminal.say(f"reorders at run time: {len(described['reorders'])}")


def low_bits_of(config: dict[str, Any], target: Any) -> str:
    """Which widths were asked for, and what for (a file may say anything there)."""
    from bitdial.quantization.targets import FOUR_BITS

    if config.get("low_bits") != "auto":
        return f"{config.get('low_bits')} low bits"
    if config.get("target") in FOUR_BITS:
        return f"4 low bits (target {config['target']})"
    if isinstance(table := config.get("latency_table"), dict):
        return f"low bits per layer by the times of {table.get('target')}"
    if not isinstance(target, dict):
        return "low bits per layer"
    machine = f" ({target.get('resolved')})" if target.get("name") != target.get("resolved") else ""
    return f"low bits per layer for target {target.get('name')}{machine}"


def _finetuned(record: Any) -> str:
    """A line about the training that followed quantization (a file may say anything there)."""
    if not isinstance(record, dict):
        return "finetuned"
    settings = record.get("config")
    asked = settings if isinstance(settings, dict) else {}
    parts = [f"{asked[name]} {told}" for name, told in (("epochs", "epochs"), ("passes", "passes")) if name in asked]
    kept = f"after update {record.get('best_update')} of {record.get('updates')}"
    parts += [kept] if "updates" in record else []
    parts += [f"ended early: {record['stopped']}"] if record.get("stopped") else []
    return f"finetuned: {', '.join(parts)}"


def _print_float(terminal: Terminal, described: dict[str, Any]) -> None:
    operators = described["float_operators"]
    if not operators:
        terminal.say("nothing runs in float")
        return
    rows = [[op["name"], op["op"], op["source"], op["reason"]] for op in operators]
    terminal.table(["in float", "operator", "module", "why"], rows, left=4)


def print_plan(terminal: Terminal, plan: dict[str, Any]) -> None:
    """Precision per layer of a layer-wise plan, and its conversions between 8 bits and float."""
    names = [m for m in ("weight", "activation", "sqnr", "mse") if any(m in row.get("metrics", {}) for row in plan["layers"])]
    rows = [
        [
            row["source"] or row["name"], row["precision"], size_name(row["bytes"]), f"{row['score']:.3g}",
            *(f"{row['metrics'].get(m, 0.0):.2e}" for m in names),
        ]
        for row in plan["layers"]
    ]  # fmt: skip
    terminal.table(["layer", "precision", "weights", "score", *names], rows, f"layer-wise plan by {plan['metric']}", left=2)
    borders = plan.get("borders") or {}
    shown = [f"{borders[k]['pairs']} {text}" for k, text in _FUSIONS.items() if k in borders]
    if shown:
        terminal.say(f"quantize/dequantize pairs: {', '.join(shown)}; this file: fusion {plan.get('fusion')}")


_FUSIONS = {
    "isolated": "with one around every layer",
    "unfused": "unfused",
    "default": "fused by default",
    "best": "by the best fusion",
}


def _print_layers(terminal: Terminal, described: dict[str, Any]) -> None:
    rows = []
    for layer in described["layers"]:
        shape = "x".join(map(str, layer["weight_shape"] or [])) or "-"
        shifts = layer["activation_shift"]
        low = layer["low_range"]
        rows.append(
            [
                layer["source"] or layer["name"],
                layer["kind"],
                shape,
                layer["reason"] or f"8-bit, low to {low['activations']} and {low['weights']}",
                count_name(layer["macs"]),
                str(layer["groups"] or "-"),
                "/".join(map(str, layer["low_groups"])) if not layer["reason"] else "-",
                (f"{min(shifts)}..{max(shifts)}" if shifts else "-") if not layer["reason"] else "-",
                _range(layer["weight_shift_histogram"]) if not layer["reason"] else "-",
            ]
        )
    columns = [
        "layer",
        "kind",
        "weight",
        "precision",
        "multiplies",
        "groups",
        "low groups per ratio",
        "act. shifts",
        "w. shifts",
    ]
    terminal.table(columns, rows, "8-bit layers; shifts are the low bits dropped", left=4)


def _range(histogram: dict[int, int]) -> str:
    return f"{min(histogram)}..{max(histogram)}" if histogram else "-"
