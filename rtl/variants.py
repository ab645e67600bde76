"""Other elements to compare areas with: plain 8-bit, a shifter in every element, and 2 bits."""

from __future__ import annotations

from amaranth.hdl import Cat, Elaboratable, Module, Mux, Signal, signed

from rtl.element import DualProduct


class QuadProduct(Elaboratable):
    """The dual product with a third mode on the same four multipliers. two: a and w hold four 2-bit values each, product is the
    sum of their products. Weights are signed, activations signed where `sign` is 1."""

    def __init__(self) -> None:
        self.a = Signal(8)
        self.w = Signal(8)
        self.low = Signal()
        self.two = Signal()
        self.sign = Signal()
        self.product = Signal(signed(17))

    def ports(self) -> list[Signal]:
        return [self.a, self.w, self.low, self.two, self.sign, self.product]

    def elaborate(self, platform: object) -> Module:
        m = Module()
        a_hi = Cat(self.a[4:8], self.a[7] & self.sign).as_signed()
        a_lo = Cat(self.a[0:4], self.a[3] & self.sign & self.low).as_signed()
        w_hi = Cat(self.w[4:8], self.w[7]).as_signed()
        w_lo = Cat(self.w[0:4], self.w[3] & self.low).as_signed()
        parts = []
        for i, (a, w) in enumerate(((a_lo, w_lo), (a_hi, w_lo), (a_lo, w_hi), (a_hi, w_hi))):
            narrow_a = Cat(self.a[2 * i : 2 * i + 2], self.a[2 * i + 1] & self.sign).as_signed()
            narrow_w = self.w[2 * i : 2 * i + 2].as_signed()
            left, right = (Signal(signed(5), name=f"{side}_{i}") for side in ("left", "right"))
            part = Signal(signed(10), name=f"part_{i}")
            m.d.comb += [
                left.eq(Mux(self.two, narrow_a, a)), right.eq(Mux(self.two, narrow_w, w)), part.eq(left * right),
            ]  # fmt: skip
            parts.append(part)
        ll, x1, x2, hh = parts
        cross = Signal(signed(11))
        m.d.comb += [
            cross.eq(Mux(self.low, 0, x1 + x2)),
            self.product.eq(Mux(self.low | self.two, hh, hh << 8) + Mux(self.two, cross, cross << 4) + ll),
        ]
        return m


class PlainElement(Elaboratable):
    """One 8x8 multiply of a signed or unsigned activation; no low mode."""

    def __init__(self, sum_bits: int, low: bool = False, shift: bool = False, two: bool = False) -> None:
        """low: the dual product. shift: the sum of a low pass is shifted here, not at the column's foot (sums are wider then).
        two: and products of 2 bits (needs low)."""
        self.low, self.shifting, self.two = low, shift, two
        self.sum_bits = 32 if shift else sum_bits
        wanted = {"a": 8, "sign": 1, "swap": 1, "low": int(low), "shift": 4 * shift, "two": int(two)}
        names = {name: bits for name, bits in wanted.items() if bits}
        self.into = {name: Signal(bits, name=f"{name}_i") for name, bits in names.items()}
        self.out = {name: Signal(bits, name=f"{name}_o") for name, bits in names.items()}
        self.w_i = Signal(8)
        self.load = Signal()
        self.p_i = Signal(signed(self.sum_bits))
        self.p_o = Signal(signed(self.sum_bits))

    def ports(self) -> list[Signal]:
        return [*self.into.values(), *self.out.values(), self.w_i, self.load, self.p_i, self.p_o]

    def elaborate(self, platform: object) -> Module:
        m = Module()
        waiting = Signal(8)
        weight = Signal(8)
        with m.If(self.load):
            m.d.sync += waiting.eq(self.w_i)
        with m.If(self.into["swap"]):
            m.d.sync += weight.eq(waiting)
        m.d.sync += [self.out[name].eq(signal) for name, signal in self.into.items()]
        product = Signal(signed(17))
        a = self.into["a"]
        if self.low:
            m.submodules.multiply = multiply = QuadProduct() if self.two else DualProduct()
            m.d.comb += [
                multiply.a.eq(a), multiply.w.eq(weight), multiply.low.eq(self.into["low"]),
                multiply.sign.eq(self.into["sign"]), product.eq(multiply.product),
            ]  # fmt: skip
            if isinstance(multiply, QuadProduct):
                m.d.comb += multiply.two.eq(self.into["two"])
        else:
            wide = Signal(signed(9))
            m.d.comb += [wide.eq(Mux(self.into["sign"], a.as_signed(), a)), product.eq(wide * weight.as_signed())]
        if self.shifting:
            m.d.sync += self.p_o.eq(self.p_i + Mux(self.into["low"], product << self.into["shift"], product))
        else:
            m.d.sync += self.p_o.eq(self.p_i + product)
        return m
