"""The whole unit behind a register bus (`bitdial.engines.npu.words` has the map)."""

from __future__ import annotations

from amaranth.hdl import Cat, Elaboratable, Module, Mux, Signal, unsigned
from amaranth.lib.memory import Memory as Store

from bitdial.engines.npu.words import Fault, Memory, Register
from rtl.array import Array
from rtl.sequencer import Sequencer


class Npu(Elaboratable):
    """Bus: `address` a Register; `write` with `write_data` for one cycle; `read` for one cycle, `read_data` the cycle after, two
    cycles after an access that moved ADDRESS. Depths are entries per bank."""

    def __init__(
        self,
        rows: int = 32,
        columns: int = 32,
        *,
        words: int = 1024,
        activations: int = 4096,
        weights: int = 8192,
        shifts: int = 256,
        sums: int = 4096,
    ) -> None:
        if rows < 4 or columns < 1 or rows > 4095 or columns > 4095:
            raise ValueError(f"an array of {rows} rows and {columns} columns: 4..4095 rows and 1..4095 columns are possible")
        self.rows, self.columns, self.words = rows, columns, words
        self.array = Array(rows, columns, activations, weights, shifts, sums)
        self.sequencer = Sequencer(rows, self.array.latency())
        self.address = Signal(3)
        self.write = Signal()
        self.write_data = Signal(32)
        self.read = Signal()
        self.read_data = Signal(32)
        self.program = Store(shape=unsigned(32), depth=words, init=[])
        self.status = Signal(8)
        self.cycles = Signal(32)
        self.length = Signal(16)

    def ports(self) -> list[Signal]:
        return [self.address, self.write, self.write_data, self.read, self.read_data]

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.array = array = self.array
        m.submodules.sequencer = sequencer = self.sequencer
        m.submodules.program = self.program
        fetch, store = self.program.read_port(), self.program.write_port()
        select = Signal(16)
        place = Signal(16)
        done = Signal()
        faults = {fault: Signal(name=fault.name.lower()) for fault in Fault}
        busy = sequencer.busy
        write = Signal()
        refused = Signal()
        m.d.comb += [
            write.eq(self.write & (~busy | (self.address == Register.STATUS))),
            refused.eq(self.write & busy & (self.address != Register.STATUS)),
            self.status.eq(Cat(busy, done, 0, 0, *(faults[f] for f in sorted(Fault)))),
            array.feed.eq(sequencer.feed),
            array.load.eq(sequencer.load),
            array.host_bank.eq(select[0:12]),
            array.host_address.eq(place),
            array.host_data.eq(self.write_data),
            fetch.addr.eq(sequencer.counter[: len(fetch.addr)]),
            fetch.en.eq(1),
            sequencer.word.eq(fetch.data),
            sequencer.length.eq(self.length),
            sequencer.start.eq(write & (self.address == Register.CONTROL) & self.write_data[0]),
            store.addr.eq(place[: len(store.addr)]),
            store.data.eq(self.write_data),
        ]
        data_written = Signal()
        m.d.comb += data_written.eq(write & (self.address == Register.DATA))
        with m.Switch(select[12:16]):
            for memory, enable in (
                (Memory.INSTRUCTIONS, store.en),
                (Memory.ACTIVATIONS, array.host_activation),
                (Memory.WEIGHTS, array.host_weight),
                (Memory.SHIFTS, array.host_shift),
            ):
                with m.Case(memory):
                    m.d.comb += enable.eq(data_written)
        with m.If(busy):
            m.d.sync += self.cycles.eq(self.cycles + 1)
        with m.If(write), m.Switch(self.address):
            with m.Case(Register.STATUS):
                m.d.sync += [done.eq(0), *(fault.eq(0) for fault in faults.values())]
            with m.Case(Register.CONTROL):
                m.d.sync += [self.cycles.eq(0), done.eq(0)]
            with m.Case(Register.LENGTH):
                m.d.sync += self.length.eq(Mux(self.write_data[0:16] > self.words, self.words, self.write_data))
            with m.Case(Register.SELECT):
                m.d.sync += select.eq(self.write_data)
            with m.Case(Register.ADDRESS):
                m.d.sync += place.eq(self.write_data)
        with m.If(data_written | (self.read & (self.address == Register.DATA))):
            m.d.sync += place.eq(place + 1)
        with m.If(sequencer.finished):
            m.d.sync += done.eq(1)
        for fault in (Fault.TRUNCATED, Fault.ILLEGAL, Fault.EMPTY):
            with m.If(sequencer.fault(fault)):
                m.d.sync += faults[fault].eq(1)
        with m.If(refused):
            m.d.sync += faults[Fault.BUSY_WRITE].eq(1)
        with m.If(self.read), m.Switch(self.address):
            for register, value in (
                (Register.STATUS, self.status),
                (Register.LENGTH, self.length),
                (Register.CYCLES, self.cycles),
                (Register.SELECT, select),
                (Register.ADDRESS, place),
                (Register.DATA, array.host_sum),
                (Register.SHAPE, self.rows | self.columns << 16),
            ):
                with m.Case(register):
                    m.d.sync += self.read_data.eq(value)
        return m
