// Convolution and linear layers: what the kernels are given. Read by files of every instruction set: plain structs only.
//
// The mixed product of the design notes, section 1: with the groups of feature channels in some order, low ones first,
//   acc[o] = sum over low groups g of ( sum_i x_low[i] w_low[o,i] ) << s[g]  +  sum over high groups of x8[i] w8[o,i].
// Kernels visit low groups by falling shift, so that the shifts become a few `acc <<= d` between groups (Horner).
//
// Outputs are computed in blocks of `block` channels; weights are packed per block in the order of the visit:
//   dot form   [block][group][tap][quad of channels][output in block][4]
//   fip form   [block][group][tap][octet of channels][first four: output in block x 4][last four: output in block x 4]
//   winograd   either form with position (16) in front of the group and one tap
#pragma once
#include "../tensor.h"

namespace bitdial {

struct Group {
    int64_t weights;   // byte offset of the group inside a packed block
    int32_t channel;   // byte offset of its first channel inside a pixel
    int32_t units;     // quads or octets of channels
    int32_t shift;     // acc <<= shift before the group
    int32_t channels;  // real channels, for the counters
};

// Where a low group's weights come from when no packed form of them is kept: they are made block by block, from the 8-bit ones
// as clamp(rne(w / 2^shift), -wmax, wmax), or from a stored plane: the dot form of the groups that are ever low, as bytes or,
// in `nibbles`, two vectors in one, the first in the low four bits of its bytes.
struct DeriveGroup {
    int64_t from, to;  // byte offsets in a block of the dot form or of the plane, and in a block of the low form
    int32_t quads, shift;
};

struct LowPlane {
    const int8_t* weights;  // null: derived from the 8-bit weights
    int64_t block_bytes;
    bool nibbles;
};

// Split form of the high groups, where a set's exact product of bytes costs more than that of bytes whose pairs fit 16 bits. A
// quad of channels is one of `pairs` if no pair of its weights, for any output of the block, can leave 16 bits with any input
// byte: dot form. Else it is `wide`: its weights are widened, [first and third][output in block][2], [second and fourth]...
// The quads of a run, all high or all low at any ratio, stand in the order pairs, wide; each has a place in a table.
struct SplitRun {
    int64_t weights;      // byte offset of the run
    int32_t places;       // index of its first quad's place: byte offset from a pixel, taps and channels together
    int32_t pairs, wide;  // quads
};

struct GroupList {
    const Group* groups;
    int32_t count;
    int32_t final_shift;  // acc <<= final_shift after the last group
    int32_t channels;     // sum over the groups
};

// Extraction of a whole tensor, rows [row0, row1) of sample * h + y: per channel clamp(rne(v / 2^s), lo, hi) << back, plus
// offset, where v = stored byte - zero. Arrays per channel, padded to whole vectors: shift = s + 1 and half = 2^s - 1, since
// rne(v / 2^s) = (2v + half + bit s of v) >> (s + 1), which also holds for s = 0.
struct ExtractArgs {
    ConstByteView src;
    ByteView dst;
    int32_t zero, offset;
    const int32_t *shift, *half, *lo, *hi, *back;
    // The same for sets that extract whole vectors of bytes, per vector: bit positions for a shift right within eight bytes,
    // 2^(s-1) - 1, 1 where s > 0, mask of the quotient, 128 / 2^s, limits, bit positions and mask for the shift back.
    const uint8_t* bytes;
};

enum OutputKind : int32_t { OUT_BYTES = 0, OUT_FLOAT = 1, OUT_ACCUMULATORS = 2 };
enum ResidualKind : int32_t { RESIDUAL_NONE = 0, RESIDUAL_BYTES = 1, RESIDUAL_FLOAT = 2 };

// The usual epilogues have code of their own, chosen once per tile or block.
// Bytes without residual: LIMITED in general; SATURATED and SIGNED where lo and hi are the ends of unsigned bytes, or -127 and
// 127 of signed ones, and no t leaves int32: packing then limits. RESIDUAL: bytes with a residual of bytes. ANY: all others.
enum EpilogueMode : int32_t {
    EPILOGUE_ANY = 0,
    EPILOGUE_LIMITED = 1,
    EPILOGUE_RESIDUAL = 2,
    EPILOGUE_SATURATED = 3,
    EPILOGUE_SIGNED = 4
};

// t = fl(float(acc + bias) * multiplier); t = fl(t + fl(float(r) * residual_factor)); clamp; rne; + zero_out.
struct Epilogue {
    const int32_t* bias;      // padded to whole blocks; corrections of the kernel are in it
    const float* multiplier;  // padded
    float lo, hi;             // float outputs: the activation's limits, or infinities
    OutputKind kind;
    EpilogueMode mode;
    int32_t zero_out;
    ResidualKind residual_kind;
    int32_t zero_residual;
    float residual_factor;
    int64_t out_stride_c, residual_stride_c;  // elements between channels of a float tensor
};

// How low groups are computed, and the method's name.
#define BITDIAL_METHOD_LIST(METHOD) \
    METHOD(DIRECT, "direct") METHOD(FIP, "fip") METHOD(WINOGRAD, "winograd") METHOD(WINOGRAD_FIP, "winograd_fip") METHOD(NARROW, "narrow")
#define BITDIAL_METHOD(id, name) METHOD_##id,
enum Method : int32_t { BITDIAL_METHOD_LIST(BITDIAL_METHOD) kMethods };
#undef BITDIAL_METHOD

struct Counters {
    int64_t low, high;       // multiply-accumulates of the network executed
    int64_t multiplications; // byte multiplications the kernels really issued for them
};

struct Target {  // where outputs or residuals of one image batch lie; pitches in bytes
    uint8_t* data;
    int64_t pitch_n, pitch_y, pitch_x;
};

struct ConvArgs {
    int32_t batch, out_h, out_w, outputs;  // outputs of this convolution group
    int32_t stride_h, stride_w, pad_h, pad_w;
    int32_t taps;
    const int32_t *src_taps, *low_taps;  // byte offset of every tap from the first one, in src and in low
    ConstByteView src, low;
    Target out, residual;

