"""The fast inner product (Winograd 1968; as an array: Pogue and Nicolici, arXiv 2311.12224), to compare areas with.

(a1 + w2)(a2 + w1) = a1 w1 + a2 w2 + a1 a2 + w1 w2: two products of a column by one multiplier. The sum of all a1 a2 is the same
for every column, so that one multiplier a row takes it off; that of w1 w2 is a constant of the pass and column.
"""

from __future__ import annotations

from amaranth.hdl import Elaboratable, Module, Mux, Signal, signed


class FastElement(Elaboratable):
    """Two 8x8 products a cycle. Ports as those of `rtl.element.Element`, two bytes each. Sums are modulo 2^sum_bits: they may
    run over, for what is taken off at the foot brings them back."""

    def __init__(self, sum_bits: int) -> None:
        self.a_i = Signal(16)
        self.a_o = Signal(16)
        self.sign_i = Signal()
        self.sign_o = Signal()
        self.swap_i = Signal()
        self.swap_o = Signal()
        self.w_i = Signal(16)
        self.load = Signal()
        self.p_i = Signal(signed(sum_bits))
        self.p_o = Signal(signed(sum_bits))

    def ports(self) -> list[Signal]:
        return [self.a_i, self.a_o, self.sign_i, self.sign_o, self.swap_i, self.swap_o, self.w_i, self.load, self.p_i, self.p_o]

    def elaborate(self, platform: object) -> Module:
        m = Module()
        waiting = Signal(16)
        weight = Signal(16)
        with m.If(self.load):
            m.d.sync += waiting.eq(self.w_i)
        with m.If(self.swap_i):
            m.d.sync += weight.eq(waiting)
        factors = []
        for half in range(2):
            a = self.a_i.word_select(half, 8)
            factor = Signal(signed(10), name=f"factor_{half}")
            m.d.comb += factor.eq(Mux(self.sign_i, a.as_signed(), a) + weight.word_select(1 - half, 8).as_signed())
            factors.append(factor)
        m.d.sync += [
            self.a_o.eq(self.a_i), self.sign_o.eq(self.sign_i), self.swap_o.eq(self.swap_i),
            self.p_o.eq(self.p_i + factors[0] * factors[1]),
        ]  # fmt: skip
        return m


class PairProduct(Elaboratable):
    """One row's a1 a2, added to those of the rows above; stands beside the first column."""

    def __init__(self, sum_bits: int) -> None:
        self.a_i = Signal(16)
        self.sign_i = Signal()
        self.p_i = Signal(signed(sum_bits))
        self.p_o = Signal(signed(sum_bits))

    def ports(self) -> list[Signal]:
        return [self.a_i, self.sign_i, self.p_i, self.p_o]

    def elaborate(self, platform: object) -> Module:
        m = Module()
        factors = []
        for half in range(2):
            a = self.a_i.word_select(half, 8)
            factor = Signal(signed(9), name=f"factor_{half}")
            m.d.comb += factor.eq(Mux(self.sign_i, a.as_signed(), a))
            factors.append(factor)
        m.d.sync += self.p_o.eq(self.p_i + factors[0] * factors[1])
        return m


class FastFoot(Elaboratable):
    """Takes off a column's sum that of a1 a2, which travels from column to column, and that of w1 w2 (`pairs`, from a bank)."""

    def __init__(self, sum_bits: int) -> None:
        self.p = Signal(signed(sum_bits))
        self.pairs = Signal(signed(sum_bits))
        self.alpha_i = Signal(signed(sum_bits))
        self.alpha_o = Signal(signed(sum_bits))
        self.shifted = Signal(signed(32))

    def ports(self) -> list[Signal]:
        return [self.p, self.pairs, self.alpha_i, self.alpha_o, self.shifted]

    def elaborate(self, platform: object) -> Module:
        m = Module()
        rest = Signal.like(self.p, name="rest")
        m.d.comb += [rest.eq(self.p - self.alpha_i - self.pairs), self.shifted.eq(rest)]
        m.d.sync += self.alpha_o.eq(self.alpha_i)
        return m
