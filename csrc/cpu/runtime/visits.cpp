// What the kernels read of a layer at one ratio with one method: the order of its groups, bias rows with the kernels' corrections,
// parameters of extraction.
#include <algorithm>
#include <stdexcept>

#include "conv_layer.h"

namespace bitdial {

namespace {

int32_t wrap(uint32_t v) { return static_cast<int32_t>(v); }

// A^T m A for one scalar per position, in wrapping arithmetic.
void output_transform(const uint32_t (&m)[16], uint32_t (&y)[4]) {
    uint32_t t[2][4];
    for (int j = 0; j < 4; j++) {
        t[0][j] = m[j] + m[4 + j] + m[8 + j];
        t[1][j] = m[4 + j] - m[8 + j] - m[12 + j];
    }
    for (int i = 0; i < 2; i++) {
        y[2 * i] = t[i][0] + t[i][1] + t[i][2];
        y[2 * i + 1] = t[i][1] - t[i][2] - t[i][3];
    }
}

// Adds a group to a visit, joined with the last where it may be: `adjacent`, of one tap.
void append(std::vector<Group>& visit, const Group& group, bool adjacent, int unit, int unit_bytes) {
    if (adjacent && !visit.empty() && joins(visit.back(), group, unit, unit_bytes)) return;
    visit.push_back(group);
}

}  // namespace

Visit ConvLayer::build_visit(int ratio, Method m, int c) const {
    Visit v;
    const int n = n_local_ * spec_.conv_groups;
    const uint8_t* low = spec_.low.data() + size_t(ratio) * n;
    const size_t padded = size_t(blocks_) * facts_.block;
    std::vector<uint32_t> bias(padded, 0);
    for (int o = 0; o < outputs_per_group_; o++)
        bias[o] = static_cast<uint32_t>(spec_.bias[size_t(ratio) * spec_.outputs + c * outputs_per_group_ + o]);

    // high groups, and low ones too where they are read back
    const int input_zero = spec_.input_signed ? 128 : 0;
    for (int l = 0; l < n_local_; l++) {
        const int g = c * n_local_ + l;
        const bool is_low = low[g] != 0;
        if (is_low && m != METHOD_DIRECT) continue;
        const int channels = folded_ ? size(g) * spec_.kernel_w : size(g);
        const int64_t place = split_form() ? 0 : direct_.offset[l] + (is_low ? direct_.block_bytes / 2 : 0);
        Group group{place, begin(g), ceil_div(channels, 4), 0, channels};
        v.high_channels += channels;
        if (is_low) v.read_back_channels += channels;
        append(v.high, group, taps_ == 1, 4, 4 * facts_.block);
        if (input_zero != 0) {
            for (int o = 0; o < outputs_per_group_; o++) {
                int64_t sum = 0;
                for (int i = begin(l) - begin(0); i < begin(l + 1) - begin(0); i++)
                    for (int t = 0; t < all_taps_; t++) {
                        const int oo = c * outputs_per_group_ + o;
                        sum += is_low ? read_back(oo, i, t, l) : weight8(oo, i, t);
                    }
                bias[o] -= static_cast<uint32_t>(sum * input_zero);
            }
        }
    }
    if (m != METHOD_DIRECT) {
        const bool wino = m == METHOD_WINOGRAD || m == METHOD_WINOGRAD_FIP;
        const bool fip = m == METHOD_FIP || m == METHOD_WINOGRAD_FIP;
        const Packed& p = packed(m);
        const int unit = fip ? 8 : 4, vector = facts_.vector_bytes;
        const int all_channels = spec_.bounds[n];
        const int lanes = ceil_div(all_channels, vector) * vector / 4;
        v.lane_mask.assign(lanes, 0);
        v.lane_shift.assign(lanes, 0);
        v.chunk_used.assign(ceil_div(all_channels, vector), 0);
        std::vector<uint32_t> correction(wino ? 4 * padded : 0, 0);
        int previous = -1;
        for (int r = 0; r < n_local_; r++) {
            const int l = order_[size_t(c) * n_local_ + r], g = c * n_local_ + l;
            if (!low[g]) continue;
            const int shift = total_shift(g);
            const Group group{p.offset[size_t(c) * n_local_ + l], begin(g), ceil_div(size(g), unit),
                              previous < 0 ? 0 : previous - shift, size(g)};
            previous = shift;
            v.low_channels += size(g);
            if (small_)
                v.derive.push_back({plane_.data.bytes() ? plane_.offset[g] : direct_.offset[l], group.weights,
                                    ceil_div(size(g), 4), weight_shift_of(g)});
            if (spec_.dynamic) {  // in the order of the weights; a sample's shifts say in which they are visited
                v.low.push_back(group);
                v.low.back().shift = weight_shift_of(g);
                v.low_local.push_back(l);
            } else {
                append(v.low, group, wino || taps_ == 1, unit, unit * (fip ? facts_.fip_block : facts_.block));
            }
            for (int ch = begin(g); ch < begin(g) + size(g); ch++) v.chunk_used[ch / vector] = 1;
            if (fip)
                for (int octet = begin(g) / 8; octet < begin(g) / 8 + ceil_div(size(g), 8); octet++) {
                    v.lane_mask[2 * octet] = -1;
                    v.lane_shift[2 * octet] = shift;
                }
            if (spec_.dynamic) continue;
            const std::vector<int32_t> own = group_corrections(m, c, l);
            for (size_t o = 0; o < own.size(); o++)
                (wino ? correction : bias)[o] += static_cast<uint32_t>(own[o]) << shift;
        }
        v.final_shift = previous < 0 ? 0 : previous;
        v.correction.resize(correction.size());
        for (size_t o = 0; o < correction.size(); o++) v.correction[o] = wrap(correction[o]);
    }
    if (split_form()) v.split = split_visit(ratio, m, c);
    v.bias.resize(padded);
    for (size_t o = 0; o < padded; o++) v.bias[o] = wrap(bias[o]);
    return v;
}

// What a low group adds to the bias before its shift, or (winograd) to each of the four outputs of a tile: it takes off what the
// operands hold above their values. [1 or 4][padded outputs], or empty.
std::vector<int32_t> ConvLayer::group_corrections(Method m, int c, int l) const {
    const bool wino = m == METHOD_WINOGRAD || m == METHOD_WINOGRAD_FIP, fip = m == METHOD_FIP || m == METHOD_WINOGRAD_FIP;
    if (m == METHOD_NARROW && narrow_offset_ == 0) return {};
    const size_t padded = size_t(blocks_) * facts_.block;
    const int count = size(c * n_local_ + l), i0 = begin(l) - begin(0);
    std::vector<int32_t> result((wino ? 4 : 1) * padded, 0);
    for (int o = 0; o < outputs_per_group_; o++) {
        const int oo = c * outputs_per_group_ + o;
        if (m == METHOD_NARROW) {
            int64_t sum = 0;
            for (int i = i0; i < i0 + count; i++)
                for (int t = 0; t < all_taps_; t++) sum -= int64_t(narrow_offset_) * low_weight(oo, i, t);
            result[o] = wrap(static_cast<uint32_t>(sum));
            continue;
        }
        int64_t sums[16] = {0};
        int32_t u1[16], u2[16];
        for (int octet = 0; octet < ceil_div(count, 8); octet++)
            for (int j = 0; j < 4; j++) {
                const int a = octet * 8 + j, b = a + 4;
                if (a >= count) continue;
                if (!wino) {
                    for (int t = 0; t < all_taps_; t++) {
                        const int w1 = low_weight(oo, i0 + a, t), w2 = b < count ? low_weight(oo, i0 + b, t) : 0;
                        sums[0] -= int64_t(w2 + fip_offset_) * w1;
                    }
                    continue;
                }
                transformed(oo, i0 + a, u1);
                if (b < count)
                    transformed(oo, i0 + b, u2);
                else
                    std::fill(u2, u2 + 16, 0);
                for (int s = 0; s < 16; s++)
                    sums[s] -= fip ? int64_t(u2[s] + offset_w2f_[s]) * u1[s] - (s == 5 ? centre_ * (u1[s] + u2[s]) : 0)
                                   : int64_t(offset_w2_[s]) * (u1[s] + u2[s]);
            }
        if (!wino) {
            result[o] = wrap(static_cast<uint32_t>(sums[0]));
            continue;
        }
        uint32_t in[16], out[4];
        for (int s = 0; s < 16; s++) in[s] = static_cast<uint32_t>(sums[s]);
        output_transform(in, out);
        for (int s = 0; s < 4; s++) result[s * padded + o] = wrap(out[s]);
    }
    return result;
}

Extraction ConvLayer::build_extraction(int ratio, Method m) const {
    Extraction w;
    const int n = n_local_ * spec_.conv_groups, channels = spec_.bounds[n];
    const size_t padded = size_t(ceil_div(channels, facts_.block) + 1) * facts_.block;
    for (auto* a : {&w.shift, &w.half, &w.lo, &w.hi, &w.back}) a->assign(padded, 0);
    std::fill(w.shift.begin(), w.shift.end(), 1);
    w.offset = m == METHOD_FIP ? fip_offset_ : m == METHOD_NARROW ? narrow_offset_ : m == METHOD_DIRECT && spec_.input_signed ? 128 : 0;
    for (int g = 0; g < n; g++) {
        const bool is_low = m != METHOD_DIRECT || spec_.low[size_t(ratio) * n + g];
        const int s = is_low ? spec_.activation_shift[g] : 0;
        const int limit = is_low ? spec_.amax : spec_.input_signed ? 127 : 255;
        for (int ch = begin(g); ch < begin(g) + size(g); ch++) {
            w.shift[ch] = s + 1;
            w.half[ch] = (1 << s) - 1;
            w.lo[ch] = spec_.input_signed ? -limit : 0;
            w.hi[ch] = limit;
            w.back[ch] = m == METHOD_DIRECT ? s : 0;
        }
    }
    const int vector = facts_.vector_bytes;
    w.bytes.assign(size_t(ceil_div(channels, vector)) * vector * 9, 0);
    for (int ch = 0; ch < ceil_div(channels, vector) * vector; ch++) {
        uint8_t* b = w.bytes.data() + size_t(ch / vector) * vector * 9 + ch % vector;
        // Behind the last channel: the first ones again where pixels of few channels fill a vector together.
        const int own = ch < channels ? ch : vector % channels == 0 ? ch % channels : -1;
        if (own < 0)
            set_byte_extraction(b, ch, 0, 0, 0, 0);
        else
            set_byte_extraction(b, ch, w.shift[own] - 1, w.lo[own], w.hi[own], w.back[own]);
    }
    return w;
}

void ConvLayer::set_byte_extraction(uint8_t* b, int ch, int s, int lo, int hi, int back) const {
    const int vector = facts_.vector_bytes, bit = ch % 8 * 8;
    b[0] = static_cast<uint8_t>(bit + s);
    b[vector] = static_cast<uint8_t>(s > 0 ? (1 << (s - 1)) - 1 : 0);
    b[2 * vector] = s > 0;
    b[3 * vector] = static_cast<uint8_t>(255 >> s);
    b[4 * vector] = static_cast<uint8_t>(128 >> s);
    b[5 * vector] = static_cast<uint8_t>(lo);
    b[6 * vector] = static_cast<uint8_t>(hi);
    b[7 * vector] = static_cast<uint8_t>((bit - back + 64) % 64);
    b[8 * vector] = static_cast<uint8_t>(255 << back);
}

void ConvLayer::prepare(int ratio, Method m) {
    const size_t at = size_t(ratio) * kMethods + m;
    if (built_[at]) return;
    if (sealed_) throw std::logic_error("layer '" + spec_.name + "': its weights are packed already");
    visits_[at].clear();
    for (int c = 0; c < spec_.conv_groups; c++) visits_[at].push_back(build_visit(ratio, m, c));
    extractions_[at] = build_extraction(ratio, m);
    if (spec_.dynamic && m != METHOD_DIRECT && corrections_[m].empty())
        for (int g = 0; g < n_local_ * spec_.conv_groups; g++) {
            const std::vector<int32_t> own = group_corrections(m, g / n_local_, g % n_local_);
            corrections_[m].insert(corrections_[m].end(), own.begin(), own.end());
        }
    built_[at] = true;
}

const Visit& ConvLayer::visit(int ratio, Method m, int c) { return visits_[size_t(ratio) * kMethods + m][c]; }
const Extraction& ConvLayer::extraction(int ratio, Method m) { return extractions_[size_t(ratio) * kMethods + m]; }

void ConvLayer::fill(ExtractArgs& a, int ratio, Method m) {
    const Extraction& l = extraction(ratio, m);
    a.zero = spec_.input_signed ? 128 : 0;
    a.offset = l.offset;
    a.shift = l.shift.data();
    a.half = l.half.data();
    a.lo = l.lo.data();
    a.hi = l.hi.data();
    a.back = l.back.data();
    a.bytes = l.bytes.data();
}

void ConvLayer::fill(ConvArgs& a, int ratio, Method m, int c) {
    const Visit& v = visit(ratio, m, c);
    a.outputs = outputs_per_group_;
    a.stride_h = spec_.stride_h;
    a.stride_w = spec_.stride_w;
    a.pad_h = spec_.pad_h;
    a.pad_w = spec_.pad_w;
    a.taps = taps_;
    a.block = facts_.block;
    a.high = {v.high.data(), static_cast<int32_t>(v.high.size()), 0, v.high_channels};
    a.high_weights = reinterpret_cast<const int8_t*>(direct_.data.data()) + c * direct_.group_bytes_all;
    a.high_block_bytes = direct_.block_bytes;
    if (split_form() && !v.split.empty()) {
        a.high_weights = reinterpret_cast<const int8_t*>(direct_.data.data());
        a.split = v.split.data();
        a.split_runs = static_cast<int32_t>(v.split.size()) / blocks_;
        a.split_places = split_places_[m == METHOD_DIRECT && has_low(ratio)].data();
    }
    a.read_back_channels = v.read_back_channels;
    a.method = m;
    a.low_groups = {v.low.data(), static_cast<int32_t>(v.low.size()), v.final_shift, v.low_channels};
    const Packed& p = packed(m);
    a.low_weights = m == METHOD_DIRECT ? nullptr : reinterpret_cast<const int8_t*>(p.data.data()) + c * p.group_bytes_all;
    a.low_block_bytes = p.block_bytes;
    a.derive = v.derive.empty() ? nullptr : v.derive.data();
    a.derive_groups = static_cast<int32_t>(v.derive.size());
    a.wmax = spec_.wmax;
    a.plane = {plane_.data.bytes() ? reinterpret_cast<const int8_t*>(plane_.data.data()) + c * plane_.group_bytes_all : nullptr,
               plane_.block_bytes, nibbles_};
    a.low_offset = fip_offset_;
    a.lane_mask = v.lane_mask.data();
    a.lane_shift = v.lane_shift.data();
    a.chunk_used = v.chunk_used.data();
    a.low_bytes = static_cast<int32_t>(v.chunk_used.size()) * facts_.vector_bytes;
    for (int s = 0; s < 16; s++)
        a.position_offset[s] = static_cast<uint8_t>(m == METHOD_WINOGRAD_FIP ? offset_w2f_[s] : offset_w2_[s]);
    a.centre = static_cast<uint8_t>(m == METHOD_WINOGRAD_FIP ? centre_ : 0);
    a.correction = v.correction.data();
    a.epilogue.bias = v.bias.data();
    a.epilogue.multiplier = multiplier(c);
}

}  // namespace bitdial
