// Operands of a product, brought into the order of its inner loop. Included inside a namespace of one instruction set, after
// its simd header.
//
// Left: rows of `groups` groups, one 32-bit lane each. Right: [group][column], padded to whole vectors. What is beyond
// the operand is 0 on the left, so that it does not matter on the right.

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

// One row of the left operand; returns the sum of its values.
static inline int32_t pack_row(const ProductOperand& o, const uint8_t* from, int32_t depth, uint8_t* to) {
    int32_t total = 0;
    const bool flip = o.zero != 0;
    for (int32_t d = 0; d < depth; d++) {
        const uint8_t byte = from[d * o.inner], stored = o.table ? o.table[byte] : byte;
        total += stored;
        put(to + d * WIDTH, stored, o.zero, flip);
    }
    for (int32_t d = depth; d < groups_of(depth) * GROUP; d++) put(to + d * WIDTH, 0, 0, false);
    return total - depth * o.zero;
}

// Columns [0, columns) of the right operand; `padded` lies between groups, a multiple of LANES.
static inline void pack_right(const ProductOperand& o, const uint8_t* from, int32_t depth, int32_t columns, int64_t padded,
                              bool left_unsigned, uint8_t* to) {
    const int32_t groups = groups_of(depth);
    for (int32_t g = 0; g < groups; g++) {
        uint8_t* row = to + g * padded * 4;
        for (int32_t t = 0; t < GROUP; t++) {
            const int32_t d = g * GROUP + t;
            const uint8_t* source = from + d * o.inner;
            for (int32_t j = 0; j < columns; j++) {
                const uint8_t byte = d < depth ? source[j * o.outer] : static_cast<uint8_t>(o.zero);
                put(row + 4 * j + t * WIDTH, o.table && d < depth ? o.table[byte] : byte, o.zero, left_unsigned);
            }
        }
        __builtin_memset(row + 4 * int64_t{columns}, 0, static_cast<uint64_t>(4 * (padded - columns)));
    }
}
