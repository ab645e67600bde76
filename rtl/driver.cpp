// Host side of rtl/verilate.py: commands on stdin, answers on stdout.
//   w REGISTER VALUE   write          r REGISTER   read, one line
//   b N V...           N writes of DATA             d N   N reads of DATA as int32, one line
//   g                  wait until the unit is idle
#include <cstdint>
#include <cstdio>
#include "Vnpu.h"
#include "verilated.h"

static Vnpu *unit;
static const int STATUS = 1, DATA = 6;
static const uint64_t LIMIT = 1ull << 33;

static void tick() {
    unit->clk = 0;
    unit->eval();
    unit->clk = 1;
    unit->eval();
}

static void write(int address, uint32_t value) {
    unit->address = address;
    unit->write_data = value;
    unit->write = 1;
    tick();
    unit->write = 0;
}

static uint32_t read(int address) {
    tick();  // the banks answer a cycle after ADDRESS moved
    unit->address = address;
    unit->read = 1;
    tick();
    unit->read = 0;
    return unit->read_data;
}

int main() {
    unit = new Vnpu;
    unit->rst = 1;
    tick();
    unit->rst = 0;
    char command;
    unsigned long long a, b;
    while (std::scanf(" %c", &command) == 1) {
        if (command == 'w' && std::scanf("%llu %llu", &a, &b) == 2) {
            write((int)a, (uint32_t)b);
        } else if (command == 'r' && std::scanf("%llu", &a) == 1) {
            std::printf("%u\n", read((int)a));
        } else if (command == 'b' && std::scanf("%llu", &a) == 1) {
            while (a-- && std::scanf("%llu", &b) == 1) write(DATA, (uint32_t)b);
        } else if (command == 'd' && std::scanf("%llu", &a) == 1) {
            while (a--) std::printf("%d ", (int32_t)read(DATA));
            std::printf("\n");
        } else if (command == 'g') {
            uint64_t waited = 0;
            while ((read(STATUS) & 1) && waited++ < LIMIT) {}
        } else {
            return 2;
        }
        std::fflush(stdout);
    }
    delete unit;
    return 0;
}
