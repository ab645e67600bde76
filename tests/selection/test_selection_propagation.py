"""Gains from every value to the network's outputs, from noise that is known to have been made by known gains."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitdial.selection.layerwise.propagation import Energy, Flow, output_gains, source_gains

GAINS = st.floats(0.1, 10.0)
NOISES = st.floats(0.1, 2.0)


@given(st.lists(st.tuples(GAINS, NOISES), min_size=1, max_size=12))
def test_gains_of_a_chain_are_recovered(steps: list[tuple[float, float]]) -> None:
    energies, own, flows = {"v0": Energy(10.0, 1.0)}, {}, []
    for i, (gain, noise) in enumerate(steps):
        # Own noise stays below what is carried, as `LEAST_CARRIED` asks for.
        carried = gain * energies[f"v{i}"].noise
        own[f"v{i + 1}"] = noise * carried
        energies[f"v{i + 1}"] = Energy(10.0, carried + noise * carried)
        flows.append(Flow(f"v{i + 1}", {f"v{i}": 1.0}))
    last = f"v{len(steps)}"
    found = output_gains(flows, energies, own, [last])
    product = 1.0 / 10.0
    assert found[last] == pytest.approx(product)
    for i in range(len(steps) - 1, -1, -1):
        product *= steps[i][0]
        assert found[f"v{i}"] == pytest.approx(product)


@given(GAINS, NOISES, NOISES, NOISES, st.floats(0.2, 1.0), st.floats(0.2, 1.0))
def test_residuals_pass_the_activation_and_the_rest_is_the_branch(
    gain: float, start: float, branch: float, own: float, passing: float, share: float
) -> None:
    """y = relu(f(g(x)) + slice(x)): x reaches y on two ways."""
    energies = {"x": Energy(5.0, start), "g": Energy(5.0, start + branch)}
    carried = gain * energies["g"].noise
    energies["y"] = Energy(4.0, carried + passing * share * start + own)
    flows = [Flow("g", {"x": 1.0}), Flow("y", {"g": 1.0}, {"x": share}, passing=passing)]
    found = output_gains(flows, energies, {"g": branch, "y": own}, ["y"])
    least = 0.05 * energies["y"].noise
    assert found["g"] == pytest.approx(max(carried, least) / energies["g"].noise / 4.0)
    first = max(start, 0.05 * energies["g"].noise) / start
    assert found["x"] == pytest.approx(passing * share / 4.0 + found["g"] * first)


def test_joins_pass_on_energy_and_products_relative_noise() -> None:
    energies = {"a": Energy(100.0, 1.0), "b": Energy(1.0, 1.0), "y": Energy(10.0, 2.0)}
    both = {"a": 1.0, "b": 1.0}
    assert source_gains(Flow("y", both, joins=True), energies, 0.0) == pytest.approx({"a": 1.0, "b": 1.0})
    found = source_gains(Flow("y", both), energies, 0.0)  # the relative noise of b is a hundred times that of a
    assert found["b"] / found["a"] == pytest.approx(100.0) and found["a"] + found["b"] == pytest.approx(2.0)


@given(NOISES, NOISES, NOISES, st.floats(0.2, 1.0), st.floats(0.1, 4.0))
def test_what_weights_carry_and_residuals_add_up_to_what_was_measured(
    start: float, branch: float, own: float, passing: float, agreement: float
) -> None:
    """carried is measured by itself; where the branch undoes or repeats noise of the residual, both are scaled alike."""
    energies = {"x": Energy(5.0, start), "g": Energy(5.0, branch)}
    carried = 0.7 * branch
    arriving = agreement * (carried + passing * start)
    energies["y"] = Energy(4.0, arriving + own)
    flow = Flow("y", {"g": 1.0}, {"x": 1.0}, passing=passing, carried=carried)
    found = source_gains(flow, energies, own)
    scale = max(arriving, 0.05 * energies["y"].noise) / (carried + passing * start)
    assert found["g"] == pytest.approx(scale * 0.7) and found["x"] == pytest.approx(scale * passing)
    assert found["g"] * branch + found["x"] * start == pytest.approx(scale * (carried + passing * start))


def test_values_without_noise_or_way_to_an_output() -> None:
    energies = {"x": Energy(1.0, 0.0), "y": Energy(1.0, 0.5), "z": Energy(2.0, 0.5), "aside": Energy(1.0, 0.1)}
    flows = [Flow("y", {"x": 1.0}), Flow("z", {"y": 1.0}), Flow("aside", {"y": 1.0})]
    found = output_gains(flows, energies, {"y": 0.5}, ["z"])
    assert set(found) == {"z", "y"}
    assert found["y"] == pytest.approx(0.5)  # all of the output's noise came from y
    assert output_gains(flows, energies, {}, []) == {}
    # Noise measured smaller than what the operation itself is said to add: a little still counts as carried.
    assert source_gains(flows[1], energies, 9.0)["y"] == pytest.approx(0.05)
