"""Every method on the digits network: it meets its budget, is the same for a seed, runs and saves as any program."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bitdial.artifact import load_program, save_program
from bitdial.engines.reference.engine import ReferenceEngine
from bitdial.errors import CalibrationError, ConfigError, SelectionError
from bitdial.pipeline import Prepared
from bitdial.quantization.config import QuantizeConfig
from comparison import METHODS, Ground, Settings, average_bits, build, build_all, get_method
from comparison.methods import Method, register

SOLVED = {"ptmq", "erq", "igq", "qdrop"}  # tested on their own, for they take longer
PLAIN = [name for name, method in METHODS.items() if not method.trains and name not in SOLVED]
LAYERWISE = ("sqnr", "hawq", "csmpq")
QUICK = Settings(images=8, probes=2)


@pytest.mark.parametrize("name", PLAIN)
def test_budgets_are_met_and_programs_are_ordinary(name: str, ground: Ground, tmp_path: Path) -> None:
    method = get_method(name)
    averages = [b for b in (4.0, 5.0, 6.0, 8.0) if method.supports(b)]
    built = build_all(name, ground, averages, QUICK)
    layers = [layer for layer in ground.eight.layers.values() if layer.eligible]
    total = sum(int(layer.group_macs.sum()) for layer in layers)
    half_a_group = 4 * max(int(layer.group_macs.max()) for layer in layers) / 2 / total
    x = ground.prepared.inputs[0][:8]
    for point in built.points:
        index = point.program.ratios.index(point.ratio)
        assert point.reached == average_bits(point.program, index)
        assert abs(point.reached - point.asked) <= half_a_group + 1e-9
        save_program(point.program, tmp_path / "m.bitdial")
        y = ReferenceEngine(point.program).run(x, point.ratio)
        assert torch.equal(y, ReferenceEngine(load_program(tmp_path / "m.bitdial")).run(x, point.ratio))
    assert built.seconds > 0 and built.switching.bytes > 0 and built.at(4).asked == 4
    assert built.switching.in_time == (name in ("bitdial", "naive"))
    with pytest.raises(ConfigError, match=r"not built at an average of 7\.5"):
        built.at(7.5)


@pytest.mark.parametrize(
    ("name", "numbers"), [("sqnr", "uniform"), ("hawq", "effective"), ("csmpq", "uniform"), ("csmpq", "effective")]
)
def test_layer_wise_methods_lower_whole_layers(name: str, numbers: str, ground: Ground) -> None:
    """Whole layers but for one; with fill = "whole" all, at an average of at most what was asked for."""
    for fill in ("part", "whole"):
        settings = Settings(numbers=numbers, fill=fill, images=8, probes=2)  # type: ignore[arg-type]
        point = build_all(name, ground, (5.5,), settings).points[0]
        index = point.program.ratios.index(point.ratio)
        masks = [layer.low[index] for layer in point.program.layers.values() if layer.eligible]
        partial = sum(bool(m.any() and not m.all()) for m in masks)
        assert partial <= (fill == "part")
        if fill == "whole":
            assert point.reached <= 5.5


def test_effective_numbers_make_one_dial(ground: Ground) -> None:
    built = build_all("csmpq", ground, (4, 5, 6, 8), Settings(numbers="effective", images=8))
    assert len({id(point.program) for point in built.points}) == 1
    assert built.points[0].program.ratios == [0.0, 0.5, 0.75, 1.0] and built.switching.in_time
    assert built.switching.bytes < 0.1 * build_all("csmpq", ground, (4, 5, 6, 8), QUICK).switching.bytes


@pytest.mark.parametrize("name", LAYERWISE)
def test_equal_seeds_give_equal_programs(name: str, prepared: Prepared, config: QuantizeConfig) -> None:
    quick = Settings(images=4, probes=1)
    programs = [build(name, prepared, config, 6.0, settings=quick) for _ in range(2)]
    for a, b in zip(programs[0].layers.values(), programs[1].layers.values(), strict=True):
        assert np.array_equal(a.low, b.low) and np.array_equal(a.bias, b.bias)
        assert a.weight is not None and b.weight is not None and np.array_equal(a.weight, b.weight)


def test_sensitive_layers_keep_8_bits_longest(ground: Ground) -> None:
    """At 6 bits the sum of costs of what is low is below that of what is not, or of any other split of equal size."""
    details = build_all("sqnr", ground, (6,), Settings(images=4, fill="whole")).details
    low = [details["scores"][n] for n in details["low"]["6"]]
    high = [s for n, s in details["scores"].items() if n not in details["low"]["6"]]
    assert min(low) >= max(high)


def test_unknown_methods_averages_and_settings_are_refused(ground: Ground, prepared: Prepared) -> None:
    with pytest.raises(ConfigError, match=r"no method 'nothing' to compare with; there are bitdial, uniform"):
        build("nothing", prepared, ground.config, 5.0)
    with pytest.raises(ConfigError, match=r"'uniform' cannot make an average of \[5\.5\]"):
        build("uniform", prepared, ground.config, 5.5)
    with pytest.raises(ConfigError, match="cannot make an average"):
        build_all("hawq", ground, (3.0,))
    with pytest.raises(ConfigError, match="cannot make an average of no bits"):
        build_all("hawq", ground, ())
    with pytest.raises(ConfigError, match="numbers is 'half'"):
        Settings(numbers="half")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="probes is 0"):
        Settings(probes=0)
    with pytest.raises(ConfigError, match="registered already"):
        register(Method("hawq", "", "", False, "any", METHODS["hawq"].build))
    with pytest.raises(CalibrationError, match=r"labels for 16 calibration samples"):
        Ground(prepared, ground.config, np.zeros(3, np.int64))


def test_a_network_in_which_nothing_may_run_low_is_refused(prepared: Prepared, config: QuantizeConfig) -> None:
    with pytest.raises(SelectionError, match="no layer may run low"):
        build("csmpq", prepared, config.updated(keep_8bit=("*",)), 5.0)
