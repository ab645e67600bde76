// One convolution or linear layer, prepared for the kernels of one instruction set: low weights, packed weights, visiting
// order, bias rows with the kernels' corrections. See conv/conv_args.h for the layouts and the mathematics.
#pragma once
#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "../conv/conv_args.h"
#include "memory.h"

namespace bitdial {

extern const char* const kMethodNames[kMethods];

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

struct ConvSpec {
    std::string name;
    int outputs = 0, inputs = 0, kernel_h = 1, kernel_w = 1;  // inputs: per convolution group
    int stride_h = 1, stride_w = 1, pad_h = 0, pad_w = 0, dilation_h = 1, dilation_w = 1, conv_groups = 1;
    int amax = 15, wmax = 7;
    bool input_signed = false;
    bool dynamic = false;  // activation shifts are chosen at run time, per sample and group
    std::vector<int8_t> weight;             // [O][I / conv_groups][kh][kw]
    std::vector<int8_t> low_weight;         // the same shape, or empty: low weights are derived from `weight`
    std::vector<int32_t> bounds;            // [n_groups + 1] over all feature channels
    std::vector<uint8_t> activation_shift;  // [n_groups]
    std::vector<uint8_t> weight_shift;      // [O][n_local]
    std::vector<uint8_t> low;               // [ratios][n_groups]
    std::vector<int32_t> bias;              // [ratios][O]
    std::vector<float> multiplier;          // [O]
    int ratios = 1;
};

// Whether a group, `shift` being what comes before it, becomes one with the last: it then is. It must lie right behind it, in the
// pixel and in the weights. unit: channels per step, unit_bytes: weights per step.
inline bool joins(Group& last, const Group& group, int unit, int unit_bytes) {
    if (group.shift != 0 || last.channels % unit != 0 || last.channel + last.channels != group.channel ||
        last.weights + int64_t(last.units) * unit_bytes != group.weights)
        return false;
    last.units += group.units;
    last.channels += group.channels;
    return true;
}

// What the kernels need for one convolution group at one ratio with one method.
struct Visit {
    std::vector<Group> high, low;
    std::vector<int> low_local;  // dynamic shifts: the local group of every entry of `low`, none of which are joined
    std::vector<DeriveGroup> derive;
    std::vector<SplitRun> split;  // [block][run]
    int32_t final_shift = 0, high_channels = 0, low_channels = 0, read_back_channels = 0;
    std::vector<int32_t> bias;                    // padded
    std::vector<int32_t> correction;              // winograd: [4][padded]
    std::vector<int32_t> lane_mask, lane_shift;   // per four channels of a extracted pixel
    std::vector<uint8_t> chunk_used;
};

// Parameters of extraction, per channel, padded to whole vectors.
struct Extraction {
    std::vector<int32_t> shift, half, lo, hi, back;
    std::vector<uint8_t> bytes;
    int32_t offset = 0;
};

// Dynamic shifts: where in the memory of one sample things lie (bytes), for the layer's methods at any ratio.
struct SampleLayout {
    int64_t magnitudes = 0, shifts = 0, extraction = 0, visits = 0;  // visits: one per convolution group
    int64_t groups = 0, lane_shift = 0, bias = 0, correction = 0, visit_bytes = 0;  // within a visit
    int64_t bytes = 0;
};

class ConvLayer {
   public:
    // small: keep one copy of the weights, low ones are derived from it while the layer runs; and of low weights that are
    // stored, one copy as narrow as they allow, of the groups that are ever low.
    ConvLayer(ConvSpec spec, const Facts& facts, bool folded, bool small);
    // Byte offset of every tap from the first, in the layer's input and in its extracted form; before anything is packed.
    void set_taps(std::vector<int32_t> src, std::vector<int32_t> low) {
        src_taps_ = std::move(src);
        low_taps_ = std::move(low);
    }

    const ConvSpec& spec() const { return spec_; }
    // "" if the method is exact for this layer with these weights, else why not.
    const std::string& obstacle(Method m) const { return obstacles_[m]; }
    bool has_low(int ratio) const { return low_at_[ratio]; }
    bool folded() const { return folded_; }
    int taps() const { return taps_; }

    // Makes sure that the weights a method needs at any ratio are packed; drops those no listed method needs.
    void keep(const std::array<bool, kMethods>& methods, bool low_at_direct);
    // Other bias rows, weight shifts and low weights (empty: derived ones); what was packed is dropped. Before `seal`.
    void renew(std::vector<int32_t> bias, std::vector<uint8_t> weight_shift, std::vector<int8_t> low_weight);
    // Gives back the weights in their own order: what is packed stays, nothing more can be packed.
    void seal();
    // Bytes of weights held: 8-bit copy, read-back copy, per low method, and the plane of stored low weights.
    std::array<int64_t, 7> weight_bytes() const;

    const Visit& visit(int ratio, Method m, int conv_group);
    const Extraction& extraction(int ratio, Method m);
    void fill(ExtractArgs& args, int ratio, Method m);
    void fill(ConvArgs& args, int ratio, Method m, int conv_group);  // everything but addresses and geometry
    void prepare(int ratio, Method m);                               // builds visit and extraction ahead of runs

