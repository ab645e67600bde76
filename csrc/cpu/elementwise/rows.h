// Walking rows of a batch. Include it with BITDIAL_ISA defined.
#pragma once
#include "../tensor.h"

namespace bitdial {
namespace BITDIAL_ISA {

// Calls body(sample, y, rows) for rows [row0, row1) = sample * h + y: image by image where `whole` says that the rows of an
// image are one run, else row by row.
template <typename Body>
static inline void for_each_span(int32_t row0, int32_t row1, int32_t h, bool whole, const Body& body) {
    for (int32_t row = row0; row < row1;) {
        const int32_t n = row / h, y = row - n * h;
        int32_t rows = 1;
        if (whole) rows = h - y < row1 - row ? h - y : row1 - row;
        body(n, y, rows);
        row += rows;
    }
}

// Distance from pixel to pixel. Images of one column are walked along y; a single pixel has no next one, and counts as dense.
static inline int64_t pixel_pitch(int32_t h, int32_t w, int64_t c, int64_t pitch_x, int64_t pitch_y) {
    return w > 1 ? pitch_x : h > 1 ? pitch_y : c;
}

// Whether the pixels of all rows follow each other at that distance.
static inline bool rows_adjoin(int32_t h, int32_t w, int64_t pitch_x, int64_t pitch_y) {
    return h == 1 || w == 1 || pitch_y == w * pitch_x;
}

template <typename T>
static inline T* at(const View<T>& v, int32_t n, int32_t y, int64_t x) {
    return v.data + n * v.pitch_n + y * v.pitch_y + x * v.pitch_x;
}

}  // namespace BITDIAL_ISA
}  // namespace bitdial
