// A convolution or linear layer as a step of a program: which kernels it uses, their scratch memory, its share of the threads.
#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "program.h"

namespace bitdial {

ConvStep::ConvStep(Program& program, ConvSpec spec, int src, int dst, int residual, float residual_factor, float lo, float hi,
                   int kind_of_output, bool folded)
    : program_(program),
      layer_(std::move(spec), program.facts(), folded, program.small()),
      src_(src),
      dst_(dst),
      residual_(residual),
      kind_(kind_of_output),
      residual_factor_(residual_factor),
      lo_(lo),
      hi_(hi) {
    name = layer_.spec().name;
    kind = "conv";
    reads = {src_};
    if (residual_ >= 0) reads.push_back(residual_);
    writes = {dst_};
    const ConvSpec& c = layer_.spec();
    // Sums are int32: with such factors nothing reaches the ends of int32 before it is rounded.
    saturates_ = program.facts().saturates && std::all_of(c.multiplier.begin(), c.multiplier.end(),
                                                                 [](float m) { return std::fabs(m) <= 0.5f; });
    const TensorSpec s = program.tensor(src_), d = program.tensor(dst_);
    auto offsets = [&](const TensorSpec& t) {
        std::vector<int32_t> taps;
        for (int y = 0; y < c.kernel_h; y++)
            for (int x = 0; x < (folded ? 1 : c.kernel_w); x++)
                taps.push_back(static_cast<int32_t>(y * c.dilation_h * t.pitch_y() + x * c.dilation_w * t.pitch_x()));
        return taps;
    };
    src_taps_ = offsets(s);
    bool any_low = false;
    for (int r = 0; r < c.ratios; r++) any_low = any_low || layer_.has_low(r);
    if (any_low && extracts_here()) low_taps_ = {0};
    if (any_low && !extracts_here()) {
        TensorSpec low = s;
        low.zero = 0;
        low.external = false;
        low.alias = -1;
        low.halo_h = c.pad_h;
        low.halo_w = c.pad_w;
        // As far as the last window reaches; Winograd's tiles of 2 x 2 outputs read 4 x 4 inputs, also where only one output is
        // inside.
        const bool tiles = c.kernel_h == 3 && c.kernel_w == 3;
        auto beyond = [tiles](int out, int stride, int kernel, int dilation, int pad, int in) {
            return std::max({0, (out - 1) * stride + (kernel - 1) * dilation + 1 - pad - in,
                             tiles ? (out + 1) / 2 * 2 + 2 - pad - in : 0});
        };
        low.halo_bottom = beyond(d.h, c.stride_h, c.kernel_h, c.dilation_h, c.pad_h, s.h);
        low.halo_right = beyond(d.w, c.stride_w, c.kernel_w, c.dilation_w, c.pad_w, s.w);
        extracted_ = program.add_tensor(low);
        temporaries = {extracted_};
        low_taps_ = offsets(low);
    }
    if (layer_.dynamic()) {
        TensorSpec memory;
        memory.whole = 1;
        memory.c = static_cast<int>(layer_.sample_layout().bytes);
        samples_ = program.add_tensor(memory);
        temporaries.push_back(samples_);
    }
    layer_.set_taps(src_taps_, low_taps_);
    for (int r = 0; r < c.ratios; r++) choices_.push_back(usual(r));
}

int ConvStep::default_chunk(Method m) const {
    if (m == METHOD_WINOGRAD || m == METHOD_WINOGRAD_FIP) {
        // V and M of a chunk in half the second cache: 16 * (channels + 4 * block) bytes a tile.
        const int64_t tile = 16 * (int64_t(layer_.spec().bounds.back()) + 4 * program_.facts().block);
        return static_cast<int>(std::min<int64_t>(192, std::max<int64_t>(24, (512 << 10) / tile / 12 * 12)));
    }
    return 192;
}

Choice ConvStep::usual(int ratio) const {
    Choice c;
    c.method = METHOD_DIRECT;
    if (layer_.has_low(ratio)) {
        const int per_group = layer_.spec().bounds.back() / layer_.spec().conv_groups;
        if (layer_.obstacle(METHOD_WINOGRAD_FIP).empty() && per_group >= 32)
            c.method = METHOD_WINOGRAD_FIP;
        else if (layer_.obstacle(METHOD_WINOGRAD).empty() && per_group >= 32)
            c.method = METHOD_WINOGRAD;
        else if (layer_.obstacle(METHOD_FIP).empty() && per_group >= 32)
            c.method = METHOD_FIP;
        const bool narrow = layer_.obstacle(METHOD_NARROW).empty();
        if (narrow && c.method != METHOD_WINOGRAD && program_.facts().narrow_is_faster) c.method = METHOD_NARROW;
        if (narrow && c.method == METHOD_DIRECT && program_.small()) c.method = METHOD_NARROW;  // no read-back copy
    }
    c.chunk = default_chunk(c.method);
    return c;
}

void ConvStep::choose(int ratio, Choice choice) {
    if (ratio < 0 || ratio >= static_cast<int>(choices_.size())) throw std::invalid_argument("no such ratio");
    if (choice.method != METHOD_DIRECT && !layer_.has_low(ratio)) choice.method = METHOD_DIRECT;
    if (choice.method == METHOD_DIRECT && program_.small() && layer_.has_low(ratio) && layer_.obstacle(METHOD_NARROW).empty())
        choice.method = METHOD_NARROW;
    if (!layer_.obstacle(choice.method).empty())
        throw std::invalid_argument("layer '" + name + "' cannot use " + kMethodNames[choice.method] + ": " +
                                    layer_.obstacle(choice.method));
    choice.chunk = choice.chunk / 12 * 12;  // whole register tiles
    if (choice.chunk <= 0) choice.chunk = default_chunk(choice.method);
    choices_[ratio] = choice;
    scratch_ = -1;
}

void ConvStep::renew(std::vector<int32_t> bias, std::vector<uint8_t> weight_shift, std::vector<int8_t> low_weight) {
    layer_.renew(std::move(bias), std::move(weight_shift), std::move(low_weight));
    for (size_t r = 0; r < choices_.size(); r++) choose(static_cast<int>(r), {METHOD_DIRECT, 0});
    keep(false);
}

void ConvStep::keep(bool all) {
    std::array<bool, kMethods> used{};
    bool low_at_direct = false;
    for (size_t r = 0; r < choices_.size(); r++) {
        used[choices_[r].method] = true;
        if ((all || choices_[r].method == METHOD_DIRECT) && layer_.has_low(static_cast<int>(r))) low_at_direct = true;
    }
    if (all) used.fill(true);
    layer_.keep(used, low_at_direct);
    for (size_t r = 0; r < choices_.size(); r++) layer_.prepare(static_cast<int>(r), choices_[r].method);
    scratch_ = most_scratch();
}

void ConvStep::set_geometry(const Run& run, ConvArgs& a, int conv_group) const {
    const ConvSpec& c = layer_.spec();
    const TensorSpec& d = program_.tensor(dst_);
    a.batch = run.samples(dst_);
    a.out_h = d.h;
    a.out_w = d.w;
    a.src_taps = src_taps_.data();
    a.low_taps = low_taps_.data();
    a.src = run.const_bytes(src_);
    const int64_t first = int64_t(conv_group) * (c.outputs / c.conv_groups);
    auto target = [&](int tensor) {
        const TensorSpec& t = program_.tensor(tensor);
        const int64_t size = t.is_float ? 4 : 1;
        return Target{run.context.base[tensor] + (t.origin() + first * t.stride_c()) * size, t.pitch_n() * size,
                      t.pitch_y() * size, t.pitch_x() * size};
    };
    a.out = target(dst_);
    Epilogue& e = a.epilogue;
    e.lo = lo_;
    e.hi = hi_;
    e.kind = kind_ == OUT_ACCUMULATORS ? OUT_ACCUMULATORS : d.is_float ? OUT_FLOAT : OUT_BYTES;
    e.zero_out = d.zero;
    e.out_stride_c = d.stride_c();
    e.residual_kind = RESIDUAL_NONE;
    if (residual_ >= 0) {
        const TensorSpec& t = program_.tensor(residual_);
        a.residual = target(residual_);
        e.residual_kind = t.is_float ? RESIDUAL_FLOAT : RESIDUAL_BYTES;
        e.zero_residual = t.zero;
        e.residual_factor = residual_factor_;
        e.residual_stride_c = t.stride_c();
    }
    e.mode = EPILOGUE_ANY;
    if (e.kind == OUT_BYTES && e.residual_kind == RESIDUAL_NONE) {
        e.mode = EPILOGUE_LIMITED;
        if (saturates_ && lo_ == 0.f && hi_ == 255.f && e.zero_out == 0) e.mode = EPILOGUE_SATURATED;
        if (saturates_ && lo_ == -127.f && hi_ == 127.f && e.zero_out == 128) e.mode = EPILOGUE_SIGNED;
    }
    if (e.kind == OUT_BYTES && e.residual_kind == RESIDUAL_BYTES) e.mode = EPILOGUE_RESIDUAL;
}

// Every convolution group at every ratio: where one has low groups of channels and another has none, their kernels differ.
int64_t ConvStep::most_scratch() {
    int64_t most = 0;
    for (int r = 0; r < static_cast<int>(choices_.size()); r++)
        for (int g = 0; g < layer_.spec().conv_groups; g++) {
            ConvArgs a{};
            const TensorSpec& d = program_.tensor(dst_);
            a.batch = d.factor;
            a.out_h = d.h;
            a.out_w = d.w;
            layer_.fill(a, r, choices_[r].method, g);
            a.chunk = choices_[r].chunk;
            if (layer_.has_low(r) && extracts_here()) {
                a.extract_here = true;
                a.extraction.src.c = layer_.spec().bounds.back();
            }
            most = std::max(most, program_.kernels().conv_scratch(a));
        }
    return most;
}

// The layer's whole input, extracted for a method.
void ConvStep::extract(Run& run, Method m) {
    ExtractArgs a;
    layer_.fill(a, run.ratio, m);
    a.src = run.const_bytes(src_);
    a.dst = run.bytes(extracted_);
    TensorSpec margin = program_.tensor(extracted_);
    margin.zero = a.offset;
    fill_margin(margin, run.context.base[extracted_], run.context.n);
    const Kernels& kernels = program_.kernels();
    const int rows = a.src.n / run.context.n * a.src.h;  // of a sample
    if (!layer_.dynamic()) {
        run.rows(a.src.n * a.src.h, [&](int r0, int r1) { kernels.extract(a, r0, r1); });
        return;
    }
    run.rows(a.src.n * a.src.h, [&](int r0, int r1) {
        for (int r = r0, next; r < r1; r = next) {
            next = std::min(r1, (r / rows + 1) * rows);
            ExtractArgs own = a;
            layer_.use_sample(own, sample(run, r / rows));
            kernels.extract(own, r, next);
        }
    });
}

// Of every sample its magnitudes, and what follows from them.
void ConvStep::choose_shifts(Run& run, Method m) {
    const ConstByteView src = run.const_bytes(src_);
    const int batch = run.context.n, images = src.n / batch, slabs = (src.c + 63) / 64, zero = layer_.spec().input_signed ? 128 : 0;
    run.rows(batch * slabs, [&](int i0, int i1) {
        for (int i = i0, next; i < i1; i = next) {
            const int n = i / slabs;
            next = std::min(i1, (n + 1) * slabs);
            ConstByteView own = src;
            own.data += int64_t(n) * images * src.pitch_n;
            own.n = images;
            program_.kernels().magnitudes(own, zero, i % slabs * 64, std::min(src.c, (next - n * slabs) * 64),
                                               sample(run, n) + layer_.sample_layout().magnitudes);
        }
    });
    run.rows(batch, [&](int n0, int n1) {
        for (int n = n0; n < n1; n++) layer_.choose_shifts(sample(run, n), run.ratio, m);
    });
}

// Narrows a convolution of the whole batch to one sample, with its shifts.
void ConvStep::take_sample(const Run& run, ConvArgs& a, Method m, int n, int conv_group) const {
    const int64_t first = int64_t(n) * a.batch;
    a.src.data += first * a.src.pitch_n;
    a.low.data += first * a.low.pitch_n;
    a.out.data += first * a.out.pitch_n;
    if (a.residual.data) a.residual.data += first * a.residual.pitch_n;
    if (a.extract_here) layer_.use_sample(a.extraction, sample(run, n));
    if (m != METHOD_DIRECT) layer_.use_sample(a, sample(run, n), conv_group);
}

void ConvStep::run(Run& run) {
    const int64_t bytes = run.context.scratch[0].bytes();
    if (scratch_ < 0 || bytes < scratch_) throw std::logic_error("layer '" + name + "': its kernels changed without `finish`");
    const Choice choice = choices_[run.ratio];
    const Kernels& kernels = program_.kernels();
    const bool low = layer_.has_low(run.ratio);
    const bool here = low && extracts_here();
    const bool dynamic = low && layer_.dynamic();
    if (dynamic) choose_shifts(run, choice.method);
    if (low && !here) extract(run, choice.method);
    // With dynamic shifts every sample has a visit and a extraction of its own; but where all are extracted, and read back, it needs
    // neither here.
    const bool by_sample = dynamic && (here || choice.method != METHOD_DIRECT);
    const int samples = by_sample ? run.context.n : 1;
    for (int g = 0; g < layer_.spec().conv_groups; g++) {
        ConvArgs a{};
        layer_.fill(a, run.ratio, choice.method, g);
        set_geometry(run, a, g);
        if (by_sample) a.batch = program_.tensor(dst_).factor;
        // Pieces of equal size, whole register tiles each.
        a.chunk = choice.chunk;
        const int pieces = kernels.conv_chunks(a), units = kernels.conv_units(a), even = (units + pieces - 1) / pieces;
        const int whole = even >= 48 ? 24 : program_.facts().rows;  // 24: whole tiles of 4, 6 and 8 rows
        a.chunk = std::min(choice.chunk, (even + whole - 1) / whole * whole);
        if (here) {
            a.extract_here = true;
            layer_.fill(a.extraction, run.ratio, choice.method);
            a.extraction.src = run.const_bytes(src_);
        } else if (low) {
            a.low = run.const_bytes(extracted_);
            if (choice.method == METHOD_DIRECT) {
                a.src = a.low;
                a.src_taps = a.low_taps;
            }
        }
        const int chunks = kernels.conv_chunks(a), blocks = (a.outputs + program_.facts().block - 1) / program_.facts().block;
        const int threads = run.leased ? run.pool.threads() : 1;
        const int splits = chunks * samples >= 2 * threads ? 1 : std::min(blocks, threads), pieces_each = chunks * splits;
        const int64_t need = kernels.conv_scratch(a);
        if (need > scratch_) throw std::logic_error("layer '" + name + "': its scratch memory is too small");
        run.pool.for_each(pieces_each * samples, run.leased, [&](int task, int thread) {
            const int i = task % pieces_each;
            Counters counters{0, 0, 0};
            const int s = i % splits;
            const Scratch scratch{run.context.scratch[thread].data(), need};
            const Forbidden rest(scratch.memory + need, bytes - need);
            if (by_sample) {
                ConvArgs own = a;
                take_sample(run, own, choice.method, task / pieces_each, g);
                kernels.conv(own, i / splits, blocks * s / splits, blocks * (s + 1) / splits, scratch, &counters);
            } else {
                kernels.conv(a, i / splits, blocks * s / splits, blocks * (s + 1) / splits, scratch, &counters);
            }
            Totals& total = totals[choice.method];
            total.low += counters.low;
            total.high += counters.high;
            total.multiplications += counters.multiplications;
        });
    }
    totals[choice.method].runs++;
}

}  // namespace bitdial
