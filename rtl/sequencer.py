"""Walks the instruction words: settings, the chunk table, and the passes of a job with one loader and one feeder.

The loader brings the weights of a pass into the waiting registers; the feeder streams the pixels of the pass before meanwhile.
Tiles follow each other in this order: column tile, chunk, row of taps, tap, half. How many cycles that takes is written down
in `bitdial.engines.npu.cycles`, which the tests hold against this module.
"""

from __future__ import annotations

from amaranth.hdl import Cat, Elaboratable, Module, Mux, Signal, signed, unsigned
from amaranth.lib.data import StructLayout, View
from amaranth.lib.memory import Memory

from bitdial.engines.npu.words import MAX_CHUNKS, Fault, Operation, Setting
from rtl.array import FEED, LOAD

PASS = StructLayout({
    "address": 16, "y": signed(16), "x": signed(16), "low": 1, "half": 1, "shift": 3, "clear": 1, "sum": 16, "shifts": 16,
})  # fmt: skip


class Sequencer(Elaboratable):
    """start: for one cycle. word: the instruction at `counter` of the cycle before. faults: one bit per Fault, for one cycle."""

    def __init__(self, rows: int, drain: int) -> None:
        self.rows, self.drain = rows, drain
        self.start = Signal()
        self.length = Signal(16)
        self.counter = Signal(16)
        self.word = Signal(32)
        self.busy = Signal()
        self.finished = Signal()
        self.truncated = Signal()
        self.illegal = Signal()
        self.empty = Signal()
        self.feed = Signal(FEED)
        self.load = Signal(LOAD)
        self.settings = {
            s: Signal(signed(16) if s in (Setting.X_FIRST, Setting.Y_FIRST) else unsigned(16), name=s.name.lower())
            for s in Setting
        }

    def fault(self, which: Fault) -> Signal:
        return {Fault.TRUNCATED: self.truncated, Fault.ILLEGAL: self.illegal, Fault.EMPTY: self.empty}[which]

    def elaborate(self, platform: object) -> Module:
        m = Module()
        s = self.settings
        m.submodules.table = table = Memory(shape=unsigned(32), depth=MAX_CHUNKS, init=[])
        entry_port, entry_write = table.read_port(domain="comb"), table.write_port()
        m.d.comb += [entry_write.addr.eq(s[Setting.COUNT]), entry_write.data.eq(self.word)]
        job_start = Signal()
        pending = Signal()
        offered = Signal(PASS)
        taken = Signal()
        loading = Signal()
        feeding = Signal()
        self._loader(m, entry_port, job_start, loading, pending, offered, taken)
        self._feeder(m, pending, offered, taken, feeding)

        value, operation, setting = self.word[0:16], self.word[28:32], self.word[20:28]
        wait = Signal(range(self.drain + 2))
        sizes = [
            Setting.COUNT, Setting.WIDTH, Setting.HEIGHT, Setting.OUT_WIDTH, Setting.OUT_HEIGHT, Setting.KERNEL_WIDTH,
            Setting.KERNEL_HEIGHT, Setting.TILES, Setting.PIXELS,
        ]  # fmt: skip
        some_empty = Cat(*(s[size] == 0 for size in sizes)).any()
        m.d.comb += self.busy.eq(1)
        with m.FSM():
            with m.State("IDLE"):
                m.d.comb += self.busy.eq(0)
                with m.If(self.start):
                    m.d.sync += self.counter.eq(0)
                    m.next = "FETCH"
            with m.State("FETCH"):
                with m.If(self.counter >= self.length):
                    m.d.comb += self.truncated.eq(1)
                    m.next = "DRAIN"
                m.d.sync += wait.eq(0)
                with m.If(self.counter < self.length):
                    m.next = "EXECUTE"
            with m.State("EXECUTE"):
                m.d.sync += self.counter.eq(self.counter + 1)
                m.next = "FETCH"
                with m.Switch(operation):
                    with m.Case(Operation.SET), m.Switch(setting):
                        for which, signal in s.items():
                            with m.Case(which):
                                m.d.sync += signal.eq(value)
                        with m.Default():
                            m.d.comb += self.illegal.eq(1)
                            m.next = "DRAIN"
                    with m.Case(Operation.CHUNK):
                        with m.If(s[Setting.COUNT] >= MAX_CHUNKS):
                            m.d.comb += self.illegal.eq(1)
                            m.next = "DRAIN"
                        with m.Else():
                            m.d.comb += entry_write.en.eq(1)
                            m.d.sync += s[Setting.COUNT].eq(s[Setting.COUNT] + 1)
                    with m.Case(Operation.RUN):
                        with m.If(some_empty | (s[Setting.COUNT] > MAX_CHUNKS)):
                            m.d.comb += self.empty.eq(1)
                            m.next = "DRAIN"
                        with m.Else():
                            m.d.comb += job_start.eq(1)
                            m.next = "RUN"
                    with m.Case(Operation.END):
                        m.next = "DRAIN"
                    with m.Default():
                        m.d.comb += self.illegal.eq(1)
                        m.next = "DRAIN"
            with m.State("RUN"), m.If(~loading & ~pending & ~feeding):
                m.next = "FETCH"
            with m.State("DRAIN"):  # the last sums are on their way
                m.d.sync += wait.eq(wait + 1)
                with m.If(wait == self.drain):
                    m.d.comb += self.finished.eq(1)
                    m.next = "IDLE"
        return m

    def _loader(
        self, m: Module, entry_port: object, job_start: Signal, loading: Signal, pending: Signal, offered: View, taken: Signal
    ) -> None:
        s = self.settings
        tile, chunk, ky, kx = (Signal(16, name=f"at_{n}") for n in ("tile", "chunk", "ky", "kx"))
        half = Signal()
        row = Signal(range(max(2, self.rows)))
        base = Signal(16)
        address = Signal(16)
        tap = Signal(16)
        line = Signal(16)
        x = Signal(signed(16))
        y = Signal(signed(16))
        sums = Signal(16)
        shifts = Signal(16)
        entry = Signal(32)
        m.d.comb += [entry_port.addr.eq(chunk), entry.eq(entry_port.data)]
        has_low, two, second = entry[24], entry[25], entry[26]
        low = Signal()
        m.d.comb += low.eq(has_low & (chunk < s[Setting.LOW]))
        with m.If(job_start):
            m.d.sync += [
                loading.eq(1), tile.eq(0), chunk.eq(0), ky.eq(0), kx.eq(0), half.eq(0), row.eq(0),
                base.eq(s[Setting.WEIGHTS]), shifts.eq(s[Setting.SHIFTS]), sums.eq(s[Setting.SUMS]),
                tap.eq(s[Setting.ORIGIN]), line.eq(s[Setting.ORIGIN]),
                x.eq(s[Setting.X_FIRST]), y.eq(s[Setting.Y_FIRST]),
            ]  # fmt: skip
        issue = Signal()
        start = base + Mux(low, 0, Mux(has_low, self.rows, 0) + Mux(half, self.rows, 0))
        m.d.comb += [
            issue.eq(loading & ((row != 0) | ~pending)),
            self.load.valid.eq(issue),
            self.load.row.eq(row),
            self.load.address.eq(Mux(row == 0, start, address)),
        ]
        with m.If(taken):
            m.d.sync += pending.eq(0)
        with m.If(issue):
            m.d.sync += [address.eq(self.load.address + 1), row.eq(Mux(row == self.rows - 1, 0, row + 1))]
        with m.If(issue & (row == 0)):
            m.d.sync += [
                pending.eq(1),
                offered.address.eq(tap + entry[0:16]),
                offered.y.eq(y), offered.x.eq(x), offered.low.eq(low), offered.half.eq(half | second),
                offered.shift.eq(entry[20:23]), offered.shifts.eq(shifts), offered.sum.eq(sums),
                offered.clear.eq((chunk == 0) & (ky == 0) & (kx == 0) & ~half),
            ]  # fmt: skip
        with m.If(issue & (row == self.rows - 1)):
            with m.If(two & ~low & ~half):
                m.d.sync += half.eq(1)
            with m.Else():
                m.d.sync += [
                    half.eq(0),
                    base.eq(base + self.rows + Mux(has_low, self.rows, 0) + Mux(two, self.rows, 0)),
                    kx.eq(kx + 1), tap.eq(tap + s[Setting.X_TAP]), x.eq(x + s[Setting.X_DILATION].as_signed()),
                ]  # fmt: skip
                with m.If(kx + 1 == s[Setting.KERNEL_WIDTH]):
                    m.d.sync += [
                        kx.eq(0), ky.eq(ky + 1), x.eq(s[Setting.X_FIRST]), y.eq(y + s[Setting.Y_DILATION].as_signed()),
                        line.eq(line + s[Setting.Y_TAP]), tap.eq(line + s[Setting.Y_TAP]),
                    ]  # fmt: skip
                    with m.If(ky + 1 == s[Setting.KERNEL_HEIGHT]):
                        m.d.sync += [
                            ky.eq(0), chunk.eq(chunk + 1), shifts.eq(shifts + 1),
                            y.eq(s[Setting.Y_FIRST]), line.eq(s[Setting.ORIGIN]), tap.eq(s[Setting.ORIGIN]),
                        ]  # fmt: skip
                        with m.If(chunk + 1 == s[Setting.COUNT]):
                            m.d.sync += [chunk.eq(0), tile.eq(tile + 1), sums.eq(sums + s[Setting.PIXELS])]
                            with m.If(tile + 1 == s[Setting.TILES]):
                                m.d.sync += loading.eq(0)

    def _feeder(self, m: Module, pending: Signal, offered: View, taken: Signal, feeding: Signal) -> None:
        s = self.settings
        current = Signal(PASS)
        ox = Signal(16)
        oy = Signal(16)
        sum_address = Signal(16)
        address = Signal(16)
        line = Signal(16)
        x = Signal(signed(16))
        y = Signal(signed(16))
        first = Signal()
        last = Signal()
        row_ends = ox + 1 == s[Setting.OUT_WIDTH]
        m.d.comb += [
            last.eq(row_ends & (oy + 1 == s[Setting.OUT_HEIGHT])),
            taken.eq(pending & (~feeding | last)),
            self.feed.valid.eq(feeding),
            self.feed.inside.eq((x >= 0) & (y >= 0) & (x < s[Setting.WIDTH]) & (y < s[Setting.HEIGHT])),
            self.feed.first.eq(first),
            self.feed.low.eq(current.low),
            self.feed.sign.eq(s[Setting.SIGNED][0]),
            self.feed.half.eq(current.half),
            self.feed.shift.eq(current.shift),
            self.feed.address.eq(address),
            self.feed.clear.eq(current.clear),
            self.feed.sum.eq(sum_address),
            self.feed.shifts.eq(current.shifts),
        ]
        with m.If(feeding):
            m.d.sync += [
                first.eq(0), ox.eq(ox + 1), sum_address.eq(sum_address + 1), address.eq(address + s[Setting.X_STEP]),
                x.eq(x + s[Setting.X_STRIDE].as_signed()),
            ]  # fmt: skip
            with m.If(row_ends):
                m.d.sync += [
                    ox.eq(0), oy.eq(oy + 1), x.eq(current.x), y.eq(y + s[Setting.Y_STRIDE].as_signed()),
                    line.eq(line + s[Setting.Y_STEP]), address.eq(line + s[Setting.Y_STEP]),
                ]  # fmt: skip
            with m.If(last):
                m.d.sync += feeding.eq(0)
        with m.If(taken):
            m.d.sync += [
                feeding.eq(1), first.eq(1), ox.eq(0), oy.eq(0), current.eq(offered), sum_address.eq(offered.sum),
                address.eq(offered.address), line.eq(offered.address), x.eq(offered.x), y.eq(offered.y),
            ]  # fmt: skip
