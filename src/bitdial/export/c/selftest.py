"""NAME_test.c: one stored input and the expected output at every exported ratio."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.export.c.emit import _argument
from bitdial.export.c.literals import float_literal, wrapped
from bitdial.export.c.steps import Lowered
from bitdial.quantization.instructions import Quantize
from bitdial.quantization.program import Program

Floats = npt.NDArray[np.float32]


def sample_inputs(program: Program, seed: int = 0) -> list[Floats]:
    """One sample per input, float32 [1, ...]: uniform over a little more than the 8-bit range, so that some values saturate.
    Multiples of 2^-10 of the range keep the text of the test short."""
    rng = np.random.default_rng(seed)
    result = []
    for name in program.inputs:
        shape = [int(d) for d in program.types[name].shape[1:]]  # type: ignore[arg-type]
        reach = 1.0
        for step in program.instructions:
            if isinstance(step, Quantize) and step.inputs[0] == name:
                q = program.qparams[step.name]
                reach = q.scale * q.qmax * 1.1
                break
        spacing = 2.0 ** np.ceil(np.log2(reach / 1024))
        values = np.rint(rng.uniform(-reach, reach, [1, *shape]) / spacing) * spacing
        result.append(values.astype(np.float32))
    return result


def write_test(name: str, lowered: Lowered, inputs: Sequence[Floats], expected: Sequence[Sequence[Floats]]) -> str:
    """Text of the test. expected: per exported ratio, per output."""
    upper = name.upper()
    arrays = []
    for i, values in enumerate(inputs):
        size = f"{upper}_{_argument('in', i, lowered.inputs).upper()}_SIZE"
        arrays.append(f"static const float input{i}[{size}] = {{\n{_floats(values)}\n}};")
    for i in range(len(lowered.outputs)):
        size = f"{upper}_{_argument('out', i, lowered.outputs).upper()}_SIZE"
        rows = ",\n".join("{\n" + _floats(expected[r][i]) + "\n}" for r in range(len(lowered.ratios)))
        arrays.append(f"static const float expected{i}[{upper}_RATIOS][{size}] = {{\n{rows}\n}};")
        arrays.append(f"static float output{i}[{size}];")
    arguments = [f"input{i}" for i in range(len(lowered.inputs))] + [f"output{i}" for i in range(len(lowered.outputs))]
    checks = "\n".join(
        f"        wrong += differing(output{i}, expected{i}[ratio], (int32_t)(sizeof output{i} / sizeof output{i}[0]));"
        for i in range(len(lowered.outputs))
    )
    return f"""/* Self-test of {name}: a stored input and the output of bitdial's reference engine at every ratio.
 * {name}_self_test() returns the number of ratios with a wrong output. main returns 0 or 1, and prints only where the C
 * library is there (hosted builds without BITDIAL_QUIET). -DBITDIAL_REPEAT=n runs every ratio n times, for counting
 * instructions; -DBITDIAL_RATIO=i tests the ratio of that index alone. */
#include "{name}.h"

#if __STDC_HOSTED__ && !defined(BITDIAL_QUIET)
#include <stdio.h>
#endif

#ifndef BITDIAL_REPEAT
#define BITDIAL_REPEAT 1
#endif

{chr(10).join(arrays)}

/* Zero and minus zero are one. */
static int32_t differing(const float *a, const float *b, int32_t n) {{
    int32_t count = 0;
    for (int32_t i = 0; i < n; ++i) count += !(a[i] >= b[i] && a[i] <= b[i]);
    return count;
}}

int {name}_self_test(void);

int {name}_self_test(void) {{
    int failed = 0;
    for (int ratio = 0; ratio < {upper}_RATIOS; ++ratio) {{
        int32_t wrong = 0;
#ifdef BITDIAL_RATIO
        if (ratio != BITDIAL_RATIO) continue;
#endif
        if ({name}_set_ratio(ratio) != 0 || {name}_ratio() != ratio) wrong = 1;
        for (int i = 0; i < BITDIAL_REPEAT; ++i) {name}_run({", ".join(arguments)});
{checks}
#if __STDC_HOSTED__ && !defined(BITDIAL_QUIET)
        if (wrong) printf("{name}: ratio %d: %ld values differ\\n", ratio, (long)wrong);
#endif
        failed += wrong != 0;
    }}
    if ({name}_set_ratio({upper}_RATIOS) != -1 || {name}_set_ratio(-1) != -1) ++failed;
    {name}_set_ratio(0);
    return failed;
}}

int main(void) {{
    const int failed = {name}_self_test();
#if __STDC_HOSTED__ && !defined(BITDIAL_QUIET)
    printf("{name}: %s\\n", failed ? "FAILED" : "ok");
#endif
    return failed ? 1 : 0;
}}
"""


def _floats(values: npt.NDArray[Any]) -> str:
    return wrapped([float_literal(float(v)) for v in np.asarray(values, np.float32).reshape(-1)])
