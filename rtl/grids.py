"""The array without its banks and sequencer, of plain, dual or fast elements: to compare areas and frequencies with."""

from __future__ import annotations

from typing import Any

from amaranth.hdl import Cat, Elaboratable, Module, Mux, Signal, signed

from rtl.edges import Extract, Foot
from rtl.element import Element
from rtl.fast import FastElement, FastFoot, PairProduct
from rtl.variants import PlainElement

KINDS = ("plain 8-bit", "dual", "fast inner product")


class Grid(Elaboratable):
    """rows * columns 8-bit products a cycle; "fast inner product" has half the rows, of two channels each.

    Inputs come skewed, as the banks give them: row r a cycle after row r - 1, what is of the foot a cycle a column.
    x: two channels of a row, of which `half` chooses one at 8 bits (dual), one channel (plain), two (fast). sums_i: what a
    column's bank held; sums_o: with the pass added.
    """

    def __init__(self, kind: str, rows: int, columns: int) -> None:
        self.kind, self.columns = kind, columns
        self.fast, self.dual = kind == "fast inner product", kind == "dual"
        self.rows = rows // 2 if self.fast else rows
        self.sum_bits = 17 + (rows - 1).bit_length()
        byte = 16 if self.fast else 8
        self.x = [Signal(8 if kind == "plain 8-bit" else 16, name=f"x_{r}") for r in range(self.rows)]
        self.half = [Signal(name=f"half_{r}") for r in range(self.rows if self.dual else 0)]
        self.low = [Signal(name=f"low_{r}") for r in range(self.rows if self.dual else 0)]
        self.shift = [Signal(3, name=f"shift_{r}") for r in range(self.rows if self.dual else 0)]
        self.sign = [Signal(name=f"sign_{r}") for r in range(self.rows)]
        self.swap = [Signal(name=f"swap_{r}") for r in range(self.rows)]
        self.load = [Signal(range(self.rows + 1), name=f"load_{c}") for c in range(columns)]  # row, or `rows` for none
        self.w = [Signal(byte, name=f"w_{c}") for c in range(columns)]
        self.foot_low = [Signal(name=f"foot_low_{c}") for c in range(columns if self.dual else 0)]
        self.foot_shift = [Signal(4, name=f"foot_shift_{c}") for c in range(columns if self.dual else 0)]
        self.pairs = [Signal(signed(self.sum_bits), name=f"pairs_{c}") for c in range(columns if self.fast else 0)]
        self.sums_i = [Signal(signed(32), name=f"sum_{c}") for c in range(columns)]
        self.sums_o = [Signal(signed(32), name=f"sum_{c}_o") for c in range(columns)]

    def inputs(self) -> list[Signal]:
        return [
            *self.x, *self.half, *self.low, *self.shift, *self.sign, *self.swap, *self.load, *self.w, *self.foot_low,
            *self.foot_shift, *self.pairs, *self.sums_i,
        ]  # fmt: skip

    def ports(self) -> list[Signal]:
        return [*self.inputs(), *self.sums_o]

    def _element(self) -> Any:
        if self.fast:
            return FastElement(self.sum_bits)
        return Element(self.sum_bits) if self.dual else PlainElement(self.sum_bits)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        grid = [[self._element() for _ in range(self.columns)] for _ in range(self.rows)]
        for r, line in enumerate(grid):
            for c, element in enumerate(line):
                m.submodules[f"element_{r}_{c}"] = element
                m.d.comb += [element.w_i.eq(self.w[c]), element.load.eq(self.load[c] == r)]
                if c:
                    m.d.comb += [into.eq(out) for into, out in zip(wave(element, "_i"), wave(line[c - 1], "_o"), strict=True)]
                if r:
                    m.d.comb += element.p_i.eq(grid[r - 1][c].p_o)
            self._edge(m, r, line[0])
        alpha = self._pairs(m, [line[0] for line in grid]) if self.fast else None
        for c, last in enumerate(grid[-1]):
            shifted = Signal(signed(32), name=f"shifted_{c}")
            if self.fast:
                m.submodules[f"foot_{c}"] = foot = FastFoot(self.sum_bits)
                m.d.comb += [foot.pairs.eq(self.pairs[c]), foot.alpha_i.eq(alpha), foot.p.eq(last.p_o)]
                alpha = foot.alpha_o
                m.d.sync += shifted.eq(foot.shifted)
            elif self.dual:
                m.submodules[f"foot_{c}"] = plain = Foot(self.sum_bits)
                m.d.comb += [plain.low.eq(self.foot_low[c]), plain.shift.eq(self.foot_shift[c]), plain.p.eq(last.p_o)]
                m.d.sync += shifted.eq(plain.shifted)
            else:
                m.d.sync += shifted.eq(last.p_o)
            m.d.sync += self.sums_o[c].eq(self.sums_i[c] + shifted)
        return m

    def _edge(self, m: Module, r: int, first: Any) -> None:
        """Extraction of a row, and the register that its wave starts from."""
        value: Any = self.x[r]
        if self.dual:
            parts = []
            for half in range(2):
                m.submodules[f"extract_{r}_{half}"] = extract = Extract()
                m.d.comb += [
                    extract.x.eq(self.x[r].word_select(half, 8)), extract.shift.eq(self.shift[r]),
                    extract.sign.eq(self.sign[r]),
                ]  # fmt: skip
                parts.append(extract.low)
            value = Mux(self.low[r], Cat(*parts), self.x[r].word_select(self.half[r], 8))
        m.d.comb += port(first, "swap", "_i").eq(self.swap[r])  # a cycle before the pixel
        values = {"a": value, "sign": self.sign[r], **({"low": self.low[r]} if self.dual else {})}
        for name, start in values.items():
            staged = Signal.like(port(first, name, "_i"), name=f"row_{r}_{name}")
            m.d.sync += staged.eq(start)
            m.d.comb += port(first, name, "_i").eq(staged)

    def _pairs(self, m: Module, first: list[Any]) -> Signal:
        """The column that sums a1 a2; its foot."""
        above: Any = 0
        for r, element in enumerate(first):
            m.submodules[f"pairs_{r}"] = product = PairProduct(self.sum_bits)
            m.d.comb += [product.a_i.eq(element.a_i), product.sign_i.eq(element.sign_i), product.p_i.eq(above)]
            above = product.p_o
        return above


def port(element: Any, name: str, end: str) -> Signal:
    if isinstance(element, PlainElement):
        return (element.into if end == "_i" else element.out)[name]
    return getattr(element, name + end)  # type: ignore[no-any-return]


def wave(element: Any, end: str) -> list[Signal]:
    """What travels to the right."""
    names = ("a", "sign", "swap", "low") if isinstance(element, Element) else ("a", "sign", "swap")
    return [port(element, name, end) for name in names]


class Shifted(Elaboratable):
    """A part between shift registers, so that place and route times it whatever its number of ports: bit in, bit out."""

    def __init__(self, part: Any, outputs: list[Signal]) -> None:
        self.part, self.outputs = part, outputs
        self.inputs = [s for s in part.ports() if not any(s is o for o in outputs)]
        self.bit, self.parity = Signal(), Signal()

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.part = self.part
        chain = Signal(sum(len(s) for s in self.inputs))
        kept = Signal(sum(len(s) for s in self.outputs))
        m.d.comb += Cat(*self.inputs).eq(chain)
        m.d.sync += [chain.eq(Cat(self.bit, chain)), kept.eq(Cat(*self.outputs)), self.parity.eq(kept.xor())]
        return m
