"""SCALE-Sim (PyPI `scalesim`) beside the NPU's cycle model, layer by layer at 8 bits. Nothing needs it; it is skipped if absent.

SCALE-Sim counts the cycles of a weight-stationary array from the demands that it makes of its memories, one row a cycle. Per fold
(one tile of weights) it shifts the weights in, streams all pixels and drains, and hides none of that behind the fold before:
2 rows + columns + pixels - 2 cycles; the last has number folds * (...) - 1. It packs the taps of a window into rows, where the
NPU takes a pass for every tap, so that layers of several taps whose channels are no multiple of the rows have fewer folds there.
Only its array is asked: the memory part of release 3.0.0 does not run with NumPy 2. It knows no groups of convolutions.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from bitdial.engines.npu.plan import Design, Geometry, LayerPlan

_CONFIG = """[general]
run_name = layer
[architecture_presets]
ArrayHeight: {rows}
ArrayWidth: {columns}
IfmapSramSzkB: 1024
FilterSramSzkB: 1024
OfmapSramSzkB: 1024
IfmapOffset: 0
FilterOffset: 10000000
OfmapOffset: 20000000
Dataflow: ws
ReadRequestBuffer: 512
WriteRequestBuffer: 512
[layout]
IfmapCustomLayout: False
IfmapSRAMBankBandwidth: 10
IfmapSRAMBankNum: 10
IfmapSRAMBankPort: 2
FilterCustomLayout: False
FilterSRAMBankBandwidth: 10
FilterSRAMBankNum: 10
FilterSRAMBankPort: 2
[sparsity]
SparsitySupport: false
[run_presets]
InterfaceBandwidth: CALC
UseRamulatorTrace: False
"""


def missing() -> str:
    """Why SCALE-Sim cannot be asked, "" if it can."""
    absent = [name for name in ("scalesim", "tqdm") if importlib.util.find_spec(name) is None]
    return f"{', '.join(absent)} not installed (pip install scalesim): NOT COMPARED WITH SCALE-SIM" if absent else ""


def version() -> str:
    return metadata.version("scalesim")


def convention(folds: int, pixels: int, design: Design) -> int:
    """SCALE-Sim's cycles of so many weight tiles against so many pixels."""
    return folds * (2 * design.rows + design.columns + pixels - 2) - 1


def convention_cycles(g: Geometry, design: Design) -> int:
    """The same for a layer as SCALE-Sim folds it, taps packed into rows."""
    folds = math.ceil(g.taps * g.channels / design.rows) * math.ceil(g.outputs / design.columns)
    return convention(folds, math.prod(g.out_size), design)


def plan_cycles(plan: LayerPlan, design: Design) -> int:
    """The plan's own weight tiles at 8 bits, a tap at a time, under SCALE-Sim's schedule: what the two models share."""
    once = {job.tiles: job for job in plan.jobs}.values()  # slices of rows read the same tiles again
    return convention(sum(job.passes(plan.geometry.taps, 0) for job in once), math.prod(plan.geometry.out_size), design)


def packs_taps(g: Geometry, design: Design) -> bool:
    """Whether SCALE-Sim folds a layer otherwise than the NPU."""
    return g.taps > 1 and g.channels % design.rows > 0


@functools.cache
def package_cycles(g: Geometry, design: Design) -> int:
    """What the package says for a layer without groups and dilation. Raises ImportError without it."""
    config = _config(design.rows, design.columns)
    topology = importlib.import_module("scalesim.topology_utils").topologies()
    kernel, stride = g.window.kernel, g.window.stride
    # It knows no padding: the input is made as large as the outputs need.
    size = [(n - 1) * s + k for n, s, k in zip(g.out_size, stride, kernel, strict=True)]
    topology.load_layer_params_from_list("layer", ["layer", *size, *kernel, g.channels, g.outputs, *stride, 1, 1])
    layer = importlib.import_module("scalesim.single_layer_sim").single_layer_sim()
    layer.set_params(0, config, topology, verbose=False)
    matrices = layer.op_mat_obj
    array = layer.compute_system
    array.set_params(
        config_obj=config,
        ifmap_op_mat=matrices.get_ifmap_matrix()[1],
        filter_op_mat=matrices.get_filter_matrix()[1],
        ofmap_op_mat=matrices.get_ofmap_matrix()[1],
    )
    rows = {demand.shape[0] for demand in array.get_demand_matrices()}
    if len(rows) != 1:
        raise AssertionError(f"SCALE-Sim's demands differ in length: {sorted(rows)}")
    return int(rows.pop()) - 1


@functools.cache
def _config(rows: int, columns: int) -> Any:
    config = importlib.import_module("scalesim.scale_config").scale_config()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scale.cfg"
        path.write_text(_CONFIG.format(rows=rows, columns=columns))
        config.read_conf_file(str(path))
    return config
