"""The text of NAME.h and NAME.c."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

from bitdial._version import __version__
from bitdial.export.c import weights
from bitdial.export.c.literals import c_array, float_literal
from bitdial.export.c.names import comment
from bitdial.export.c.planning import Plan
from bitdial.export.c.steps import Lowered, Step

# Runtime files in the order in which they must stand.
ORDER = (
    "quantize import dequantize table binary add mul rescale window sum_pool max_pool zero copy move copy_float targets layer "
    "depthwise columns products lower unpack fours conv"
).split()


@dataclass
class Sources:
    """Texts of the file pair and what they hold. constants: bytes of const arrays (weights among them)."""

    header: str
    source: str
    constants: int
    weights: int


def runtime(name: str) -> str:
    """Text of a file of the C runtime."""
    return (resources.files("bitdial.export.c") / "runtime" / f"{name}.c").read_text(encoding="utf-8")


def signature(name: str, lowered: Lowered) -> str:
    inputs = [f"const float *{_argument('in', i, lowered.inputs)}" for i in range(len(lowered.inputs))]
    outputs = [f"float *{_argument('out', i, lowered.outputs)}" for i in range(len(lowered.outputs))]
    return f"void {name}_run({', '.join(inputs + outputs)})"


def quantized_signature(name: str, lowered: Lowered) -> str | None:
    if lowered.quantized_input is None:
        return None
    kind = "int8_t" if lowered.buffers[lowered.quantized_input].signed else "uint8_t"
    outputs = [f"float *{_argument('out', i, lowered.outputs)}" for i in range(len(lowered.outputs))]
    return f"void {name}_run_quantized(const {kind} *in, {', '.join(outputs)})"


def _argument(kind: str, index: int, values: list[str]) -> str:
    return kind if len(values) == 1 else f"{kind}{index}"


def write_sources(name: str, lowered: Lowered, plan: Plan, input_scale: float) -> Sources:
    """The file pair. input_scale: of the quantized input form, if there is one."""
    body, constants, weight_bytes = _definitions(lowered, plan)
    makes = {s.layer.kind for s in lowered.steps if s.layer is not None} - {weights.DIRECT}
    parts = [_summary(name, lowered, plan, constants, weight_bytes)]
    parts.append(f'#include "{name}.h"\n\n#include <float.h>\n#include <stddef.h>\n#include <stdint.h>\n')
    parts.append(runtime("common"))
    needed = {kernel for step in lowered.steps for kernel in step.kernels}
    if lowered.quantized_input is not None:
        needed.add("import")
    if len(set(lowered.outputs)) < len(lowered.outputs) or set(lowered.outputs) & set(lowered.inputs):
        needed.add("copy_float")
    if weights.LOWERS in makes:
        needed.add("lower")
    if weights.UNPACKS in makes:
        needed.add("unpack")
    maker = "fq_lower_weights" if weights.LOWERS in makes else "fq_unpack_weights" if makes else ""
    call = f"{maker}(l, from, first, n, groups, low, to)" if maker else "((void)(to))"
    for kernel in ORDER:
        if kernel == "layer":
            stores = any(s.layer is not None and s.layer.low_weight is not None for s in lowered.steps)
            parts.append(f"#define FQ_STORED {int(stores)}")
        if kernel == "fours":
            parts.append(
                f"#define FQ_FOURS {int('fours' in needed)}\n#define FQ_UNPACKS {int(weights.UNPACKS in makes)}"
            )
        if kernel == "conv" and "conv" in needed:
            parts.append(f"#define FQ_MAKE_WEIGHTS(l, from, first, n, groups, low, to) {call}")
        if kernel in needed:
            parts.append(runtime(kernel))
    parts.append(body)
    parts.append(_functions(name, lowered, plan))
    return Sources(_header(name, lowered, plan, input_scale, constants), "\n".join(parts), constants, weight_bytes)


def _definitions(lowered: Lowered, plan: Plan) -> tuple[str, int, int]:
    """Const arrays and structs of all steps; bytes of all arrays, and of weights."""
    lines, total, weight_bytes = [], 0, 0
    for index, step in enumerate(lowered.steps):
        if step.constants:
            lines.append(
                f"/* {index}: {comment(step.op)} {comment(step.name)}, {comment(step.source) or 'no module'} */"
            )
        names = constant_names(index, step)
        for constant in step.constants:
            own = names[constant.name]
            if constant.values is not None:
                lines.append(c_array(own, constant.values))
                total += constant.values.nbytes
                weight_bytes += constant.values.nbytes if constant.name in ("weight", "low_weight") else 0
                continue
            kind, _, count = constant.struct.partition(":")
            text = constant.text
            if kind == "fq_layer":
                text = text.format(block=plan.blocks.get(step.name, 0), **names)
            if count:
                lines.append(f"static const {kind} {own}[{count}] = {{\n    {text}\n}};\n")
                total += int(count) * 4 * (text.split("}", 1)[0].count(",") + 1)
            else:
                lines.append(f"static const {kind} {own} = {{\n    {text}\n}};\n")
                total += 4 * (text.count(",") + 1)
    return "\n".join(lines), total, weight_bytes


def constant_names(index: int, step: Step) -> dict[str, str]:
    """Name of a constant inside its step -> C name. A name with "=" in front is shared by steps."""
    return {c.name: c.name[1:] if c.name.startswith("=") else f"s{index}_{c.name}" for c in step.constants}


def _summary(name: str, lowered: Lowered, plan: Plan, constants: int, weight_bytes: int) -> str:
    ratios = ", ".join(f"{100 * r:g} %" for r in lowered.ratios)
    macs = sum(s.macs for s in lowered.steps)
    return f"""/* {name}: a quantized network, written by bitdial {comment(__version__)} export-c. Do not edit.
 *
 * Ratios: {ratios}. {macs} multiply-accumulates a run.
 * Constants: {constants} bytes, of which weights {weight_bytes}.
 * Arena: {plan.layout.size} bytes; lower bound for this order of operators {plan.layout.bound} bytes ({arena_words(plan)}).
 *
 * C99, freestanding: no malloc, no stdio, no libm; the compiler may call memcpy and memset. Results are those of bitdial's
 * reference engine, bit for bit, which needs IEEE float32 with rounding to nearest and without fused multiply-add:
 * build with -std=c99 or -ffp-contract=off. Unsigned and signed shifts to the right are taken to be arithmetic.
 */"""


def arena_words(plan: Plan) -> str:
    layout = plan.layout
    if layout.minimal:
        return "the arena is minimal"
    return f"{100 * (layout.size - layout.bound) / layout.bound:.1f} % above the bound"


def _header(name: str, lowered: Lowered, plan: Plan, input_scale: float, constants: int) -> str:
    guard = f"BITDIAL_{name.upper()}_H"
    upper = name.upper()
    shapes = []
    for kind, values in (("in", lowered.inputs), ("out", lowered.outputs)):
        for i, value in enumerate(values):
            place = lowered.buffers[value]
            shape = (
                f"[{place.c}][{place.h}][{place.w}]" if place.channels_first else f"[{place.h * place.w}][{place.c}]"
            )
            shapes.append((f"{upper}_{_argument(kind, i, values).upper()}_SIZE", place.count, shape, comment(value)))
    sizes = "\n".join(
        f"#define {macro} {count} /* floats, {shape}: '{value}' */" for macro, count, shape, value in shapes
    )
    ratios = ", ".join(f"{i}: {100 * r:g} %" for i, r in enumerate(lowered.ratios))
    quantized = ""
    prototype = quantized_signature(name, lowered)
    if prototype is not None:
        quantized = (
            f"\n/* The same from 8-bit integers q, each standing for {float_literal(input_scale)} * q, in the order of the\n"
            f" * float input. */\n{prototype};\n"
        )
    return f"""/* {name}: a quantized network, written by bitdial {comment(__version__)} export-c. Do not edit. */