    GroupList high;             // dot form over src (METHOD_DIRECT: everything is here, read back where low)
    const int8_t* high_weights;
    int64_t high_block_bytes;
    const SplitRun* split;         // [block][split_runs], over high_weights; null: `high` says where they lie
    const int32_t* split_places;
    int32_t split_runs;
    int32_t read_back_channels;  // how many channels in `high` are low ones read back (their values; not their cost)

    Method method;              // of the low groups
    GroupList low_groups;
    const int8_t* low_weights;
    int64_t low_block_bytes;
    const DeriveGroup* derive;   // null: low_weights are packed; else they are made from `plane` or from high_weights
    int32_t derive_groups, wmax;
    LowPlane plane;
    int32_t low_offset;          // what `low` holds above the low value
    // Layers of one tap are extracted pixel by pixel on the way, into scratch memory (`low` is not used then).
    bool extract_here;
    ExtractArgs extraction;
    const int32_t* lane_mask;    // fip: per four channels of a pixel of `low`, -1 where the first half of a low octet lies
    const int32_t* lane_shift;   // and the group's total shift
    int32_t low_bytes;           // channels of `low` to read, rounded up to whole vectors
    const uint8_t* chunk_used;   // winograd: per vector of channels, whether a low group lies in it
    uint8_t position_offset[16];  // winograd: what a transformed byte holds above its value
    uint8_t centre;               // and what is taken off position 5 before: its values run from 0 to four times the largest
    const int32_t* correction;   // winograd: [4][padded outputs], added before the division by 4

    Epilogue epilogue;
    int32_t block;              // outputs per block of the dot form
    int32_t chunk;              // pixels or tiles per pass
};

struct Scratch {
    uint8_t* memory;  // 64-byte aligned
    int64_t bytes;
};

// What the runtime must know of a set's kernels to pack weights and to choose among them.
struct Facts {
    int32_t block, fip_block;    // outputs of a block of either form
    int32_t vector_bytes, rows;  // of a register tile; attention works on as many rows at once
    bool has_fip, narrow_is_faster, split_is_faster, saturates, extracts_bytes;
};

// conv_scratch   bytes of scratch memory that one call needs
// conv_units     pixels or tiles of the layer; conv_chunks: the number of chunks they are cut into, each a task
// conv           chunk `chunk` for output blocks [block0, block1)
// magnitudes     per channel of [channel0, channel1) an OR of the magnitudes (stored byte - zero) over all pixels of the view: as
//                many bits as their maximum. `into` belongs to channel 0
// burn           dot products on registers alone, to measure the processor's rate; returns how many byte products were made, and
//                writes what keeps the compiler from leaving them out to *sink

}  // namespace bitdial
