#include "conv_layer.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <stdexcept>

namespace bitdial {

const char* const kMethodNames[kMethods] = {"direct", "fip", "winograd", "winograd_fip", "narrow"};

namespace {

int ceil_div(int a, int b) { return (a + b - 1) / b; }
int32_t wrap(uint32_t v) { return static_cast<int32_t>(v); }

// clamp(rne(v / 2^s), -limit, limit)
int extract_value(int v, int s, int limit) {
    const int q = (2 * v + ((1 << s) - 1) + ((v >> s) & 1)) >> (s + 1);
    return std::min(std::max(q, -limit), limit);
}

struct Range {
    int lo, hi;
};
Range minus(Range a, Range b) { return {a.lo - b.hi, a.hi - b.lo}; }
Range plus(Range a, Range b) { return {a.lo + b.lo, a.hi + b.hi}; }

// Range of every Winograd position for inputs in `x`.
std::array<Range, 16> winograd_ranges(Range x) {
    const Range rows[4] = {minus(x, x), plus(x, x), minus(x, x), minus(x, x)};
    std::array<Range, 16> v{};
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) v[4 * i + j] = j == 1 ? plus(rows[i], rows[i]) : minus(rows[i], rows[i]);
    return v;
}

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

ConvLayer::ConvLayer(ConvSpec spec, const Facts& facts, bool folded, bool small)
    : spec_(std::move(spec)), facts_(facts), folded_(folded), small_(small) {
    all_taps_ = spec_.kernel_h * spec_.kernel_w;
    taps_ = folded_ ? spec_.kernel_h : all_taps_;
    const int n_groups = static_cast<int>(spec_.bounds.size()) - 1;
    if (n_groups < 1 || n_groups % spec_.conv_groups != 0 || spec_.bounds[n_groups] != spec_.inputs * spec_.conv_groups)
        throw std::invalid_argument("layer '" + spec_.name + "': group bounds do not fit its channels");
    n_local_ = n_groups / spec_.conv_groups;
    for (int g = 0; g < n_groups; g++)  // packed weights have one layout for all convolution groups
        if (begin(g) != g / n_local_ * spec_.inputs + begin(g % n_local_) || size(g) < 1)
            throw std::invalid_argument("layer '" + spec_.name + "': its convolution groups are cut differently");
    outputs_per_group_ = spec_.outputs / spec_.conv_groups;
    blocks_ = ceil_div(outputs_per_group_, facts_.block);
    fip_blocks_ = blocks_ * (facts_.block / facts_.fip_block);
    for (int r = 0; r < spec_.ratios; r++) {
        const auto first = spec_.low.begin() + int64_t(r) * n_groups;
        low_at_.push_back(std::any_of(first, first + n_groups, [](uint8_t l) { return l != 0; }));
        eligible_ = eligible_ || low_at_.back();
    }

    const size_t padded = size_t(blocks_) * facts_.block;
    multiplier_padded_.assign(padded * spec_.conv_groups, 0.f);
    for (int g = 0; g < spec_.conv_groups; g++)
        for (int o = 0; o < outputs_per_group_; o++)
            multiplier_padded_[g * padded + o] = spec_.multiplier[size_t(g) * outputs_per_group_ + o];

    for (int8_t w : spec_.low_weight)
        if (std::abs(int(w)) > spec_.wmax)
            throw std::invalid_argument("layer '" + spec_.name + "': a low weight is larger than " + std::to_string(spec_.wmax));
    stored_ = eligible_ && !spec_.low_weight.empty();
    if (stored_)
        low_weight_.swap(spec_.low_weight);
    else if (eligible_)
        derive_low_weights();
    std::vector<int8_t>().swap(spec_.low_weight);
    find_obstacles();
    order_.resize(n_groups);
    for (int c = 0; c < spec_.conv_groups; c++) {
        auto* first = order_.data() + c * n_local_;
        std::iota(first, first + n_local_, 0);
        if (std::any_of(obstacles_.begin() + 1, obstacles_.end(), [](const std::string& why) { return why.empty(); }))
            std::stable_sort(first, first + n_local_, [&](int a, int b) {
                return total_shift(c * n_local_ + a) > total_shift(c * n_local_ + b);
            });
    }
    visits_.resize(size_t(spec_.ratios) * kMethods);
    extractions_.resize(size_t(spec_.ratios) * kMethods);
    built_.assign(size_t(spec_.ratios) * kMethods, false);
    spec_.dynamic = spec_.dynamic && eligible_;
    if (spec_.dynamic) lay_out_samples();
    if (small_) {
        // Everything is made now, and the weights in their own order are given back layer by layer.
        const bool read_back = eligible_ && !obstacles_[METHOD_NARROW].empty();
        pack_direct(read_back);
        if (obstacles_[METHOD_FIP].empty()) fip_ = lay_out(8, taps_, true);
        if (obstacles_[METHOD_NARROW].empty()) narrow_ = lay_out(4, taps_, false);
        if (stored_ && !read_back) pack_plane();
        for (int r = 0; r < spec_.ratios; r++)
            for (Method m : {METHOD_DIRECT, METHOD_FIP, METHOD_NARROW})
                if (obstacles_[m].empty() && (m != METHOD_DIRECT || read_back || !has_low(r))) prepare(r, m);
        seal();
    }
}

void ConvLayer::derive_low_weights() {
    low_weight_.resize(spec_.weight.size());
    for (int o = 0; o < spec_.outputs; o++)
        for (int l = 0; l < n_local_; l++) {
            const int s = spec_.weight_shift[size_t(o) * n_local_ + l];
            const int base = begin(0);
            for (int i = begin(l) - base; i < begin(l + 1) - base; i++)
                for (int t = 0; t < all_taps_; t++)
                    low_weight_[(size_t(o) * spec_.inputs + i) * all_taps_ + t] =
                        static_cast<int8_t>(extract_value(weight8(o, i, t), s, spec_.wmax));
        }
}

int ConvLayer::weight_shift_of(int group) const {
    const int conv_group = group / n_local_, local = group % n_local_;
    return spec_.weight_shift[size_t(conv_group) * outputs_per_group_ * n_local_ + local];
}

int ConvLayer::read_back(int o, int i, int tap, int local) const {
    return low_weight(o, i, tap) * (1 << spec_.weight_shift[size_t(o) * n_local_ + local]);
}

void ConvLayer::transformed(int o, int i, int32_t (&u)[16]) const {
    static const int G[4][3] = {{2, 0, 0}, {1, 1, 1}, {1, -1, 1}, {0, 0, 2}};
    int rows[4][3];
    for (int r = 0; r < 4; r++)
        for (int x = 0; x < 3; x++)
            rows[r][x] = G[r][0] * low_weight(o, i, x) + G[r][1] * low_weight(o, i, 3 + x) + G[r][2] * low_weight(o, i, 6 + x);
    for (int r = 0; r < 4; r++)
        for (int c = 0; c < 4; c++) u[4 * r + c] = G[c][0] * rows[r][0] + G[c][1] * rows[r][1] + G[c][2] * rows[r][2];
}

void ConvLayer::find_obstacles() {
    obstacles_[METHOD_DIRECT] = "";
    for (int m : {METHOD_FIP, METHOD_WINOGRAD, METHOD_WINOGRAD_FIP, METHOD_NARROW}) obstacles_[m] = "";
    auto block = [&](std::initializer_list<int> methods, const std::string& why) {
        for (int m : methods)
            if (obstacles_[m].empty()) obstacles_[m] = why;
    };
    if (!eligible_) block({METHOD_FIP, METHOD_WINOGRAD, METHOD_WINOGRAD_FIP, METHOD_NARROW}, "no channel is ever low");
    if (folded_) block({METHOD_FIP, METHOD_WINOGRAD, METHOD_WINOGRAD_FIP, METHOD_NARROW}, "few input channels");
    if (!facts_.has_fip) block({METHOD_FIP, METHOD_WINOGRAD_FIP}, "not built for this instruction set");
    if (spec_.kernel_h != 3 || spec_.kernel_w != 3 || spec_.stride_h != 1 || spec_.stride_w != 1 || spec_.dilation_h != 1 ||
        spec_.dilation_w != 1)
        block({METHOD_WINOGRAD, METHOD_WINOGRAD_FIP}, "not a 3x3 convolution of stride 1");
    if (small_) block({METHOD_WINOGRAD, METHOD_WINOGRAD_FIP}, "memory='small' keeps one copy of the weights");
    if (!eligible_ || folded_) return;
    for (int o = 0; o < spec_.outputs; o++)
        for (int l = 0; l < n_local_; l++)
            if (spec_.weight_shift[size_t(o) * n_local_ + l] != weight_shift_of(o / outputs_per_group_ * n_local_ + l)) {
                block({METHOD_FIP, METHOD_WINOGRAD, METHOD_WINOGRAD_FIP, METHOD_NARROW}, "weight shifts differ between output channels");
                return;
            }
    for (int g = 0; g < n_local_ * spec_.conv_groups; g++)
        if (begin(g) % 8 != 0)
            block({METHOD_FIP, METHOD_WINOGRAD_FIP}, "a group of channels does not begin at a multiple of 8");
    // operand ranges
    const Range x = {spec_.input_signed ? -spec_.amax : 0, spec_.amax};
    int w_max = 0;
    for (int8_t w : low_weight_) w_max = std::max(w_max, std::abs(int(w)));
    fip_offset_ = w_max - x.lo;
    if (x.hi + fip_offset_ + w_max > 255 || x.hi + w_max > 127 || x.lo - w_max < -128)
        block({METHOD_FIP}, "operands of " + std::to_string(spec_.amax) + " and " + std::to_string(w_max) + " leave the bytes");
    narrow_offset_ = -x.lo;
    if (facts_.narrow_is_faster && 8 * (x.hi - x.lo) * w_max > 32767) block({METHOD_NARROW}, "sums of eight products leave 16 bits");
    if (!obstacles_[METHOD_WINOGRAD].empty() && !obstacles_[METHOD_WINOGRAD_FIP].empty()) return;
    const auto v = winograd_ranges(x);
    std::array<int, 16> u_max{};
    for (int o = 0; o < spec_.outputs; o++)
        for (int i = 0; i < spec_.inputs; i++) {
            int32_t u[16];
            transformed(o, i, u);
            for (int s = 0; s < 16; s++) u_max[s] = std::max(u_max[s], std::abs(u[s]));
        }
    for (int s = 0; s < 16; s++) {
        offset_w2_[s] = -v[s].lo;
        if (v[s].hi - v[s].lo > 255 || u_max[s] > 127)
            block({METHOD_WINOGRAD}, "transformed operands leave the bytes");
        if (facts_.narrow_is_faster && 8 * (v[s].hi - v[s].lo) * u_max[s] > 32767)
            block({METHOD_WINOGRAD}, "sums of eight transformed products leave 16 bits");
        // Position 5, sums of sums, is 0 .. 4 amax for unsigned inputs; around its middle it fits like the others.
        const int centre = s == 5 ? (v[s].lo + v[s].hi) / 2 : 0, lo = v[s].lo - centre, hi = v[s].hi - centre;
        if (s == 5) centre_ = centre;
        offset_w2f_[s] = u_max[s] - lo;
        if (hi + offset_w2f_[s] + u_max[s] > 255 || hi + u_max[s] > 127 || lo - u_max[s] < -128)
            block({METHOD_WINOGRAD_FIP}, "transformed operands leave the bytes");
    }
    // The transform carries four times the accumulator.
    for (int o = 0; o < spec_.outputs; o++) {
        int64_t bound = 0;
        for (int l = 0; l < n_local_; l++) {
            int64_t row = 0;
            for (int i = begin(l); i < begin(l + 1); i++)
                for (int t = 0; t < 9; t++) row += std::abs(int(low_weight(o, i, t)));
            bound += (row * spec_.amax * 4) << most_shift(o / outputs_per_group_ * n_local_ + l);
        }
        if (bound >= (int64_t(1) << 31)) {
            block({METHOD_WINOGRAD, METHOD_WINOGRAD_FIP}, "four times the accumulator would leave 32 bits");
            break;
        }
    }
}

// ---- packing ---------------------------------------------------------------------------------------------------------

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

void ConvLayer::keep(const std::array<bool, kMethods>& methods, bool low_at_direct) {
    if (small_) return;
    if (sealed_) throw std::logic_error("layer '" + spec_.name + "': the engine is loaded, its kernels are chosen");
    if (direct_.data.data() == nullptr || direct_has_read_back_ != low_at_direct) {
        if (split_form())
            pack_split(low_at_direct);
        else
            pack_direct(low_at_direct);
        std::fill(built_.begin(), built_.end(), false);
    }
    auto want = [&](Method m, Packed& p, auto pack) {
        if (methods[m] && obstacles_[m].empty()) {
            if (p.data.data() == nullptr) {
                pack();
                std::fill(built_.begin(), built_.end(), false);
            }
        } else {
            p = Packed();
            std::vector<int32_t>().swap(corrections_[m]);
        }
    };
    want(METHOD_FIP, fip_, [&] { pack_fip(); });
    want(METHOD_NARROW, narrow_, [&] { pack_narrow(); });
    want(METHOD_WINOGRAD, winograd_, [&] { pack_winograd(false); });
    want(METHOD_WINOGRAD_FIP, winograd_fip_, [&] { pack_winograd(true); });
}

void ConvLayer::seal() {
    std::vector<int8_t>().swap(spec_.weight);
    std::vector<int8_t>().swap(low_weight_);
    sealed_ = true;
}

std::array<int64_t, 7> ConvLayer::weight_bytes() const {
    const int64_t all = direct_.data.bytes();
    return {all - read_back_bytes_, read_back_bytes_, fip_.data.bytes(), winograd_.data.bytes(), winograd_fip_.data.bytes(),
            narrow_.data.bytes(), plane_.data.bytes()};
}

// ---- visits ----------------------------------------------------------------------------------------------------------

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