#ifndef {guard}
#define {guard}

#include <stdint.h>

#ifdef __cplusplus
extern "C" {{
#endif

{sizes}
#define {upper}_RATIOS {len(lowered.ratios)}
#define {upper}_ARENA_BYTES {plan.layout.size}
/* Lower bound of the arena for this order of operators: {plan.layout.bound} bytes ({arena_words(plan)}).
 * Constants: {constants} bytes. */

/* The dial, by index of the ratio: {ratios}.
 * One store, in force from the next run on; returns 0, or -1 for an index that does not exist. */
int {name}_set_ratio(int index);
int {name}_ratio(void);

/* One sample. Reads the dial once, at its start. Uses one static arena: not from two threads or interrupts at a time.
 * Infinite inputs saturate, NaN becomes the smallest 8-bit value. */
{signature(name, lowered)};
{quantized}
#ifdef __cplusplus
}}
#endif

#endif
"""


def _functions(name: str, lowered: Lowered, plan: Plan) -> str:
    """Arena, dial, entry points."""
    size = max(4, plan.layout.size)
    low = lowered.ratios
    used = any(s.layer is not None for s in lowered.steps)
    arena = f"""static union {{
    uint8_t bytes[{size}];
    uint32_t aligned;
}} fq_arena FQ_ALIGNED;

