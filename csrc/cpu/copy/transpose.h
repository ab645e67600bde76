// Transposing a matrix of bytes: to[j * to_stride + i] = from[i * from_stride + j], i < rows, j < columns. Tiles of 16 x 16
// in 64 unpack instructions on x86, which every instruction set here has; the last tile of an axis overlaps the one before
// it, or, where the axis is shorter than 16, goes through a small buffer. Source and destination must not overlap.
#pragma once
#include "../simd/simd.h"

namespace bitdial {
namespace BITDIAL_ISA {

// A tile cut off at `rows` and `columns` (each at most 16).
static inline void transpose_part(const uint8_t* from, int64_t from_stride, int32_t rows, int32_t columns, uint8_t* to,
                                  int64_t to_stride) {
    if (rows * columns <= 64) {
        for (int32_t i = 0; i < rows; ++i) {
            for (int32_t j = 0; j < columns; ++j) to[j * to_stride + i] = from[i * from_stride + j];
        }
        return;
    }
    uint8_t in[256], out[256];
    for (int32_t i = 0; i < rows; ++i) {
        if (columns == 16) {
            __builtin_memcpy(in + 16 * i, from + i * from_stride, 16);
        } else {
            for (int32_t j = 0; j < columns; ++j) in[16 * i + j] = from[i * from_stride + j];
        }
    }
    for (int32_t i = 16 * rows; i < 256; ++i) in[i] = 0;
    transpose_tile(in, 16, out, 16);
    for (int32_t j = 0; j < columns; ++j) {
        if (rows == 16) {
            __builtin_memcpy(to + j * to_stride, out + 16 * j, 16);
        } else {
            for (int32_t i = 0; i < rows; ++i) to[j * to_stride + i] = out[16 * j + i];
        }
    }
}

static inline void transpose(const uint8_t* from, int64_t from_stride, int64_t rows, int64_t columns, uint8_t* to,
                             int64_t to_stride) {
    for (int64_t column = 0; column < columns; column += 16) {
        const int64_t j = columns >= 16 && column + 16 > columns ? columns - 16 : column;
        const int32_t width = static_cast<int32_t>(columns - j < 16 ? columns - j : 16);
        for (int64_t row = 0; row < rows; row += 16) {
            const int64_t i = rows >= 16 && row + 16 > rows ? rows - 16 : row;
            const int32_t height = static_cast<int32_t>(rows - i < 16 ? rows - i : 16);
            const uint8_t* source = from + i * from_stride + j;
            uint8_t* target = to + j * to_stride + i;
            if (width == 16 && height == 16) {
                transpose_tile(source, from_stride, target, to_stride);
            } else {
                transpose_part(source, from_stride, height, width, target, to_stride);
            }
        }
    }
}

}  // namespace BITDIAL_ISA
}  // namespace bitdial
