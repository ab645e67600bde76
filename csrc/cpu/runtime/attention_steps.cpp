#include "attention_steps.h"

#include <algorithm>
#include <stdexcept>

#include "simple_steps.h"

namespace bitdial {

namespace {

// Elements of one sample of the batch, a constant's included.
int64_t sample_of(const TensorSpec& t) { return t.pitch_n() * t.factor; }

// Smallest and largest offset that an operand reaches must lie within one sample of its tensor.
void check_place(const Program& p, const std::string& name, const ProductPlace& o, int outer, int inner) {
    const TensorSpec& t = p.tensor(o.tensor);
    if (o.heads.empty() || outer < 1 || inner < 1 || (!o.table.empty() && o.table.size() != 256))
        throw std::invalid_argument("layer '" + name + "': an operand is empty");
    int64_t low = *std::min_element(o.heads.begin(), o.heads.end()), high = *std::max_element(o.heads.begin(), o.heads.end());
    for (const int64_t reach : {o.outer * (outer - 1), o.inner * (inner - 1)}) (reach < 0 ? low : high) += reach;
    if (low < 0 || t.origin() + high >= sample_of(t))
        throw std::invalid_argument("layer '" + name + "': an operand lies outside of its tensor");
}

ProductOperand operand(const Run& run, const ProductPlace& o) {
    const TensorSpec& t = run.program.tensor(o.tensor);
    return {run.context.base[o.tensor] + t.origin(), o.heads.data(), sample_of(t), o.outer, o.inner, o.zero,
            o.table.empty() ? nullptr : o.table.data()};
}

ProductOutput output(const Run& run, const ProductPlace& o, float m, float lo, float hi) {
    const TensorSpec& t = run.program.tensor(o.tensor);
    return {run.context.base[o.tensor] + t.origin() * (t.is_float ? 4 : 1), o.heads.data(), sample_of(t), o.outer, o.inner,
            t.is_float, t.zero, m, lo, hi};
}

// Units of some rows of one head of one sample over the threads; work(sample, head, row0, row1, scratch).
template <typename Work>
void for_each_unit(Run& run, int samples, int heads, int rows, int block, int64_t need, const Work& work) {
    const int64_t bytes = run.context.scratch[0].bytes();
    if (bytes < need) throw std::logic_error("the scratch memory of a product is too small");
    const int threads = run.leased ? run.pool.threads() : 1;
    const int whole = samples * heads, blocks = (rows + block - 1) / block;
    const bool even = whole >= 4 * threads || whole % threads == 0;  // every piece packs its operands anew
    const int pieces = even ? 1 : std::min(blocks, (4 * threads + whole - 1) / whole);
    run.pool.for_each(whole * pieces, run.leased, [&](int i, int thread) {
        const int unit = i / pieces, piece = i % pieces;
        uint8_t* scratch = run.context.scratch[thread].data();
        const Forbidden rest(scratch + need, bytes - need);
        const int row0 = static_cast<int>(int64_t(blocks) * piece / pieces) * block;
        const int row1 = std::min(rows, static_cast<int>(int64_t(blocks) * (piece + 1) / pieces) * block);
        work(unit / heads, unit % heads, row0, row1, scratch);
    });
}

struct MatMulStep : CountedStep {
    ProductPlace left, right, out;
    ProductSizes sizes;
    float m, lo, hi;
    int64_t need = 0;
    int64_t scratch() const override { return need; }
    MatMulArgs args() const {
        MatMulArgs a{};
        a.left.zero = left.zero;
        a.rows = sizes.rows;
        a.columns = sizes.columns;
        a.depth = sizes.depth;
        return a;
    }
    void run(Run& run) override {
        MatMulArgs a = args();
        a.left = operand(run, left);
        a.right = operand(run, right);
        a.out = output(run, out, m, lo, hi);
        const Kernels& kernels = run.program.kernels();
        const int samples = run.context.n, heads = static_cast<int>(out.heads.size());
        for_each_unit(run, samples, heads, sizes.rows, run.program.facts().rows, need, [&](int n, int head, int row0, int row1, uint8_t* own) {
            kernels.matmul(a, n, head, row0, row1, own);
            counts[0].macs += int64_t(row1 - row0) * sizes.columns * sizes.depth;
        });
        counts[0].runs++;
    }
};

struct AttentionStep : CountedStep {
    ProductPlace q, k, v, out;
    ProductSizes sizes;
    std::vector<TermPlace> terms;
    float m, factor, p_lo, p_hi, out_m, lo, hi;
    int64_t need = 0;
    int64_t scratch() const override { return need; }
    AttentionArgs args() const {
        AttentionArgs a{};
        a.rows = sizes.rows;
        a.columns = sizes.columns;
        a.depth = sizes.depth;
        a.width = sizes.width;
        a.m = m;
        a.factor = factor;
        a.lo = p_lo;
        a.hi = p_hi;
        return a;
    }
    void run(Run& run) override {
        AttentionArgs a = args();
        a.q = operand(run, q);
        a.k = operand(run, k);
        a.v = operand(run, v);
        a.out = output(run, out, out_m, lo, hi);
        std::vector<ScoreTerm> own;
        for (const TermPlace& t : terms) {
            const TensorSpec& spec = run.program.tensor(t.tensor);
            own.push_back({run.context.base[t.tensor], t.heads.data(), spec.constant ? 0 : sample_of(spec), t.row, t.column, t.op,
                           t.value});
        }
        a.terms = own.data();
        a.n_terms = static_cast<int32_t>(own.size());
        const Kernels& kernels = run.program.kernels();
        const int samples = run.context.n, heads = static_cast<int>(out.heads.size());
        for_each_unit(run, samples, heads, sizes.rows, run.program.facts().rows, need, [&](int n, int head, int row0, int row1, uint8_t* mine) {
            kernels.attention(a, n, head, row0, row1, mine);
            const int64_t scores = int64_t(row1 - row0) * sizes.columns;
            counts[0].macs += scores * sizes.depth;
            counts[1].macs += scores * sizes.width;
        });
        counts[0].runs++;
        counts[1].runs++;
    }
};

struct SoftmaxStep : Step {
    int length, inner;
    std::vector<int64_t> rows;
    int64_t column;
    float factor, lo, hi;
    int64_t need = 0;
    int64_t scratch() const override { return need; }
    void run(Run& run) override {
        const TensorSpec &s = run.program.tensor(reads[0]), &d = run.program.tensor(writes[0]);
        SoftmaxArgs a{};
        a.src = run.floats(reads[0]);
        a.length = length;
        a.inner = inner;
        const int64_t per_sample = sample_of(s) / length;
        if (d.is_float) {
            a.dst = run.floats(writes[0]);
        } else {
            a.bytes = run.context.base[writes[0]] + d.origin();
            a.rows = rows.data();
            a.sample = sample_of(d);
            a.column = column;
            a.zero = d.zero;
            a.factor = factor;
            a.lo = lo;
            a.hi = hi;
        }
        a.rows_per_sample = static_cast<int32_t>(per_sample);
        const int64_t count = per_sample * run.context.n;
        const int threads = run.leased ? run.pool.threads() : 1;
        const int pieces = static_cast<int>(std::min<int64_t>(count, threads == 1 ? 1 : 4 * threads));
        const int64_t bytes = run.context.scratch[0].bytes();
        if (bytes < need) throw std::logic_error("the scratch memory of a softmax is too small");
        run.pool.for_each(pieces, run.leased, [&](int i, int thread) {
            uint8_t* own = run.context.scratch[thread].data();
            const Forbidden rest(own + need, bytes - need);
            run.program.kernels().softmax(a, count * i / pieces, count * (i + 1) / pieces, own);
        });
    }
};

void name_step(CountedStep& step, const char* kind, const std::string& name, const std::vector<std::string>& layers) {
    step.name = name;
    step.kind = kind;
    for (const std::string& layer : layers) step.counts.emplace_back(layer);
}

}  // namespace

std::unique_ptr<Step> matmul_step(const Program& p, const std::string& name, ProductPlace left, ProductPlace right,
                                  ProductPlace out, ProductSizes sizes, float m, float lo, float hi) {
    check_place(p, name, left, sizes.rows, sizes.depth);
    check_place(p, name, right, sizes.columns, sizes.depth);
    check_place(p, name, out, sizes.rows, sizes.columns);
    if (left.heads.size() != out.heads.size() || right.heads.size() != out.heads.size())
        throw std::invalid_argument("layer '" + name + "': its operands differ in heads");
    auto step = std::make_unique<MatMulStep>();
    name_step(*step, "matmul", name, {name});
    step->reads = {left.tensor, right.tensor};
    step->writes = {out.tensor};
    step->left = std::move(left);
    step->right = std::move(right);
    step->out = std::move(out);
    step->sizes = sizes;
    step->m = m;
    step->lo = lo;
    step->hi = hi;
    step->need = p.kernels().matmul_scratch(step->args());
    return step;
}

std::unique_ptr<Step> attention_step(const Program& p, const std::string& name, const std::string& scores, ProductPlace q,
                                     ProductPlace k, ProductPlace v, ProductPlace out, ProductSizes sizes, float m,
                                     std::vector<TermPlace> terms, float factor, float p_lo, float p_hi, float out_m, float lo,
                                     float hi) {
    check_place(p, name, q, sizes.rows, sizes.depth);
    check_place(p, name, k, sizes.columns, sizes.depth);
    check_place(p, name, v, sizes.width, sizes.columns);
    check_place(p, name, out, sizes.rows, sizes.width);
    const size_t heads = out.heads.size();
    if (q.heads.size() != heads || k.heads.size() != heads || v.heads.size() != heads)
        throw std::invalid_argument("layer '" + name + "': its operands differ in heads");
    if (terms.size() > 4) throw std::invalid_argument("layer '" + name + "': it has more than four terms");
    auto step = std::make_unique<AttentionStep>();
    name_step(*step, "attention", name, {scores, name});
    step->reads = {q.tensor, k.tensor, v.tensor};
    for (const TermPlace& t : terms) {
        const ProductPlace reach{t.tensor, t.row, t.column, t.heads, {}, 0};
        check_place(p, name, reach, sizes.rows, sizes.columns);
        const TensorSpec& spec = p.tensor(t.tensor);
        const bool fits = t.op > TERM_DIV ? spec.whole == 1 : spec.is_float;
        if (t.heads.size() != heads || t.column < 0 || t.column > 1 || t.op < TERM_ADD || t.op > TERM_KEEP || !fits)
            throw std::invalid_argument("layer '" + name + "': a term does not fit its scores");
        step->reads.push_back(t.tensor);
    }
    step->writes = {out.tensor};
    step->q = std::move(q);
    step->k = std::move(k);
    step->v = std::move(v);
    step->out = std::move(out);
    step->sizes = sizes;
    step->terms = std::move(terms);
    step->m = m;
    step->factor = factor;
    step->p_lo = p_lo;
    step->p_hi = p_hi;
    step->out_m = out_m;
    step->lo = lo;
    step->hi = hi;
    step->need = p.kernels().attention_scratch(step->args());
    return step;
}

std::unique_ptr<Step> softmax_step(const Program& p, const std::string& name, int src, int dst, int length, int inner,
                                   std::vector<int64_t> rows, int64_t column, float factor, float lo, float hi) {
    const TensorSpec &s = p.tensor(src), &d = p.tensor(dst);
    const int64_t size = sample_of(s);
    bool fits = s.is_float && length > 0 && inner > 0 && size % (int64_t(length) * inner) == 0;
    if (d.is_float)
        fits = fits && sample_of(d) == size;
    else
        fits = fits && inner == 1 && static_cast<int64_t>(rows.size()) == size / length &&
               std::all_of(rows.begin(), rows.end(), [&](int64_t r) {
                   return r >= 0 && column >= 0 && d.origin() + r + column * (length - 1) < sample_of(d);
               });
    if (!fits) throw std::invalid_argument("softmax '" + name + "': its tensors do not fit each other");
    auto step = std::make_unique<SoftmaxStep>();
    step->name = name;
    step->kind = "softmax";
    step->reads = {src};
    step->writes = {dst};
    step->length = length;
    step->inner = inner;
    step->rows = std::move(rows);
    step->column = column;
    step->factor = factor;
    step->lo = lo;
    step->hi = hi;
    SoftmaxArgs a{};
    a.length = length;
    step->need = p.kernels().softmax_scratch(a);
    return step;
}

}  // namespace bitdial
