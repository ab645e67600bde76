// Plain structures that describe memory to the kernels. No standard templates here: this header is read by files compiled
// for different instruction sets, and the linker keeps one copy of every shared inline function.
#pragma once
#include <cstdint>

namespace bitdial {

// A batch of 8-bit or float tensors in NHWC order. `data` is the address of element (0, 0, 0, 0); a margin of padding may
// lie around every image, outside of h x w. Tensors of rank other than 4 are seen as h = 1, w = rows, c = last axis.
// 8-bit values are stored as bytes 0..255: the value plus `zero` (0 for unsigned tensors, 128 for signed ones).
// Channels of a pixel are adjacent. Pitches count elements (bytes for 8-bit, floats for float tensors).
template <typename T>
struct View {
    T* data;
    int32_t n, h, w, c;
    int64_t pitch_n, pitch_y, pitch_x;
};
using ByteView = View<uint8_t>;
using ConstByteView = View<const uint8_t>;

}  // namespace bitdial
