#include "conv_layer.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <stdexcept>

namespace bitdial {

#define BITDIAL_NAME(id, name) name,
const char* const kMethodNames[kMethods] = {BITDIAL_METHOD_LIST(BITDIAL_NAME)};
#undef BITDIAL_NAME

namespace {

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

    take_low_weights();
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

void ConvLayer::take_low_weights() {
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
    order_.resize(spec_.bounds.size() - 1);
    for (int c = 0; c < spec_.conv_groups; c++) {
        auto* first = order_.data() + c * n_local_;
        std::iota(first, first + n_local_, 0);
        if (std::any_of(obstacles_.begin() + 1, obstacles_.end(), [](const std::string& why) { return why.empty(); }))
            std::stable_sort(first, first + n_local_, [&](int a, int b) {
                return total_shift(c * n_local_ + a) > total_shift(c * n_local_ + b);
            });
    }
}

void ConvLayer::renew(std::vector<int32_t> bias, std::vector<uint8_t> weight_shift, std::vector<int8_t> low_weight) {
    if (sealed_) throw std::logic_error("layer '" + spec_.name + "': the engine is loaded, its weights are packed");
    if (bias.size() != spec_.bias.size() || (eligible_ && weight_shift.size() != spec_.weight_shift.size()) ||
        (!low_weight.empty() && low_weight.size() != spec_.weight.size()))
        throw std::invalid_argument("layer '" + spec_.name + "': its arrays do not fit it");
    spec_.bias = std::move(bias);
    if (eligible_) spec_.weight_shift = std::move(weight_shift);
    spec_.low_weight = std::move(low_weight);
    take_low_weights();
    for (Packed* p : {&direct_, &fip_, &winograd_, &winograd_fip_, &narrow_}) *p = Packed();
    std::fill(built_.begin(), built_.end(), false);
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

}  // namespace bitdial
