"""What stands at the array's edges: extraction of low activations on the left, the column's shift and accumulator below."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Elaboratable, Module, Mux, Signal, signed

LOW_UNSIGNED, LOW_SIGNED = 15, 7  # largest low activation


class Extract(Elaboratable):
    """clamp(round(x / 2^shift)), halves to even, to 0..15 or, with `sign`, -7..7. Combinational."""

    def __init__(self) -> None:
        self.x = Signal(8)
        self.shift = Signal(3)
        self.sign = Signal()
        self.low = Signal(4)

    def ports(self) -> list[Signal]:
        return [self.x, self.shift, self.sign, self.low]

    def elaborate(self, platform: object) -> Module:
        m = Module()
        wide = Signal(signed(9))
        shifted = Signal(signed(10))
        half = Signal(8)
        # x + (half - 1) + the lowest bit that stays, then the bits below are dropped: halves go to even
        stays = Signal()
        m.d.comb += [
            wide.eq(Cat(self.x, self.x[7] & self.sign).as_signed()),
            half.eq((Const(1, 8) << self.shift) >> 1),
            stays.eq(wide >> self.shift),
            shifted.eq(Mux(self.shift == 0, wide, (wide + half - 1 + stays) >> self.shift)),
        ]
        top = Mux(self.sign, LOW_SIGNED, LOW_UNSIGNED)
        with m.If(shifted > top):
            m.d.comb += self.low.eq(top)
        with m.Elif(self.sign & (shifted < -LOW_SIGNED)):
            m.d.comb += self.low.eq(-LOW_SIGNED)
        with m.Else():
            m.d.comb += self.low.eq(shifted)
        return m


class Foot(Elaboratable):
    """Shift at a column's foot: shifted = low ? p << shift : p, in 32 bits. Combinational."""

    def __init__(self, sum_bits: int) -> None:
        self.p = Signal(signed(sum_bits))
        self.shift = Signal(4)
        self.low = Signal()
        self.shifted = Signal(signed(32))

    def ports(self) -> list[Signal]:
        return [self.p, self.shift, self.low, self.shifted]

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.d.comb += self.shifted.eq(Mux(self.low, self.p << self.shift, self.p))
        return m
