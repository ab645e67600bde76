"""The systolic array with its banks. Addresses and flags travel from bank to bank, so that no data wait in skewing registers."""

from __future__ import annotations

from amaranth.hdl import Cat, Elaboratable, Module, Mux, Signal, signed, unsigned
from amaranth.lib.data import StructLayout
from amaranth.lib.memory import Memory

from rtl.edges import Extract, Foot
from rtl.element import Element

FEED = StructLayout({
    "valid": 1, "inside": 1, "first": 1, "low": 1, "sign": 1, "half": 1, "shift": 3, "address": 16,  # of activations
    "clear": 1, "sum": 16, "shifts": 16,  # at the column's foot
})  # fmt: skip
LOAD = StructLayout({"valid": 1, "row": 16, "address": 16})


class Bank:
    """One memory, read by the unit and read or written by the host while it is idle."""

    def __init__(self, m: Module, name: str, shape: object, depth: int) -> None:
        self.memory = Memory(shape=shape, depth=depth, init=[])
        m.submodules[name] = self.memory
        self.read, self.write = self.memory.read_port(), self.memory.write_port()
        self.address_bits = len(self.read.addr)

    def at(self, address: Signal) -> object:
        return address[: self.address_bits]


class Array(Elaboratable):
    """feed: one output pixel of one pass, a cycle. load: one row of weights, a cycle. Host: bank `host_bank` of the memory
    whose `host_*` enable is up is written at `host_address`; `host_sum` is column host_bank's sum at host_address of the
    cycle before, while nothing is fed."""

    def __init__(self, rows: int, columns: int, activations: int, weights: int, shifts: int, sums: int) -> None:
        self.rows, self.columns = rows, columns
        self.depths = activations, weights, shifts, sums
        self.sum_bits = 17 + (rows - 1).bit_length()
        self.feed = Signal(FEED)
        self.load = Signal(LOAD)
        self.host_bank = Signal(12)
        self.host_address = Signal(16)
        self.host_data = Signal(32)
        self.host_activation = Signal()
        self.host_weight = Signal()
        self.host_shift = Signal()
        self.host_sum = Signal(signed(32))
        self.activation_banks: list[Bank] = []
        self.weight_banks: list[Bank] = []
        self.shift_banks: list[Bank] = []
        self.sum_banks: list[Bank] = []

    def latency(self) -> int:
        """Cycles from a pixel's feed to the cycle after its last column's sum was written."""
        return self.rows + self.columns + 3

    def elaborate(self, platform: object) -> Module:
        m = Module()
        grid = [[Element(self.sum_bits) for _ in range(self.columns)] for _ in range(self.rows)]
        for r, line in enumerate(grid):
            for c, element in enumerate(line):
                m.submodules[f"element_{r}_{c}"] = element
                if c:
                    left = line[c - 1]
                    m.d.comb += [
                        element.a_i.eq(left.a_o), element.low_i.eq(left.low_o), element.sign_i.eq(left.sign_o),
                        element.swap_i.eq(left.swap_o),
                    ]  # fmt: skip
                if r:
                    m.d.comb += element.p_i.eq(grid[r - 1][c].p_o)
        self._rows(m, grid)
        self._columns(m, grid)
        return m

    def _host(self, m: Module, bank: Bank, enable: Signal, number: int) -> None:
        m.d.comb += [
            bank.write.addr.eq(bank.at(self.host_address)),
            bank.write.data.eq(self.host_data),
            bank.write.en.eq(enable & (self.host_bank == number)),
        ]

    def _rows(self, m: Module, grid: list[list[Element]]) -> None:
        wave = self.feed
        for r in range(self.rows):
            bank = Bank(m, f"activations_{r}", unsigned(16), self.depths[0])
            self.activation_banks.append(bank)
            self._host(m, bank, self.host_activation, r)
            m.d.comb += [bank.read.addr.eq(bank.at(wave.address)), bank.read.en.eq(1)]
            behind = Signal(FEED, name=f"behind_{r}")
            m.d.sync += behind.eq(wave)
            pair = Signal(16, name=f"pair_{r}")
            m.d.comb += pair.eq(Mux(behind.valid & behind.inside, bank.read.data, 0))
            parts = []
            for half in range(2):
                extract = Extract()
                m.submodules[f"extract_{r}_{half}"] = extract
                m.d.comb += [
                    extract.x.eq(pair.word_select(half, 8)),
                    extract.shift.eq(behind.shift),
                    extract.sign.eq(behind.sign),
                ]
                parts.append(extract.low)
            first = grid[r][0]
            m.d.comb += first.swap_i.eq(behind.first & behind.valid)
            for register, value in (
                (first.a_i, Mux(behind.low, Cat(*parts), pair.word_select(behind.half, 8))),
                (first.low_i, behind.low),
                (first.sign_i, behind.sign),
            ):
                staged = Signal.like(register, name=f"row_{r}_{register.name}")
                m.d.sync += staged.eq(value)
                m.d.comb += register.eq(staged)
            wave = behind

    def _columns(self, m: Module, grid: list[list[Element]]) -> None:
        wave, load = self.feed, self.load
        for i in range(self.rows + 1):  # as long as a pixel takes to the foot of column 0, less one for reading the shift
            later = Signal(FEED, name=f"down_{i}")
            m.d.sync += later.eq(wave)
            wave = later
        sums = []
        for c in range(self.columns):
            weights = Bank(m, f"weights_{c}", unsigned(8), self.depths[1])
            self.weight_banks.append(weights)
            self._host(m, weights, self.host_weight, c)
            loaded = Signal(LOAD, name=f"loaded_{c}")
            m.d.sync += loaded.eq(load)
            m.d.comb += [weights.read.addr.eq(weights.at(load.address)), weights.read.en.eq(1)]
            for r in range(self.rows):
                m.d.comb += [
                    grid[r][c].w_i.eq(weights.read.data),
                    grid[r][c].load.eq(loaded.valid & (loaded.row == r)),
                ]
            shifts = Bank(m, f"shifts_{c}", unsigned(4), self.depths[2])
            self.shift_banks.append(shifts)
            self._host(m, shifts, self.host_shift, c)
            m.d.comb += [shifts.read.addr.eq(shifts.at(wave.shifts)), shifts.read.en.eq(1)]
            at_foot = Signal(FEED, name=f"at_foot_{c}")
            summed = Signal(FEED, name=f"summed_{c}")
            m.submodules[f"foot_{c}"] = foot = Foot(self.sum_bits)
            shifted = Signal(signed(32), name=f"shifted_{c}")
            m.d.comb += [
                foot.p.eq(grid[self.rows - 1][c].p_o),
                foot.shift.eq(shifts.read.data),
                foot.low.eq(at_foot.low),
            ]
            m.d.sync += [at_foot.eq(wave), summed.eq(at_foot), shifted.eq(foot.shifted)]
            bank = Bank(m, f"sums_{c}", signed(32), self.depths[3])
            self.sum_banks.append(bank)
            m.d.comb += [
                bank.read.en.eq(1),
                bank.read.addr.eq(bank.at(Mux(at_foot.valid, at_foot.sum, self.host_address))),
                bank.write.addr.eq(bank.at(summed.sum)),
                bank.write.en.eq(summed.valid),
                bank.write.data.eq(Mux(summed.clear, 0, bank.read.data) + shifted),
            ]
            sums.append(bank.read.data)
            wave, load = at_foot, loaded
        with m.Switch(self.host_bank):
            for c, value in enumerate(sums):
                with m.Case(c):
                    m.d.comb += self.host_sum.eq(value)
