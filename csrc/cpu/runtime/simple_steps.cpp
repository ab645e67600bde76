#include "simple_steps.h"

#include <algorithm>
#include <mutex>

namespace bitdial {

namespace {

struct Base : Step {
    Base(const char* kind_, const std::string& name_, std::vector<int> reads_, std::vector<int> writes_) {
        kind = kind_;
        name = name_;
        reads = std::move(reads_);
        writes = std::move(writes_);
    }
};

int rows_of(const ByteView& v) { return v.n * v.h; }

struct QuantizeStep : Base {
    Scaling s;
    bool counted;
    QuantizeStep(const std::string& n, int src, int dst, Scaling s_, bool counted_)
        : Base("quantize", n, {src}, {dst}), s(s_), counted(counted_) {}
    void run(Run& run) override {
        const TensorSpec& t = run.program.tensor(reads[0]);
        const ByteView dst = run.bytes(writes[0]);
        const QuantizeArgs a{run.floats(reads[0]), t.pitch_n(), t.pitch_y(), t.pitch_x(), t.stride_c(),
                             dst, s.a, s.lo, s.hi, run.program.tensor(writes[0]).zero};
        std::atomic<int64_t> bad{0};
        run.rows(rows_of(dst), [&](int r0, int r1) { bad += run.program.kernels().quantize(a, r0, r1); });
        if (counted) run.not_finite += bad;
    }
};

struct DequantizeStep : Base {
    float scale;
    DequantizeStep(const std::string& n, int src, int dst, float s) : Base("dequantize", n, {src}, {dst}), scale(s) {}
    void run(Run& run) override {
        const TensorSpec& t = run.program.tensor(writes[0]);
        const DequantizeArgs a{run.const_bytes(reads[0]), run.program.tensor(reads[0]).zero, scale,
                               run.floats(writes[0]), t.pitch_n(), t.pitch_y(), t.pitch_x(), t.stride_c()};
        run.rows(a.src.n * a.src.h, [&](int r0, int r1) { run.program.kernels().dequantize(a, r0, r1); });
    }
};

struct TableStep : Base {
    std::vector<uint8_t> table;
    TableStep(const std::string& n, int src, int dst, std::vector<uint8_t> t)
        : Base("table", n, {src}, {dst}), table(std::move(t)) {}
    void run(Run& run) override {
        const TableArgs a{run.const_bytes(reads[0]), run.bytes(writes[0]), table.data()};
        run.rows(rows_of(a.dst), [&](int r0, int r1) { run.program.kernels().table(a, r0, r1); });
    }
};

// b broadcast against a: pitch 0 along axes where b has one element.
ConstByteView broadcast(ConstByteView b, const ByteView& out) {
    if (b.n == 1 && out.n != 1) b.pitch_n = 0;
    if (b.h == 1 && out.h != 1) b.pitch_y = 0;
    if (b.w == 1 && out.w != 1) b.pitch_x = 0;
    return b;
}

struct AddStep : Base {
    Scaling s;
    bool product;
    AddStep(const std::string& n, int a, int b, int dst, Scaling s_, bool product_)
        : Base(product_ ? "mul" : "add", n, {a, b}, {dst}), s(s_), product(product_) {}
    void run(Run& run) override {
        const Program& p = run.program;
        const ByteView dst = run.bytes(writes[0]);
        const ConstByteView a = run.const_bytes(reads[0]), b = broadcast(run.const_bytes(reads[1]), dst);
        const int channel = b.c == 1 && dst.c != 1 ? 0 : 1;
        const int za = p.tensor(reads[0]).zero, zb = p.tensor(reads[1]).zero, zo = p.tensor(writes[0]).zero;
        if (product) {
            const MulArgs m{a, b, channel, za, zb, zo, s.a, s.lo, s.hi, dst};
            run.rows(rows_of(dst), [&](int r0, int r1) { p.kernels().mul(m, r0, r1); });
        } else {
            const AddArgs m{a, b, channel, za, zb, zo, s.a, s.b, s.lo, s.hi, dst};
            run.rows(rows_of(dst), [&](int r0, int r1) { p.kernels().add(m, r0, r1); });
        }
    }
};

struct RescaleStep : Base {
    Scaling s;
    int axis, offset;
    RescaleStep(const std::string& n, int src, int dst, int axis_, int offset_, Scaling s_)
        : Base("concat", n, {src}, {dst}), s(s_), axis(axis_), offset(offset_) {}
    void run(Run& run) override {
        const Program& p = run.program;
        RescaleArgs a;
        a.src = run.const_bytes(reads[0]);
        a.dst = run.bytes(writes[0]);
        a.dst.data += offset * (axis == 3 ? 1 : axis == 2 ? a.dst.pitch_x : a.dst.pitch_y);
        a.dst.h = a.src.h;
        a.dst.w = a.src.w;
        a.dst.c = a.src.c;
        a.zero_src = p.tensor(reads[0]).zero;
        a.zero_dst = p.tensor(writes[0]).zero;
        a.factor = s.a;
        a.lo = s.lo;
        a.hi = s.hi;
        run.rows(a.src.n * a.src.h, [&](int r0, int r1) { p.kernels().rescale(a, r0, r1); });
    }
};

struct MaxPoolStep : Base {
    Window w;
    MaxPoolStep(const std::string& n, int src, int dst, Window w_) : Base("max_pool", n, {src}, {dst}), w(w_) {}
    void run(Run& run) override {
        const MaxPoolArgs a{run.const_bytes(reads[0]), run.bytes(writes[0]), w.kernel_h, w.kernel_w, w.stride_h,
                            w.stride_w, w.pad_h, w.pad_w, w.dilation_h, w.dilation_w};
        run.rows(rows_of(a.dst), [&](int r0, int r1) { run.program.kernels().max_pool(a, r0, r1); });
    }
};

struct SumPoolStep : Base {
    Window w;
    Scaling s;
    SumPoolStep(const std::string& n, int src, int dst, Window w_, Scaling s_)
        : Base("sum_pool", n, {src}, {dst}), w(w_), s(s_) {}
    void run(Run& run) override {
        const SumPoolArgs a{run.const_bytes(reads[0]), run.bytes(writes[0]), w.kernel_h, w.kernel_w, w.stride_h, w.stride_w,
                            w.pad_h, w.pad_w, run.program.tensor(reads[0]).zero, run.program.tensor(writes[0]).zero,
                            s.a, s.lo, s.hi};
        run.rows(rows_of(a.dst), [&](int r0, int r1) { run.program.kernels().sum_pool(a, r0, r1); });
    }
};

struct CopyStep : Base {
    CopyArgs c{};
    std::vector<int32_t> gather;
    bool fill;
    CopyStep(const std::string& n, int src, int dst, std::vector<int32_t> g, bool fill_)
        : Base("copy", n, {src}, {dst}), gather(std::move(g)), fill(fill_) {}
    void run(Run& run) override {
        CopyArgs a = c;
        const TensorSpec &s = run.program.tensor(reads[0]), &d = run.program.tensor(writes[0]);
        a.src = run.context.base[reads[0]] + s.origin();
        a.dst = run.context.base[writes[0]] + d.origin();
        a.extent[0] = run.context.n;
        a.src_stride[0] = s.sample_bytes();
        a.dst_stride[0] = d.sample_bytes();
        a.gather = gather.empty() ? nullptr : gather.data();
        if (fill) std::memset(run.context.base[writes[0]], d.zero, static_cast<size_t>(d.bytes(run.context.n)));
        run.rows(a.extent[0], [&](int r0, int r1) { run.program.kernels().copy(a, r0, r1); });
    }
};

// Runs of bytes that stay adjacent.
struct MoveStep : Base {
    struct Piece {
        int32_t from, to, bytes;
    };
    std::vector<Piece> pieces;
    bool fill;
    MoveStep(const std::string& n, int src, int dst, const std::vector<int32_t>& from, const std::vector<int32_t>& to,
             int unit, bool fill_)
        : Base("move", n, {src}, {dst}), fill(fill_) {
        for (size_t i = 0; i < from.size(); i++) {
            if (!pieces.empty() && pieces.back().from + pieces.back().bytes == from[i] &&
                pieces.back().to + pieces.back().bytes == to[i])
                pieces.back().bytes += unit;
            else
                pieces.push_back({from[i], to[i], unit});
        }
    }
    void run(Run& run) override {
        const TensorSpec &s = run.program.tensor(reads[0]), &d = run.program.tensor(writes[0]);
        if (fill) std::memset(run.context.base[writes[0]], d.zero, static_cast<size_t>(d.bytes(run.context.n)));
        const int each = static_cast<int>(pieces.size());
        run.rows(run.context.n * each, [&](int p0, int p1) {
            for (int i = p0; i < p1;) {
                const int n = i / each, end = std::min(p1, (n + 1) * each);
                const uint8_t* from = run.origin(reads[0]) + n * s.sample_bytes();
                uint8_t* to = run.origin(writes[0]) + n * d.sample_bytes();
                for (; i < end; i++) {
                    const Piece& p = pieces[i - n * each];
                    if (p.bytes == 1)
                        to[p.to] = from[p.from];
                    else
                        std::memcpy(to + p.to, from + p.from, static_cast<size_t>(p.bytes));
                }
            }
        });
    }
};

struct DepthwiseStep : CountedStep {
    Window w;
    int src, dst, residual, multiplicity;
    std::vector<int8_t> weight;
    std::vector<std::vector<int32_t>> bias;
    std::vector<float> multiplier;
    float residual_factor;
    Scaling s;
    int64_t per_sample;
    void renew(std::vector<int32_t> rows, std::vector<uint8_t>, std::vector<int8_t>) override {
        if (rows.size() != bias.size() * bias.front().size())
            throw std::invalid_argument("layer '" + name + "': its arrays do not fit it");
        auto from = rows.begin();
        for (auto& row : bias)
            for (int32_t& value : row) value = *from++;
    }
    void run(Run& run) override {
        const Program& p = run.program;
        DepthwiseArgs a{};
        a.src = run.const_bytes(src);
        a.dst = run.bytes(dst);
        a.kernel_h = w.kernel_h;
        a.kernel_w = w.kernel_w;
        a.stride_h = w.stride_h;
        a.stride_w = w.stride_w;
        a.pad_h = w.pad_h;
        a.pad_w = w.pad_w;
        a.dilation_h = w.dilation_h;
        a.dilation_w = w.dilation_w;
        a.multiplicity = multiplicity;
        a.weight = weight.data();
        a.bias = bias[run.ratio].data();
        a.m = multiplier.data();
        a.zero_src = p.tensor(src).zero;
        a.zero_dst = p.tensor(dst).zero;
        a.margin_h = p.tensor(src).halo_h;
        a.margin_w = p.tensor(src).halo_w;
        a.lo = s.lo;
        a.hi = s.hi;
        if (residual >= 0) {
            a.residual_view = run.const_bytes(residual);
            a.residual = a.residual_view.data;
            a.zero_residual = p.tensor(residual).zero;
            a.residual_factor = residual_factor;
        }
        run.rows(rows_of(a.dst), [&](int r0, int r1) {
            p.kernels().depthwise(a, r0, r1);
            counts[0].macs += per_sample / a.dst.h * (r1 - r0);
        });
        counts[0].runs++;
    }
};

}  // namespace

std::unique_ptr<Step> quantize_step(const std::string& n, int src, int dst, Scaling s, bool counted) {
    return std::make_unique<QuantizeStep>(n, src, dst, s, counted);
}
std::unique_ptr<Step> dequantize_step(const std::string& n, int src, int dst, float scale) {
    return std::make_unique<DequantizeStep>(n, src, dst, scale);
}
std::unique_ptr<Step> table_step(const std::string& n, int src, int dst, std::vector<uint8_t> table) {
    return std::make_unique<TableStep>(n, src, dst, std::move(table));
}
std::unique_ptr<Step> add_step(const std::string& n, int a, int b, int dst, Scaling s) {
    return std::make_unique<AddStep>(n, a, b, dst, s, false);
}
std::unique_ptr<Step> mul_step(const std::string& n, int a, int b, int dst, Scaling s) {
    return std::make_unique<AddStep>(n, a, b, dst, s, true);
}
std::unique_ptr<Step> rescale_step(const std::string& n, int src, int dst, int axis, int offset, Scaling s) {
    return std::make_unique<RescaleStep>(n, src, dst, axis, offset, s);
}
std::unique_ptr<Step> max_pool_step(const std::string& n, int src, int dst, Window w) {
    return std::make_unique<MaxPoolStep>(n, src, dst, w);
}
std::unique_ptr<Step> sum_pool_step(const std::string& n, int src, int dst, Window w, Scaling s) {
    return std::make_unique<SumPoolStep>(n, src, dst, w, s);
}
std::unique_ptr<Step> copy_step(const std::string& n, int src, int dst, std::vector<int32_t> extent,
                                std::vector<int64_t> src_stride, std::vector<int64_t> dst_stride, int64_t src_offset,
                                int64_t dst_offset, std::vector<int32_t> gather, int gather_axis, bool fill) {
    auto step = std::make_unique<CopyStep>(n, src, dst, std::move(gather), fill);
    CopyArgs& c = step->c;
    for (int i = 0; i < 6; i++) c.extent[i] = 1, c.src_stride[i] = c.dst_stride[i] = 0;
    for (size_t i = 0; i < extent.size() && i < 5; i++) {
        c.extent[i + 1] = extent[i];
        c.src_stride[i + 1] = src_stride[i];
        c.dst_stride[i + 1] = dst_stride[i];
    }
    c.src_offset = src_offset;
    c.dst_offset = dst_offset;
    c.gather_axis = step->gather.empty() ? -1 : gather_axis;
    return step;
}
std::unique_ptr<Step> move_step(const std::string& n, int src, int dst, const std::vector<int32_t>& from,
                                const std::vector<int32_t>& to, int unit, bool fill) {
    return std::make_unique<MoveStep>(n, src, dst, from, to, unit, fill);
}
std::unique_ptr<Step> depthwise_step(const std::string& n, int src, int dst, int residual, Window w, int multiplicity,
                                     std::vector<int8_t> weight, std::vector<std::vector<int32_t>> bias,
                                     std::vector<float> multiplier, float residual_factor, Scaling s, int64_t macs) {
    auto step = std::make_unique<DepthwiseStep>();
    step->name = n;
    step->kind = "depthwise";
    step->counts.emplace_back(n);
    step->reads = {src};
    if (residual >= 0) step->reads.push_back(residual);
    step->writes = {dst};
    step->src = src;
    step->dst = dst;
    step->residual = residual;
    step->w = w;
    step->multiplicity = multiplicity;
    step->weight = std::move(weight);
    step->bias = std::move(bias);
    step->multiplier = std::move(multiplier);
    step->residual_factor = residual_factor;
    step->s = s;
    step->per_sample = macs;
    return step;
}

}  // namespace bitdial
