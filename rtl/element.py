"""The processing element: four 5x5 signed multipliers make one 8x8 product or the sum of two 4x4 products."""

from __future__ import annotations

from amaranth.hdl import Cat, Elaboratable, Module, Mux, Signal, signed


class DualProduct(Elaboratable):
    """Combinational. low: a and w hold two 4-bit values each, product = a.lo * w.lo + a.hi * w.hi; else product = a * w.

    Weights are signed. Activations are signed where `sign` is 1, else unsigned, in either mode.
    """

    def __init__(self) -> None:
        self.a = Signal(8)
        self.w = Signal(8)
        self.low = Signal()
        self.sign = Signal()
        self.product = Signal(signed(17))

    def ports(self) -> list[Signal]:
        return [self.a, self.w, self.low, self.sign, self.product]

    def elaborate(self, platform: object) -> Module:
        m = Module()
        a_hi = Cat(self.a[4:8], self.a[7] & self.sign).as_signed()
        a_lo = Cat(self.a[0:4], self.a[3] & self.sign & self.low).as_signed()
        w_hi = Cat(self.w[4:8], self.w[7]).as_signed()
        w_lo = Cat(self.w[0:4], self.w[3] & self.low).as_signed()
        hh = Signal(signed(9))
        ll = Signal(signed(10))
        cross = Signal(signed(11))
        m.d.comb += [
            hh.eq(a_hi * w_hi),
            ll.eq(a_lo * w_lo),
            cross.eq(Mux(self.low, 0, a_hi * w_lo + a_lo * w_hi)),
            self.product.eq(Mux(self.low, hh, hh << 8) + (cross << 4) + ll),
        ]
        return m


class Element(Elaboratable):
    """a_*, swap_*, low_*, sign_*: the wave of activations, to the right. w_i, load: the column's weight bus and this row's
    enable; the byte waits in a second register until `swap` makes it the one in use. p_*: partial sums, downwards."""

    def __init__(self, sum_bits: int) -> None:
        self.a_i = Signal(8)
        self.a_o = Signal(8)
        self.low_i = Signal()
        self.low_o = Signal()
        self.sign_i = Signal()
        self.sign_o = Signal()
        self.swap_i = Signal()
        self.swap_o = Signal()
        self.w_i = Signal(8)
        self.load = Signal()
        self.p_i = Signal(signed(sum_bits))
        self.p_o = Signal(signed(sum_bits))

    def ports(self) -> list[Signal]:
        return [
            self.a_i, self.a_o, self.low_i, self.low_o, self.sign_i, self.sign_o, self.swap_i, self.swap_o, self.w_i, self.load,
            self.p_i, self.p_o,
        ]  # fmt: skip

    def elaborate(self, platform: object) -> Module:
        m = Module()
        waiting = Signal(8)
        weight = Signal(8)
        m.submodules.multiply = multiply = DualProduct()
        with m.If(self.load):
            m.d.sync += waiting.eq(self.w_i)
        with m.If(self.swap_i):
            m.d.sync += weight.eq(waiting)
        m.d.comb += [
            multiply.a.eq(self.a_i),
            multiply.w.eq(weight),
            multiply.low.eq(self.low_i),
            multiply.sign.eq(self.sign_i),
        ]
        m.d.sync += [
            self.a_o.eq(self.a_i),
            self.low_o.eq(self.low_i),
            self.sign_o.eq(self.sign_i),
            self.swap_o.eq(self.swap_i),
            self.p_o.eq(self.p_i + multiply.product),
        ]
        return m