    // Dynamic shifts (dynamic_layer.cpp). `memory`: sample_layout().bytes, 64-byte aligned, of one sample of one run.
    bool dynamic() const { return spec_.dynamic; }
    const SampleLayout& sample_layout() const { return sample_layout_; }
    // From the magnitudes of the sample's channels, its shifts, and all that follows from them.
    void choose_shifts(uint8_t* memory, int ratio, Method m);
    void use_sample(ExtractArgs& args, const uint8_t* memory) const;
    void use_sample(ConvArgs& args, const uint8_t* memory, int conv_group) const;

   private:
    struct Packed {
        Buffer data;
        int64_t block_bytes = 0, group_bytes_all = 0;  // of one block, all blocks of a convolution group
        std::vector<int64_t> offset;                    // of every local group in a block, per convolution group
    };
    int begin(int group) const { return spec_.bounds[group]; }
    int size(int group) const { return spec_.bounds[group + 1] - spec_.bounds[group]; }
    int total_shift(int group) const { return spec_.activation_shift[group] + weight_shift_of(group); }
    int weight_shift_of(int group) const;
    // The largest shift that a group may get.
    int most_shift(int group) const {
        return (spec_.dynamic ? std::max(0, (spec_.input_signed ? 7 : 8) - bits(spec_.amax)) : spec_.activation_shift[group]) +
               weight_shift_of(group);
    }
    static int bits(int v) {
        int n = 0;
        for (; v > 0; v >>= 1) n++;
        return n;
    }
    std::vector<int32_t> group_corrections(Method m, int conv_group, int local) const;
    void lay_out_samples();
    void build_templates();
    // Column `ch` of the nine vectors in ExtractArgs::bytes.
    void set_byte_extraction(uint8_t* b, int ch, int shift, int lo, int hi, int back) const;
    int8_t low_weight(int o, int i, int tap) const { return low_weight_[(size_t(o) * spec_.inputs + i) * all_taps_ + tap]; }
    int8_t weight8(int o, int i, int tap) const { return spec_.weight[(size_t(o) * spec_.inputs + i) * all_taps_ + tap]; }
    int read_back(int o, int i, int tap, int local) const;
    void take_low_weights();  // those of the spec, and what follows from them
    void derive_low_weights();
    void find_obstacles();
    void transformed(int o, int i, int32_t (&u)[16]) const;
    void pack_direct(bool with_read_back);
    Packed lay_out(int unit, int taps, bool fip_form) const;
    int8_t* place_of(const Packed& p, int conv_group, int local, int output, int block) const;
    void pack_fip();
    void pack_narrow();
    void pack_winograd(bool fip);
    void pack_plane();
    bool split_form() const { return facts_.split_is_faster && !small_; }
    void pack_split(bool with_read_back);
    std::vector<SplitRun> split_visit(int ratio, Method m, int conv_group) const;
    Visit build_visit(int ratio, Method m, int conv_group) const;
    Extraction build_extraction(int ratio, Method m) const;

    ConvSpec spec_;
    const Facts& facts_;
    bool folded_, small_, sealed_ = false;
    int all_taps_, taps_, n_local_, outputs_per_group_, blocks_, fip_blocks_;
    bool eligible_ = false;       // some group is low at some ratio
    std::vector<bool> low_at_;    // per ratio: some group is low
    std::vector<int8_t> low_weight_;
    bool stored_ = false;     // low_weight_ was given, not derived
    std::vector<int> order_;  // per convolution group: local groups by falling total shift
    std::array<std::string, kMethods> obstacles_;
    Packed direct_, fip_, winograd_, winograd_fip_, narrow_, plane_;
    const Packed& packed(Method m) const;
    // Split form: `direct_` holds its weights then, run after run. Runs are of local groups that are low at the same ratios:
    // [conv group][block][2: 8-bit, read back][kind], their places for either form of the input.
    std::vector<std::vector<int>> split_kinds_;
    std::vector<SplitRun> split_;
    std::array<std::vector<int32_t>, 2> split_places_;
    int64_t read_back_bytes_ = 0;
    std::vector<int32_t> src_taps_, low_taps_;
    bool direct_has_read_back_ = false;
    bool nibbles_ = false;  // of plane_
    int fip_offset_ = 0, narrow_offset_ = 0, centre_ = 0;
    std::array<int, 16> offset_w2_{}, offset_w2f_{};
    std::vector<std::vector<Visit>> visits_;  // [ratio * kMethods + method][conv group]
    std::vector<Extraction> extractions_;
    std::vector<bool> built_;
    // Dynamic shifts: corrections of every low group before its shift, [conv group][local group][1, winograd: 4][padded] per
    // method, empty where there are none; and parameters of extraction for vectors of one shift, [back or not][shift, or 8 bits as
    // they are][9][vector].
    std::array<std::vector<int32_t>, kMethods> corrections_;
    std::vector<uint8_t> templates_;
    SampleLayout sample_layout_;
    std::vector<float> multiplier_padded_;

   public:
    const float* multiplier(int conv_group) const { return multiplier_padded_.data() + size_t(conv_group) * blocks_ * facts_.block; }
};

}  // namespace bitdial
