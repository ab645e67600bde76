// Fixed rearrangement of bytes.
//
//   dst[dst_offset + sum i_k * dst_stride[k]] = src[src_offset + sum j_k * src_stride[k]], i_k < extent[k],
//   j_k = i_k, except j_k = gather[i_k] on axis gather_axis. Samples i_0 in [row0, row1).
//
// Strides may come in any order; source strides may be 0 (repeat) or negative (flip). Destination elements must be
// distinct, and none may lie in the source. Axes are sorted by destination stride and merged where both sides allow; then
// the innermost work is one of
//   a run         both sides adjacent: block copy
//   a transpose   source adjacent along one axis, destination along another: 16 x 16 tiles (transpose.h); flattening
//                 NHWC into rows of channels-first features is this
//   one by one    anything else, gathered channels included
// and the other axes loop around it.
#pragma once
#include <cstdint>

namespace bitdial {

struct CopyArgs {
    const uint8_t* src;
    uint8_t* dst;
    int32_t extent[6];
    int64_t src_stride[6], dst_stride[6];
    int64_t src_offset, dst_offset;
    const int32_t* gather;  // or null
    int32_t gather_axis;  // -1 without gather
};

}  // namespace bitdial
