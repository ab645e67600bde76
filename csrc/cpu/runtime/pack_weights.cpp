// Packing of weights in the forms of conv/conv_args.h, but for the split form (split_weights.cpp).
#include <algorithm>

#include "conv_layer.h"

namespace bitdial {

void ConvLayer::pack_direct(bool with_read_back) {
    const int block = facts_.block;
    Packed p;
    p.offset.resize(n_local_);
    int64_t at = 0;
    for (int l = 0; l < n_local_; l++) {
        p.offset[l] = at;
        const int channels = folded_ ? size(l) * spec_.kernel_w : size(l);
        at += int64_t(taps_) * ceil_div(channels, 4) * 4 * block;
    }
    const int64_t one = at;
    p.block_bytes = with_read_back ? 2 * one : one;
    p.group_bytes_all = p.block_bytes * blocks_;
    p.data = Buffer(p.group_bytes_all * spec_.conv_groups);
    const int base = begin(0);
    for (int c = 0; c < spec_.conv_groups; c++)
        for (int l = 0; l < n_local_; l++) {
            const int quads = ceil_div(folded_ ? size(l) * spec_.kernel_w : size(l), 4);
            for (int o = 0; o < outputs_per_group_; o++) {
                const int oo = c * outputs_per_group_ + o;
                int8_t* to = reinterpret_cast<int8_t*>(p.data.data()) + c * p.group_bytes_all + (o / block) * p.block_bytes +
                             p.offset[l] + (o % block) * 4;
                for (int i = begin(l) - base; i < begin(l + 1) - base; i++) {
                    const int local = i - (begin(l) - base);
                    for (int t = 0; t < all_taps_; t++) {
                        const int tap = folded_ ? t / spec_.kernel_w : t;
                        const int ch = folded_ ? t % spec_.kernel_w * size(l) + local : local;
                        int8_t* place = to + (int64_t(tap) * quads + ch / 4) * 4 * block + ch % 4;
                        *place = weight8(oo, i, t);
                        if (with_read_back) place[one] = static_cast<int8_t>(read_back(oo, i, t, l));
                    }
                }
            }
        }
    direct_ = std::move(p);
    direct_has_read_back_ = with_read_back;
    read_back_bytes_ = with_read_back ? direct_.data.bytes() / 2 : 0;
}

// Where the groups lie in a block, in the order of the visit; `unit` channels at a time, `taps` products per channel.
ConvLayer::Packed ConvLayer::lay_out(int unit, int taps, bool fip_form) const {
    const int block = fip_form ? facts_.fip_block : facts_.block, blocks = fip_form ? fip_blocks_ : blocks_;
    Packed p;
    p.offset.resize(order_.size());
    for (int c = 0; c < spec_.conv_groups; c++) {
        p.block_bytes = 0;
        for (int r = 0; r < n_local_; r++) {
            const int l = order_[size_t(c) * n_local_ + r];
            p.offset[size_t(c) * n_local_ + l] = p.block_bytes;
            p.block_bytes += int64_t(taps) * ceil_div(size(l), unit) * unit * block;
        }
    }
    p.group_bytes_all = p.block_bytes * blocks;
    return p;
}

// The first weight of a group of channels for one output.
int8_t* ConvLayer::place_of(const Packed& p, int conv_group, int local, int output, int block) const {
    return reinterpret_cast<int8_t*>(p.data.data()) + conv_group * p.group_bytes_all + (output / block) * p.block_bytes +
           p.offset[size_t(conv_group) * n_local_ + local] + (output % block) * 4;
}

void ConvLayer::pack_fip() {
    Packed p = lay_out(8, taps_, true);
    const int block = facts_.fip_block;
    p.data = Buffer(p.group_bytes_all * spec_.conv_groups);
    for (int c = 0; c < spec_.conv_groups; c++)
        for (int l = 0; l < n_local_; l++) {
            const int octets = ceil_div(size(l), 8);
            for (int o = 0; o < fip_blocks_ * block; o++) {
                const int oo = c * outputs_per_group_ + o;
                int8_t* to = place_of(p, c, l, o, block);
                for (int t = 0; t < taps_; t++)
                    for (int ch = 0; ch < octets * 8; ch++) {
                        const bool real = o < outputs_per_group_ && ch < size(l);
                        const int w = real ? low_weight(oo, begin(l) - begin(0) + ch, t) : 0;
                        const int first = ch % 8 < 4;
                        to[(int64_t(t) * octets + ch / 8) * 8 * block + (first ? 0 : 4 * block) + ch % 4] =
                            static_cast<int8_t>(first ? w - fip_offset_ : w);
                    }
            }
        }
    fip_ = std::move(p);
}

void ConvLayer::pack_narrow() {
    Packed p = lay_out(4, taps_, false);
    const int block = facts_.block;
    p.data = Buffer(p.group_bytes_all * spec_.conv_groups);
    for (int c = 0; c < spec_.conv_groups; c++)
        for (int l = 0; l < n_local_; l++) {
            const int quads = ceil_div(size(l), 4);
            for (int o = 0; o < outputs_per_group_; o++) {
                const int oo = c * outputs_per_group_ + o;
                int8_t* to = place_of(p, c, l, o, block);
                for (int ch = 0; ch < size(l); ch++)
                    for (int t = 0; t < taps_; t++)
                        to[(int64_t(t) * quads + ch / 4) * 4 * block + ch % 4] = low_weight(oo, begin(l) - begin(0) + ch, t);
            }
        }
    narrow_ = std::move(p);
}

const ConvLayer::Packed& ConvLayer::packed(Method m) const {
    return m == METHOD_FIP ? fip_ : m == METHOD_NARROW ? narrow_ : m == METHOD_WINOGRAD ? winograd_ : winograd_fip_;
}

void ConvLayer::pack_winograd(bool fip) {
    const int block = fip ? facts_.fip_block : facts_.block, blocks = fip ? fip_blocks_ : blocks_;
    const int unit = fip ? 8 : 4;
    Packed p = lay_out(unit, 1, fip);
    const int64_t position = p.block_bytes;
    p.block_bytes *= 16;
    p.group_bytes_all *= 16;
    p.data = Buffer(p.group_bytes_all * spec_.conv_groups);
    for (int c = 0; c < spec_.conv_groups; c++)
        for (int l = 0; l < n_local_; l++)
            for (int o = 0; o < blocks * block; o++) {
                const int oo = c * outputs_per_group_ + o;
                int8_t* to = place_of(p, c, l, o, block);
                const int padded = ceil_div(size(l), unit) * unit;
                for (int ch = 0; ch < padded; ch++) {
                    int32_t u[16] = {0};
                    if (o < outputs_per_group_ && ch < size(l)) transformed(oo, begin(l) - begin(0) + ch, u);
                    int64_t place = int64_t(ch / unit) * unit * block + ch % 4;
                    if (fip && ch % 8 >= 4) place += 4 * block;
                    for (int s = 0; s < 16; s++)
                        to[s * position + place] = static_cast<int8_t>(fip && ch % 8 < 4 ? u[s] - offset_w2f_[s] : u[s]);
                }
            }
    (fip ? winograd_fip_ : winograd_) = std::move(p);
}

// Dot form of the groups that are ever low, vector by vector, as narrow as their values allow (see DeriveGroup).
void ConvLayer::pack_plane() {
    const int n_groups = n_local_ * spec_.conv_groups, block = facts_.block, vector = facts_.vector_bytes;
    nibbles_ = spec_.wmax <= 7;
    auto bytes_of = [&](int g) {  // whole vectors: a block holds 4 * block bytes per quad
        const int64_t vectors = int64_t(taps_) * ceil_div(size(g), 4) * 4 * block / vector;
        return (nibbles_ ? (vectors + 1) / 2 : vectors) * vector;
    };
    Packed p;
    p.offset.assign(n_groups, -1);
    for (int c = 0; c < spec_.conv_groups; c++) {
        int64_t at = 0;
        for (int g = c * n_local_; g < (c + 1) * n_local_; g++) {
            bool ever = false;
            for (int r = 0; r < spec_.ratios; r++) ever = ever || spec_.low[size_t(r) * n_groups + g];
            if (!ever) continue;
            p.offset[g] = at;
            at += bytes_of(g);
        }
        p.block_bytes = std::max(p.block_bytes, at);
    }
    p.group_bytes_all = p.block_bytes * blocks_;
    p.data = Buffer(p.group_bytes_all * spec_.conv_groups);
    for (int g = 0; g < n_groups; g++) {
        if (p.offset[g] < 0) continue;
        const int c = g / n_local_, quads = ceil_div(size(g), 4), first = begin(g) - begin(c * n_local_);
        for (int o = 0; o < outputs_per_group_; o++) {
            uint8_t* to = p.data.data() + c * p.group_bytes_all + (o / block) * p.block_bytes + p.offset[g];
            for (int ch = 0; ch < size(g); ch++)
                for (int t = 0; t < taps_; t++) {
                    const int w = low_weight(c * outputs_per_group_ + o, first + ch, t);
                    const int64_t b = ((int64_t(t) * quads + ch / 4) * block + o % block) * 4 + ch % 4, at = b / vector;
                    if (nibbles_)
                        to[at / 2 * vector + b % vector] |= static_cast<uint8_t>((w & 15) << (at % 2 * 4));
                    else
                        to[b] = static_cast<uint8_t>(w);
                }
        }
    }
    plane_ = std::move(p);
}

}  // namespace bitdial