static volatile int fq_dial;

int {name}_set_ratio(int index) {{
    if (index < 0 || index >= {len(low)}) return -1;
    fq_dial = index;
    return 0;
}}

int {name}_ratio(void) {{ return fq_dial; }}
"""
    pointers = _Pointers(lowered, plan)
    calls = [(step, _call(index, step, pointers)) for index, step in enumerate(lowered.steps)]
    copies = _copies(lowered)
    ratio = "const int32_t ratio = fq_dial;" if used else ""
    if lowered.quantized_input is None:
        lines = [c for _, c in calls] + copies
        return f"{arena}\n{signature(name, lowered)} {{\n    {ratio}\n    " + "\n    ".join(lines) + "\n}\n"
    first = calls[0][1]
    rest = [c for _, c in calls[1:]] + copies
    outputs = [_argument("out", i, lowered.outputs) for i in range(len(lowered.outputs))]
    parameters = ", ".join([f"float *{o}" for o in outputs] + (["int32_t ratio"] if used else []))
    passed = ", ".join(outputs + (["ratio"] if used else []))
    place = lowered.buffers[lowered.quantized_input]
    planes = ", ".join(str(v) for v in place.planes)
    take = f"fq_import((const uint8_t *)in, {pointers.of(lowered.quantized_input)}, {planes});"
    return f"""{arena}
static void fq_network({parameters}) {{
    {(chr(10) + "    ").join(rest)}
}}

{signature(name, lowered)} {{
    {ratio}
    {first}
    fq_network({passed});
}}

{quantized_signature(name, lowered)} {{
    {ratio}
    {take}
    fq_network({passed});
}}
"""


class _Pointers:
    """C expressions of where values lie."""

    def __init__(self, lowered: Lowered, plan: Plan) -> None:
        self.lowered, self.plan = lowered, plan

    def of(self, value: str) -> str:
        lowered = self.lowered
        root = lowered.root(value)
        if root in lowered.inputs:
            return _argument("in", lowered.inputs.index(root), lowered.inputs)
        if root in lowered.outputs:
            return _argument("out", lowered.outputs.index(root), lowered.outputs)
        place = f"fq_arena.bytes + {self.plan.offset(lowered, value)}"
        return f"(fq_float *)(void *)({place})" if lowered.buffers[root].is_float else place


def _call(index: int, step: Step, pointers: _Pointers) -> str:
    values = {role: pointers.of(value) for role, value in step.roles.items()}
    scratch = f"fq_arena.bytes + {pointers.plan.scratch(step)}"
    return step.call.format(scratch=scratch, **values, **constant_names(index, step))


def _copies(lowered: Lowered) -> list[str]:
    """Outputs that are named twice, or are inputs."""
    result = []
    for i, value in enumerate(lowered.outputs):
        first = lowered.outputs.index(value)
        source = None
        if value in lowered.inputs:
            source = _argument("in", lowered.inputs.index(value), lowered.inputs)
        elif first < i:
            source = _argument("out", first, lowered.outputs)
        if source is not None:
            target = _argument("out", i, lowered.outputs)
            result.append(f"fq_copy_float({source}, {target}, {lowered.buffers[value].count});")
    return result
