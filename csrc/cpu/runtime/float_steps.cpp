#include "float_steps.h"

#include <algorithm>
#include <stdexcept>

namespace bitdial {

namespace {

int64_t elements(const TensorSpec& t) { return int64_t(t.factor) * t.h * t.w * t.c; }  // of one sample of the batch

struct LayerNormStep : Step {
    LayerNormArgs a{};
    int src, weight, bias, dst, bytes;
    std::vector<int32_t> order;
    void run(Run& run) override {
        LayerNormArgs args = a;
        args.src = run.floats(src);
        args.weight = weight < 0 ? nullptr : run.floats(weight);
        args.bias = bias < 0 ? nullptr : run.floats(bias);
        args.dst = dst < 0 ? nullptr : run.floats(dst);
        args.bytes = bytes < 0 ? nullptr : run.origin(bytes);
        args.order = order.empty() ? nullptr : order.data();
        const int64_t rows = elements(run.program.tensor(src)) / a.columns * run.context.n;
        run.rows(static_cast<int>(rows), [&](int r0, int r1) { run.program.kernels().layer_norm(args, r0, r1); });
    }
};

struct CombineStep : Step {
    CombineArgs c{};
    int a, b, dst;
    int64_t offset_a, offset_b;
    void run(Run& run) override {
        CombineArgs args = c;
        args.extent[0] = run.context.n;
        int64_t rows = 1;
        for (int k = 0; k + 1 < args.rank; k++) rows *= args.extent[k];
        args.a = run.floats(a) + offset_a;
        args.b = run.floats(b) + offset_b;
        args.dst = run.floats(dst);
        run.rows(static_cast<int>(rows), [&](int r0, int r1) { run.program.kernels().combine(args, r0, r1); });
    }
};

struct ReduceStep : Step {
    ReduceArgs r{};
    int src, dst;
    int64_t outer;
    void run(Run& run) override {
        ReduceArgs args = r;
        args.src = run.floats(src);
        args.dst = run.floats(dst);
        run.rows(static_cast<int>(outer * run.context.n), [&](int o0, int o1) { run.program.kernels().reduce(args, o0, o1); });
    }
};

struct EmbeddingStep : Step {
    int ids, table, dst;
    void run(Run& run) override {
        const TensorSpec &i = run.program.tensor(ids), &t = run.program.tensor(table);
        const int64_t count = elements(i) * (i.constant ? 1 : run.context.n), rows = int64_t(t.w), width = t.c;
        const int64_t* id = reinterpret_cast<const int64_t*>(run.origin(ids));
        for (int64_t k = 0; k < count; k++)
            if (id[k] < 0 || id[k] >= rows)
                throw std::out_of_range("'" + name + "' looks up row " + std::to_string(id[k]) + " of " + std::to_string(rows));
        const float* from = run.floats(table);
        float* to = run.floats(dst);
        run.rows(static_cast<int>(count), [&](int k0, int k1) {
            for (int k = k0; k < k1; k++)
                std::memcpy(to + k * width, from + id[k] * width, static_cast<size_t>(width) * 4);
        });
    }
};

// Walks all elements: body(pointers of the operands and the result).
template <int kOperands, typename Body>
void walk(const Axes& axes, uint8_t* const* base, const int* item, const Body& body) {
    const int rank = static_cast<int>(axes.extent.size());
    std::vector<int64_t> place(rank, 0);
    int64_t all = 1;
    for (int64_t e : axes.extent) all *= e;
    uint8_t* at[kOperands];
    for (int o = 0; o < kOperands; o++) at[o] = base[o] + axes.offset[o] * item[o];
    for (int64_t i = 0; i < all; i++) {
        body(at);
        for (int k = rank - 1; k >= 0; k--) {
            for (int o = 0; o < kOperands; o++) at[o] += axes.stride[o][k] * item[o];
            if (++place[k] < axes.extent[k]) break;
            for (int o = 0; o < kOperands; o++) at[o] -= axes.extent[k] * axes.stride[o][k] * item[o];
            place[k] = 0;
        }
    }
}

template <typename T>
T load_as(const uint8_t* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
template <typename T>
void store_as(uint8_t* to, T value) {
    std::memcpy(to, &value, sizeof value);
}

template <typename T>
bool compare(WholeOp op, T a, T b) {
    switch (op) {
        case WholeOp::kEqual: return a == b;
        case WholeOp::kNotEqual: return a != b;
        case WholeOp::kLess: return a < b;
        case WholeOp::kLessEqual: return a <= b;
        case WholeOp::kAnd: return a && b;
        case WholeOp::kOr: return a || b;
        default: return !a != !b;
    }
}
inline float arithmetic(WholeOp op, float a, float b) {  // NaN wins, as in torch
    if (a != a || b != b) return a != a ? a : b;
    return op == WholeOp::kMaximum ? std::max(a, b) : std::min(a, b);
}
inline int64_t arithmetic(WholeOp op, int64_t a, int64_t b) {
    const uint64_t x = static_cast<uint64_t>(a), y = static_cast<uint64_t>(b);  // wraps
    switch (op) {
        case WholeOp::kAdd: return static_cast<int64_t>(x + y);
        case WholeOp::kSubtract: return static_cast<int64_t>(x - y);
        case WholeOp::kMultiply: return static_cast<int64_t>(x * y);
        case WholeOp::kMaximum: return std::max(a, b);
        default: return std::min(a, b);
    }
}
struct WholeStep : Step {
    WholeOp op;
    Kind of, to;
    std::vector<int> operands;
    int dst;
    Axes axes;

    template <typename T>
    void convert(uint8_t* const* base, const int* item, const Axes& all) const {
        walk<2>(all, base, item, [&](uint8_t** p) {
            const T value = load_as<T>(p[0]);
            if (to == Kind::kFloat) store_as(p[1], static_cast<float>(value));
            if (to == Kind::kBool) store_as<uint8_t>(p[1], value != 0);
            if (to == Kind::kLong) store_as(p[1], static_cast<int64_t>(value));
        });
    }
    template <typename T>
    void choose(uint8_t* const* base, const int* item, const Axes& all) const {
        walk<4>(all, base, item, [](uint8_t** p) { store_as(p[3], load_as<T>(*p[2] ? p[0] : p[1])); });
    }
    template <typename T>
    void judge(uint8_t* const* base, const int* item, const Axes& all) const {
        walk<3>(all, base, item,
                [&](uint8_t** p) { store_as<uint8_t>(p[2], compare<T>(op, load_as<T>(p[0]), load_as<T>(p[1]))); });
    }
    template <typename T>
    void compute(uint8_t* const* base, const int* item, const Axes& all) const {
        walk<3>(all, base, item, [&](uint8_t** p) { store_as(p[2], arithmetic(op, load_as<T>(p[0]), load_as<T>(p[1]))); });
    }
    void run(Run& run) override {
        Axes all = axes;
        all.extent[0] = run.context.n;
        uint8_t* base[4];
        int item[4];
        size_t o = 0;
        for (int t : operands) base[o] = run.origin(t), item[o++] = run.program.tensor(t).item();
        base[o] = run.origin(dst), item[o] = run.program.tensor(dst).item();
        if (op == WholeOp::kConvert) {
            if (of == Kind::kFloat) convert<float>(base, item, all);
            if (of == Kind::kLong) convert<int64_t>(base, item, all);
            if (of == Kind::kInt) convert<int32_t>(base, item, all);
            if (of == Kind::kBool) convert<uint8_t>(base, item, all);
        } else if (op == WholeOp::kWhere) {
            if (of == Kind::kFloat) choose<float>(base, item, all);
            if (of == Kind::kLong) choose<int64_t>(base, item, all);
            if (of == Kind::kBool) choose<uint8_t>(base, item, all);
        } else if (to == Kind::kBool) {
            if (of == Kind::kFloat) judge<float>(base, item, all);
            if (of == Kind::kLong) judge<int64_t>(base, item, all);
            if (of == Kind::kBool) judge<uint8_t>(base, item, all);
        } else {
            if (of == Kind::kFloat) compute<float>(base, item, all);
            if (of == Kind::kLong) compute<int64_t>(base, item, all);
        }
    }
};

// Rows of two axes, the last two, in tiles that stay in the cache whichever side is adjacent.
template <typename T>
void copy_plane(const T* from, T* to, const int64_t* extent, const int64_t* from_stride, const int64_t* to_stride) {
    constexpr int64_t kTile = 16;
    if (from_stride[1] == 1 && to_stride[1] == 1) {
        for (int64_t i = 0; i < extent[0]; i++)
            std::memcpy(to + i * to_stride[0], from + i * from_stride[0], static_cast<size_t>(extent[1]) * sizeof(T));
        return;
    }
    for (int64_t i0 = 0; i0 < extent[0]; i0 += kTile)
        for (int64_t j0 = 0; j0 < extent[1]; j0 += kTile)
            for (int64_t i = i0; i < std::min(extent[0], i0 + kTile); i++)
                for (int64_t j = j0; j < std::min(extent[1], j0 + kTile); j++)
                    to[i * to_stride[0] + j * to_stride[1]] = from[i * from_stride[0] + j * from_stride[1]];
}

struct RearrangeStep : Step {
    int src, dst;
    Axes axes;  // the sample first, at least three
    template <typename T>
    void copy(Run& run) const {
        const T* from = reinterpret_cast<const T*>(run.origin(src)) + axes.offset[0];
        T* to = reinterpret_cast<T*>(run.origin(dst)) + axes.offset[1];
        const auto &f = axes.stride[0], &t = axes.stride[1];
        std::vector<int64_t> extent = axes.extent;
        extent[0] = run.context.n;
        const size_t plane = extent.size() - 2;
        int64_t rows = 1;
        for (size_t k = 0; k < plane; k++) rows *= extent[k];
        run.rows(static_cast<int>(rows), [&](int r0, int r1) {
            for (int r = r0; r < r1; r++) {
                int64_t rest = r, at_from = 0, at_to = 0;
                for (size_t k = plane; k-- > 0;) {
                    const int64_t i = rest % extent[k];
                    rest /= extent[k];
                    at_from += i * f[k], at_to += i * t[k];
                }
                copy_plane(from + at_from, to + at_to, &extent[plane], &f[plane], &t[plane]);
            }
        });
    }
    void run(Run& run) override {
        const int item = run.program.tensor(dst).item();
        if (item == 1) copy<uint8_t>(run);
        if (item == 4) copy<uint32_t>(run);
        if (item == 8) copy<uint64_t>(run);
    }
};

template <typename S>
std::unique_ptr<S> named(const std::string& name, const char* kind, std::vector<int> reads, std::vector<int> writes) {
    auto step = std::make_unique<S>();
    step->name = name;
    step->kind = kind;
    for (int t : reads)
        if (t >= 0) step->reads.push_back(t);
    for (int t : writes)
        if (t >= 0) step->writes.push_back(t);
    return step;
}

}  // namespace

Axes with_samples(const Program& p, Axes axes, const std::vector<int>& operands) {
    if (axes.stride.size() != operands.size() || axes.offset.size() != operands.size())
        throw std::invalid_argument("strides and operands differ in number");
    axes.extent.insert(axes.extent.begin(), 1);
    for (size_t o = 0; o < operands.size(); o++) {
        const TensorSpec& t = p.tensor(operands[o]);
        axes.stride[o].insert(axes.stride[o].begin(), t.sample_bytes() / t.item());
        if (axes.stride[o].size() != axes.extent.size()) throw std::invalid_argument("strides and extents differ in number");
    }
    return axes;
}

std::unique_ptr<Step> layer_norm_step(const Program& program, const std::string& name, int src, int weight, int bias,
                                      int columns, int dst, int bytes, float eps, Scaling s, std::vector<int32_t> order) {
    auto step = named<LayerNormStep>(name, "layer_norm", {src, weight, bias}, {dst, bytes});
    step->src = src, step->weight = weight, step->bias = bias, step->dst = dst, step->bytes = bytes;
    step->a.columns = columns;
    if (bytes >= 0) step->a.zero = program.tensor(bytes).zero;
    step->a.eps = eps, step->a.factor = s.a, step->a.lo = s.lo, step->a.hi = s.hi;
    step->a.sample_rows = static_cast<int32_t>(order.size());
    step->order = std::move(order);
    return step;
}

std::unique_ptr<Step> combine_step(const std::string& name, CombineOp op, int a, int b, int dst, Axes axes, float lo, float hi) {
    static const char* const kinds[] = {"add_float", "sub_float", "mul_float", "div_float"};
    auto step = named<CombineStep>(name, kinds[op], {a, b}, {dst});
    step->a = a, step->b = b, step->dst = dst;
    step->c.op = op, step->c.lo = lo, step->c.hi = hi;
    step->offset_a = axes.offset[0], step->offset_b = axes.offset[1];
    step->c.rank = static_cast<int32_t>(axes.extent.size());
    if (step->c.rank > kCombineAxes) throw std::invalid_argument("'" + name + "' has too many axes");
    for (int k = 0; k < step->c.rank; k++) {
        step->c.extent[k] = axes.extent[k];
        step->c.stride_a[k] = axes.stride[0][k], step->c.stride_b[k] = axes.stride[1][k], step->c.stride_dst[k] = axes.stride[2][k];
    }
    return step;
}

std::unique_ptr<Step> reduce_step(const std::string& name, int src, int dst, int64_t outer, int64_t count, int64_t inner,
                                  float divisor, bool square, bool root) {
    auto step = named<ReduceStep>(name, "reduce", {src}, {dst});
    step->src = src, step->dst = dst, step->outer = outer;
    step->r.count = count, step->r.inner = inner, step->r.divisor = divisor, step->r.square = square, step->r.root = root;
    return step;
}

std::unique_ptr<Step> embedding_step(const std::string& name, int ids, int table, int dst) {
    auto step = named<EmbeddingStep>(name, "embedding", {ids, table}, {dst});
    step->ids = ids, step->table = table, step->dst = dst;
    return step;
}

std::unique_ptr<Step> whole_step(const std::string& name, WholeOp op, Kind kind, Kind to, std::vector<int> operands, int dst,
                                 Axes axes) {
    auto step = named<WholeStep>(name, "elementwise", operands, {dst});
    step->op = op, step->of = kind, step->to = to, step->operands = std::move(operands), step->dst = dst;
    step->axes = std::move(axes);
    return step;
}

std::unique_ptr<Step> rearrange_step(const std::string& name, int src, int dst, Axes axes) {
    auto step = named<RearrangeStep>(name, "copy", {src}, {dst});
    step->src = src, step->dst = dst;
    while (axes.extent.size() < 3) {  // a plane at the end
        axes.extent.insert(axes.extent.begin() + 1, 1);
        for (auto& s : axes.stride) s.insert(s.begin() + 1, 0);
    }
    step->axes = std::move(axes);
    return step;
}

}  // namespace bitdial
