// Operands of a product, brought into the order of its inner loop.
//
// Left: rows of `groups` groups, one 32-bit lane each. Right: [group][column], padded to whole vectors. What is beyond
// the operand is 0 on the left, so that it does not matter on the right.
#pragma once
#include "../simd/simd.h"
#include "attention.h"

namespace bitdial {
namespace BITDIAL_ISA {

enum { WIDTH = 4 / GROUP, SUM_LANES = 16 };  // WIDTH: bytes of an element

static inline int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
static inline int32_t groups_of(int32_t depth) { return (depth + GROUP - 1) / GROUP; }

// A stored byte as an element of either side. On VNNI the right operand of an unsigned left one is signed, and the other way
// round: signed values as they are and unsigned values less 128 are both the stored byte with its top bit changed.
static inline void put(uint8_t* to, uint8_t stored, int32_t zero, bool flip) {
    if (GROUP == 4) {
        *to = static_cast<uint8_t>(flip ? stored ^ 128 : stored);
    } else {
        const int16_t value = static_cast<int16_t>(stored - zero);
        __builtin_memcpy(to, &value, 2);
    }
}

// What the sum of a row of the left operand is multiplied with to undo the offset of the right one.
static inline int32_t row_correction(const ProductOperand& left, const ProductOperand& right) {
    if (GROUP != 4) return 0;
    return left.zero ? -right.zero : right.zero ? 0 : 128;
}

// `count` bytes through a table, as put flips them; returns their sum.
static inline int32_t look_up_row(const uint8_t* table, const uint8_t* from, int32_t count, int32_t zero, bool flip, uint8_t* to) {
    if (GROUP == 4) {
        const Table entries = load_table(table);
        const vi one = set_bytes(1), top = set_bytes(flip ? 128 : 0);
        vi sums = set(0);
        int32_t d = 0;
        for (; d < count; d += BYTES) {
            const int32_t n = smaller(BYTES, count - d);
            const vi q = look_up(entries, load(from + d, n));
            sums = dot(sums, q, one);
            store(to + d, add_bytes(q, top), n);
        }
        return sum(sums) - (d - count) * table[0];  // which the places behind the row looked up
    }
    int32_t total = 0;
    for (int32_t d = 0; d < count; d++) {
        total += table[from[d]];
        put(to + d * WIDTH, table[from[d]], zero, flip);
    }
    return total;
}

// Sums wrap, as int32 accumulators may on their way.
static inline int32_t wrapped_product(int32_t a, int32_t b) {
    return static_cast<int32_t>(static_cast<uint32_t>(a) * static_cast<uint32_t>(b));
}

// One row of the left operand; returns the sum of its values.
static inline int32_t pack_row(const ProductOperand& o, const uint8_t* from, int32_t depth, uint8_t* to) {
    int32_t total = 0;
    const uint8_t* table = o.table;
    const int64_t inner = o.inner;
    const int32_t zero = o.zero;
    const bool flip = zero != 0;
    if (inner == 1 && !table) {  // the usual case, apart so that it becomes vectors
        for (int32_t d = 0; d < depth; d++) {
            total += from[d];
            put(to + d * WIDTH, from[d], zero, flip);
        }
    } else if (inner == 1) {
        total = look_up_row(table, from, depth, zero, flip, to);
    } else {
        for (int32_t d = 0; d < depth; d++) {
            const uint8_t byte = from[d * inner], stored = table ? table[byte] : byte;
            total += stored;
            put(to + d * WIDTH, stored, zero, flip);
        }
    }
    for (int32_t d = depth; d < groups_of(depth) * GROUP; d++) put(to + d * WIDTH, 0, 0, false);
    return total - depth * zero;
}

// One group of a column of the right operand whose contracted elements adjoin.
static inline void put_group(const uint8_t* from, int32_t zero, bool flip, uint8_t* to) {
    uint32_t bits;
    if (GROUP == 4) {
        __builtin_memcpy(&bits, from, 4);
        if (flip) bits ^= 0x80808080u;
    } else {
        bits = static_cast<uint16_t>(from[0] - zero) | static_cast<uint32_t>(static_cast<uint16_t>(from[1] - zero)) << 16;
    }
    __builtin_memcpy(to, &bits, 4);
}

// Columns [0, columns) of the right operand; `padded` lies between groups, a multiple of LANES.
static inline void pack_right(const ProductOperand& o, const uint8_t* from, int32_t depth, int32_t columns, int64_t padded,
                              bool left_unsigned, uint8_t* to) {
    const int32_t groups = groups_of(depth), zero = o.zero;
    const int64_t inner = o.inner, outer = o.outer;
    const uint8_t* table = o.table;
    int32_t whole = 0;  // groups that are done
    if (inner == 1 && !table) {
        whole = depth / GROUP;
        for (int32_t j = 0; j < columns; j++) {
            const uint8_t* source = from + j * outer;
            for (int32_t g = 0; g < whole; g++) put_group(source + g * GROUP, zero, left_unsigned, to + (g * padded + j) * 4);
        }
        for (int32_t g = 0; g < whole; g++)
            __builtin_memset(to + (g * padded + columns) * 4, 0, static_cast<uint64_t>(4 * (padded - columns)));
    }
    for (int32_t g = whole; g < groups; g++) {
        uint8_t* row = to + g * padded * 4;
        int32_t done = 0;
        if (outer == 1 && !table && (g + 1) * GROUP <= depth)
            done = interleave(from + g * GROUP * inner, inner, columns, zero, left_unsigned, row);
        for (int32_t t = 0; t < GROUP; t++) {
            const int32_t d = g * GROUP + t;
            const uint8_t* source = from + d * inner;
            for (int32_t j = done; j < columns; j++) {
                const uint8_t byte = d < depth ? source[j * outer] : static_cast<uint8_t>(zero);
                put(row + 4 * j + t * WIDTH, table && d < depth ? table[byte] : byte, zero, left_unsigned);
            }
        }
        __builtin_memset(row + 4 * int64_t{columns}, 0, static_cast<uint64_t>(4 * (padded - columns)));
    }
}

}  // namespace BITDIAL_ISA
}  // namespace bitdial
