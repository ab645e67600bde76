// Packing of 8-bit weights in the split form; see SplitRun in conv/conv_args.h.
#include <algorithm>
#include <map>

#include "conv_layer.h"

namespace bitdial {

namespace {

// Whether sums of two products of four weights with any bytes fit 16 bits: 255 * 128 = 32,640.
bool pairs_fit(const int (&w)[4]) {
    for (int i = 0; i < 4; i += 2) {
        const int most = std::max(w[i], 0) + std::max(w[i + 1], 0), least = std::min(w[i], 0) + std::min(w[i + 1], 0);
        if (most > 128 || least < -128) return false;
    }
    return true;
}

}  // namespace

void ConvLayer::pack_split(bool with_read_back) {
    const int block = facts_.block, n_groups = n_local_ * spec_.conv_groups;
    // Groups that are low at the same ratios, in every convolution group.
    std::map<std::vector<uint8_t>, std::vector<int>> kinds;
    for (int l = 0; l < n_local_; l++) {
        std::vector<uint8_t> when;
        for (int r = 0; r < spec_.ratios; r++)
            for (int c = 0; c < spec_.conv_groups; c++) when.push_back(spec_.low[size_t(r) * n_groups + c * n_local_ + l]);
        kinds[when].push_back(l);
    }
    split_kinds_.clear();
    for (auto& kind : kinds) split_kinds_.push_back(kind.second);
    split_.clear();
    for (auto& places : split_places_) places.clear();

    std::vector<int8_t> data;
    struct Quad {
        int group, tap, unit;
    };
    std::vector<int8_t> w(size_t(block) * 4);  // [output in block][4]
    read_back_bytes_ = 0;
    for (int c = 0; c < spec_.conv_groups; c++)
        for (int b = 0; b < blocks_; b++)
            for (int back = 0; back < (with_read_back ? 2 : 1); back++) {
                const size_t begin_of_all = data.size();
                const int outputs = std::min(block, outputs_per_group_ - b * block);
                auto read = [&](const Quad& q) {
                    const int channels = folded_ ? size(q.group) * spec_.kernel_w : size(q.group);
                    const int first = begin(q.group) - begin(0);
                    std::fill(w.begin(), w.end(), int8_t{0});
                    for (int o = 0; o < outputs; o++)
                        for (int j = 0; j < 4 && 4 * q.unit + j < channels; j++) {
                            const int ch = 4 * q.unit + j, oo = c * outputs_per_group_ + b * block + o;
                            const int i = first + (folded_ ? ch % size(q.group) : ch);
                            const int t = folded_ ? q.tap * spec_.kernel_w + ch / size(q.group) : q.tap;
                            w[size_t(o) * 4 + j] = static_cast<int8_t>(back ? read_back(oo, i, t, q.group) : weight8(oo, i, t));
                        }
                };
                auto place = [&](const Quad& q) {
                    const int channel = begin(c * n_local_ + q.group) + 4 * q.unit;
                    split_places_[0].push_back(src_taps_[q.tap] + channel);
                    if (!low_taps_.empty()) split_places_[1].push_back(low_taps_[q.tap] + channel);
                };
                for (const auto& kind : split_kinds_) {
                    std::vector<Quad> wide;
                    SplitRun run{static_cast<int64_t>(data.size()), static_cast<int32_t>(split_places_[0].size()), 0, 0};
                    for (int l : kind)
                        for (int t = 0; t < taps_; t++)
                            for (int u = 0; 4 * u < (folded_ ? size(l) * spec_.kernel_w : size(l)); u++) {
                                const Quad q{l, t, u};
                                read(q);
                                bool fit = true;
                                for (int o = 0; o < outputs && fit; o++)
                                    fit = pairs_fit({w[4 * o], w[4 * o + 1], w[4 * o + 2], w[4 * o + 3]});
                                if (!fit) {
                                    wide.push_back(q);
                                    continue;
                                }
                                place(q);
                                data.insert(data.end(), w.begin(), w.end());
                                run.pairs++;
                            }
                    for (const Quad& q : wide) {
                        read(q);
                        place(q);
                        for (int first = 0; first < 2; first++)
                            for (int o = 0; o < block; o++)
                                for (int j = first; j < 4; j += 2) {
                                    const int8_t value = w[size_t(o) * 4 + j];
                                    data.push_back(value);
                                    data.push_back(value < 0 ? -1 : 0);  // the high byte
                                }
                        run.wide++;
                    }
                    split_.push_back(run);
                }
                if (back) read_back_bytes_ += static_cast<int64_t>(data.size() - begin_of_all);
            }
    direct_ = Packed();
    direct_.data = Buffer(static_cast<int64_t>(data.size()));
    std::copy(data.begin(), data.end(), reinterpret_cast<int8_t*>(direct_.data.data()));
    direct_has_read_back_ = with_read_back;
}

// The runs that a convolution group reads at a ratio, block by block.
std::vector<SplitRun> ConvLayer::split_visit(int ratio, Method m, int c) const {
    std::vector<SplitRun> runs;
    const uint8_t* low = spec_.low.data() + size_t(ratio) * n_local_ * spec_.conv_groups + size_t(c) * n_local_;
    const size_t kinds = split_kinds_.size(), variants = direct_has_read_back_ ? 2 : 1;
    for (int b = 0; b < blocks_; b++)
        for (size_t kind = 0; kind < kinds; kind++) {
            const bool is_low = low[split_kinds_[kind][0]] != 0;
            if (is_low && m != METHOD_DIRECT) continue;
            runs.push_back(split_[((size_t(c) * blocks_ + b) * variants + is_low) * kinds + kind]);
        }
    return runs;
}

}  // namespace bitdial
