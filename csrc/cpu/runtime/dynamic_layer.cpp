// Layers whose activation shifts are chosen at run time: per sample and group, by an OR over the magnitudes at hand.
//
// A sample's shifts decide how its input is extracted, in which order its low groups are visited (by falling shift), and what the
// bias takes back of the kernels' offsets. All of that is made of parts prepared per layer: a few copies and sums per sample.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "conv_layer.h"

namespace bitdial {

namespace {

constexpr int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

struct VisitHead {  // in front of a visit's other arrays
    int32_t groups, final_shift;
};

constexpr int kEightBits = 8;   // the template of channels that stay as they are; those before it are of shifts 0..7
constexpr int kMostShift = 24;  // of activations and weights together

}  // namespace

void ConvLayer::lay_out_samples() {
    const int n_groups = n_local_ * spec_.conv_groups, channels = spec_.bounds[n_groups], vector = facts_.vector_bytes;
    for (int g = 0; g < n_groups; g++)
        if (most_shift(g) >= kMostShift) throw std::invalid_argument("layer '" + spec_.name + "': a weight shift is too large");
    SampleLayout s;
    const int64_t padded = int64_t(blocks_) * facts_.block;
    s.shifts = rounded(channels);
    s.extraction = s.shifts + rounded(n_groups);
    const int64_t whole = int64_t(ceil_div(channels, vector)) * vector;
    s.visits = s.extraction + rounded(facts_.extracts_bytes ? whole * 9 : whole * 5 * 4);
    s.groups = rounded(sizeof(VisitHead));
    s.lane_shift = s.groups + rounded(int64_t(sizeof(Group)) * n_local_);
    s.bias = s.lane_shift + rounded(whole);  // four bytes per four channels
    s.correction = s.bias + rounded(4 * padded);
    const bool winograd = obstacles_[METHOD_WINOGRAD].empty() || obstacles_[METHOD_WINOGRAD_FIP].empty();
    s.visit_bytes = s.correction + (winograd ? rounded(4 * 4 * padded) : 0);
    const bool only_direct = std::none_of(obstacles_.begin() + 1, obstacles_.end(), [](const std::string& why) { return why.empty(); });
    s.bytes = s.visits + (only_direct ? 0 : s.visit_bytes * spec_.conv_groups);
    sample_layout_ = s;
    if (facts_.extracts_bytes) build_templates();
}

void ConvLayer::build_templates() {
    const int vector = facts_.vector_bytes;
    templates_.resize(size_t(2) * 9 * 9 * vector);
    uint8_t* b = templates_.data();
    for (int back = 0; back < 2; back++)
        for (int kind = 0; kind <= kEightBits; kind++, b += 9 * vector) {
            const int s = kind == kEightBits ? 0 : kind;
            const int limit = kind == kEightBits ? (spec_.input_signed ? 127 : 255) : spec_.amax;
            for (int ch = 0; ch < vector; ch++)
                set_byte_extraction(b + ch, ch, s, spec_.input_signed ? -limit : 0, limit, back ? s : 0);
        }
}

void ConvLayer::choose_shifts(uint8_t* memory, int ratio, Method m) {
    const SampleLayout& at = sample_layout_;
    const int n_groups = n_local_ * spec_.conv_groups, channels = spec_.bounds[n_groups], vector = facts_.vector_bytes;
    const uint8_t* magnitudes = memory + at.magnitudes;
    uint8_t* shifts = memory + at.shifts;
    const uint8_t* low = spec_.low.data() + size_t(ratio) * n_groups;
    const int kept = bits(spec_.amax);
    for (int g = 0; g < n_groups; g++) {
        int seen = 0;
        for (int ch = begin(g); ch < begin(g + 1); ch++) seen |= magnitudes[ch];
        shifts[g] = low[g] ? static_cast<uint8_t>(std::max(0, bits(seen) - kept)) : 0;
    }
    // extraction, group by group
    uint8_t* to = memory + at.extraction;
    const int64_t whole = int64_t(ceil_div(channels, vector)) * vector;
    const bool back = m == METHOD_DIRECT;
    for (int g = 0; g < n_groups; g++) {
        const bool is_low = !back || low[g];  // kernels of low groups do not read what the others become
        if (facts_.extracts_bytes) {
            const uint8_t* from = templates_.data() + size_t((back ? 9 : 0) + (is_low ? shifts[g] : kEightBits)) * 9 * vector;
            // Pixels of few channels that fill a vector together: the same again for every pixel of it.
            const int again = channels < vector && vector % channels == 0 ? vector : channels;
            for (int pixel = 0; pixel < again; pixel += channels)
                for (int ch = pixel + begin(g), end = pixel + begin(g + 1), next; ch < end; ch = next) {
                    next = std::min(end, (ch / vector + 1) * vector);
                    uint8_t* row = to + int64_t(ch / vector) * vector * 9 + ch % vector;
                    for (int i = 0; i < 9; i++)
                        std::memcpy(row + i * vector, from + i * vector + ch % vector, size_t(next - ch));
                }
        } else {
            const int s = is_low ? shifts[g] : 0, limit = is_low ? spec_.amax : spec_.input_signed ? 127 : 255;
            const int32_t values[5] = {s + 1, (1 << s) - 1, spec_.input_signed ? -limit : 0, limit, back ? s : 0};
            const int64_t end = g + 1 < n_groups ? begin(g + 1) : whole;  // whole vectors are shifted
            for (int i = 0; i < 5; i++) {
                int32_t* row = reinterpret_cast<int32_t*>(to) + i * whole;
                std::fill(row + begin(g), row + end, values[i]);
            }
        }
    }
    if (m == METHOD_DIRECT) return;
    const bool wino = m == METHOD_WINOGRAD || m == METHOD_WINOGRAD_FIP, fip = m == METHOD_FIP || m == METHOD_WINOGRAD_FIP;
    const size_t padded = size_t(blocks_) * facts_.block, each = (wino ? 4 : 1) * padded;
    for (int c = 0; c < spec_.conv_groups; c++) {
        const Visit& v = visit(ratio, m, c);
        uint8_t* own = memory + at.visits + c * at.visit_bytes;
        auto& head = *reinterpret_cast<VisitHead*>(own);
        Group* groups = reinterpret_cast<Group*>(own + at.groups);
        int32_t* lanes = reinterpret_cast<int32_t*>(own + at.lane_shift);
        int32_t* bias = reinterpret_cast<int32_t*>(own + at.bias);
        int32_t* correction = reinterpret_cast<int32_t*>(own + at.correction);
        std::copy(v.bias.begin(), v.bias.end(), bias);
        if (wino) std::fill(correction, correction + 4 * padded, 0);
        if (fip) std::fill(lanes, lanes + v.lane_mask.size(), 0);
        head = {0, 0};
        const int count = static_cast<int>(v.low.size());
        int before[kMostShift] = {0};  // how many groups have a larger shift
        for (int i = 0; i < count; i++) {
            const int shift = v.low[i].shift + shifts[c * n_local_ + v.low_local[i]];
            for (int s = 0; s < shift; s++) before[s]++;
        }
        for (int i = 0; i < count; i++) {
            const int local = v.low_local[i], g = c * n_local_ + local, shift = v.low[i].shift + shifts[g];
            Group& group = groups[before[shift]++];
            group = v.low[i];
            group.shift = shift;
            if (fip)
                for (int octet = begin(g) / 8; octet < begin(g) / 8 + ceil_div(size(g), 8); octet++) lanes[2 * octet] = shift;
            if (corrections_[m].empty()) continue;
            const int32_t* from = corrections_[m].data() + (size_t(c) * n_local_ + local) * each;
            uint32_t* sums = reinterpret_cast<uint32_t*>(wino ? correction : bias);
            for (size_t o = 0; o < each; o++) sums[o] += static_cast<uint32_t>(from[o]) << shift;
        }
        // Horner's rule, and groups that lie side by side joined.
        const int unit = fip ? 8 : 4, unit_bytes = unit * (fip ? facts_.fip_block : facts_.block);
        for (int i = 0, previous = 0; i < count; i++) {
            Group group = groups[i];
            const int shift = group.shift;
            group.shift = i == 0 ? 0 : previous - shift;
            head.final_shift = previous = shift;
            if ((wino || taps_ == 1) && head.groups > 0 && joins(groups[head.groups - 1], group, unit, unit_bytes))
                continue;
            groups[head.groups++] = group;
        }
    }
}

void ConvLayer::use_sample(ExtractArgs& a, const uint8_t* memory) const {
    const uint8_t* from = memory + sample_layout_.extraction;
    a.bytes = from;
    if (facts_.extracts_bytes) return;
    const int channels = spec_.bounds.back(), vector = facts_.vector_bytes;
    const int64_t whole = int64_t(ceil_div(channels, vector)) * vector;
    const int32_t* rows = reinterpret_cast<const int32_t*>(from);
    a.shift = rows;
    a.half = rows + whole;
    a.lo = rows + 2 * whole;
    a.hi = rows + 3 * whole;
    a.back = rows + 4 * whole;
}

void ConvLayer::use_sample(ConvArgs& a, const uint8_t* memory, int conv_group) const {
    const SampleLayout& at = sample_layout_;
    const uint8_t* own = memory + at.visits + conv_group * at.visit_bytes;
    const auto& head = *reinterpret_cast<const VisitHead*>(own);
    a.low_groups.groups = reinterpret_cast<const Group*>(own + at.groups);
    a.low_groups.count = head.groups;
    a.low_groups.final_shift = head.final_shift;
    a.lane_shift = reinterpret_cast<const int32_t*>(own + at.lane_shift);
    a.epilogue.bias = reinterpret_cast<const int32_t*>(own + at.bias);
    a.correction = reinterpret_cast<const int32_t*>(own + at.correction);
}

}  // namespace bitdial
