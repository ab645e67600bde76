"""Precision per layer under budgets: layers ranked once, raised in that order while the budgets hold. NumPy only.

Every layer starts at its cheapest precision. A step raises one layer to its next precision worth having; steps are sorted
once, by what they gain per cost ("density"), or layer by layer, the most sensitive first ("score"). No search, no
evaluation of candidates. Source: QuantuneV2 (arXiv 2501.07161): sensitive layers get the higher precision under the
budget; what to do with more than two precisions and how to weigh costs is left open there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from bitdial.errors import BudgetError, SelectionError

ORDERS = ("density", "score")
_SLACK = 1e-9  # relative; sums of floats against a limit


@dataclass(frozen=True)
class Option:
    """A precision of a layer: loss (any unit, >= 0), bytes, seconds (or any unit of time)."""

    precision: str
    loss: float
    size: float
    seconds: float


Price = Callable[[Option], float]


@dataclass(frozen=True)
class LayerOptions:
    """What a layer may be."""

    name: str
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Step:
    """One layer raised from an option to a better one."""

    layer: str
    before: Option
    after: Option


@dataclass
class Plan:
    """Layer -> option, and how it came about: the steps taken, in order, from the cheapest options."""

    chosen: dict[str, Option]
    steps: list[Step] = field(default_factory=list)

    @property
    def precisions(self) -> dict[str, str]:
        return {name: option.precision for name, option in self.chosen.items()}

    @property
    def size(self) -> float:
        return sum(option.size for option in self.chosen.values())

    @property
    def seconds(self) -> float:
        return sum(option.seconds for option in self.chosen.values())

    @property
    def loss(self) -> float:
        return sum(option.loss for option in self.chosen.values())

    def prefix(self, count: int) -> Plan:
        """The plan after the first `count` steps only."""
        chosen = dict(self.chosen)
        for step in reversed(self.steps[count:]):
            chosen[step.layer] = step.before
        return Plan(chosen, self.steps[:count])


def make_plan(
    layers: Sequence[LayerOptions],
    *,
    size: float | None = None,
    seconds: float | None = None,
    order: str = "density",
    cost: str = "size",
) -> Plan:
    """The plan that uses the budgets up.

    size, seconds: limits on the sums over the layers; None: no limit. order: "density" or "score". cost: what steps cost
    where neither is limited, "size" or "seconds". A step that does not fit is passed over, with the later ones of its layer.
    Raises SelectionError for no layers or a layer without options, BudgetError where even the cheapest options exceed a
    limit.
    """
    if not layers or not all(layer.options for layer in layers):
        raise SelectionError("a layer-wise plan needs layers, each with at least one precision")
    if order not in ORDERS:
        raise SelectionError(f"order {order!r} is unknown: choose one of {', '.join(ORDERS)}")
    for limit, unit in ((size, "size"), (seconds, "seconds")):
        least = sum(min(_amount(o, unit) for o in layer.options) for layer in layers)
        if limit is not None and least > limit * (1 + _SLACK):
            raise BudgetError(f"the layers need at least {least:.6g} ({unit}), the budget leaves {limit:.6g}", least)

    def together(option: Option) -> float:
        return (0.0 if size is None else option.size / size) + (0.0 if seconds is None else option.seconds / seconds)

    prices: list[Price] = [lambda o: _amount(o, cost)] if size is None and seconds is None else [together]
    if size is not None and seconds is not None:  # where small and fast are not the same, start from either
        prices += [lambda o: o.size, lambda o: o.seconds]
    for price in prices:
        ladders = {layer.name: worth_having(layer.options, price) for layer in layers}
        plan = Plan({name: ladder[0] for name, ladder in ladders.items()})
        if _within(plan.size, size) and _within(plan.seconds, seconds):
            _raise_layers(plan, ladders, price, size, seconds, order)
            return plan
    raise BudgetError(
        f"size and time budgets cannot be met together: the smallest plan takes {plan.seconds:.6g} (seconds)", plan.seconds
    )


def _amount(option: Option, unit: str) -> float:
    return option.size if unit == "size" else option.seconds


def _within(total: float, limit: float | None) -> bool:
    return limit is None or total <= limit * (1 + _SLACK)


def _raise_layers(
    plan: Plan, ladders: Mapping[str, Sequence[Option]], price: Price, size: float | None, seconds: float | None, order: str
) -> None:
    """Take the steps that fit, in place."""
    steps = [
        Step(name, before, after)
        for name, ladder in ladders.items()
        for before, after in zip(ladder[:-1], ladder[1:], strict=True)
    ]
    if order == "score":
        keys = [-ladders[s.layer][0].loss for s in steps]
    else:
        keys = [-(s.before.loss - s.after.loss) / max(price(s.after) - price(s.before), 1e-300) for s in steps]
    closed: set[str] = set()
    total_size, total_seconds = plan.size, plan.seconds
    for index in np.argsort(np.array(keys), kind="stable"):  # stable: steps of one layer with equal keys stay in order
        step = steps[int(index)]
        if step.layer in closed:
            continue
        new_size = total_size + step.after.size - step.before.size
        new_seconds = total_seconds + step.after.seconds - step.before.seconds
        if not (_within(new_size, size) and _within(new_seconds, seconds)):
            closed.add(step.layer)
            continue
        total_size, total_seconds = new_size, new_seconds
        plan.chosen[step.layer] = step.after
        plan.steps.append(step)


def worth_having(options: Sequence[Option], price: Price) -> list[Option]:
    """The options of a layer on the lower convex hull of loss over price, by rising price: the gain per price falls from step to
    step, so that sorting by it never asks for a later step first."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (price(o), o.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            first = (a.loss - b.loss) * (price(option) - price(b))
            second = (b.loss - option.loss) * (price(b) - price(a))
            if first > second:
                break
            hull.pop()
        hull.append(option)
    return hull


@dataclass(frozen=True)
class FloorResult:
    """The shortest measured prefix of a plan that meets an accuracy floor; measured: steps -> accuracy."""

    plan: Plan
    accuracy: float
    measured: Mapping[int, float]


def meet_floor(plan: Plan, floor: float, measure: Callable[[Plan], float]) -> FloorResult:
    """Take back the last steps of a plan as far as the accuracy floor allows.

    measure: plan -> accuracy, called about log2(steps) times. That more steps never hurt is assumed while halving; the plan
    returned was itself measured and meets the floor. Raises BudgetError, with the best accuracy measured, where the whole plan
    does not.
    """
    measured: dict[int, float] = {}

    def accuracy(count: int) -> float:
        if count not in measured:
            measured[count] = float(measure(plan.prefix(count)))
        return measured[count]

    high = len(plan.steps)
    if accuracy(high) < floor:
        best = max(measured.values())
        raise BudgetError(
            f"the most accurate plan within the other budgets reaches {100 * best:.2f} %, the floor is {100 * floor:.2f} %", best
        )
    low = -1
    while high - low > 1:
        middle = (low + high) // 2
        if accuracy(middle) >= floor:
            high = middle
        else:
            low = middle
    return FloorResult(plan.prefix(high), measured[high], measured)
