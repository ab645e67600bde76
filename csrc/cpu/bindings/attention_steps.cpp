// The steps of ../runtime/attention_steps.h.
#include "../runtime/attention_steps.h"

#include "engine.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace bitdial {

namespace {

// An operand of a product, its output, or a term of scores, as bitdial/engines/cpu/compile_attention.py writes them.
using Place = std::tuple<int, int64_t, int64_t, Array<int64_t>, std::optional<Array<uint8_t>>, int>;
using Term = std::tuple<int, int64_t, int64_t, Array<int64_t>, std::string, float>;

ProductPlace place(const Place& p) {
    const auto& [tensor, outer, inner, heads, table, zero] = p;
    return {tensor, outer, inner, values(heads), table ? values(*table) : std::vector<uint8_t>(), zero};
}

TermOp term_op(const std::string& word) {
    static const char* const words[] = {"add", "mul", "sub", "div", "fill", "keep"};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        if (word == words[i]) return static_cast<TermOp>(i);
    throw std::invalid_argument("scores cannot meet '" + word + "'");
}

}  // namespace

void bind_attention_steps(nb::class_<Engine>& program) {
    program
        .def("add_matmul",
             [](Engine& e, const std::string& name, const Place& left, const Place& right, const Place& out,
                std::array<int, 3> sizes, float factor, float lo, float hi) {
                 e.program.add_step(matmul_step(e.program, name, place(left), place(right), place(out),
                                                {sizes[0], sizes[1], sizes[2], 1}, factor, lo, hi));
             },
             "name"_a, "left"_a, "right"_a, "out"_a, "sizes"_a, "factor"_a, "lo"_a, "hi"_a, "sizes: rows, columns, depth.")
        .def("add_attention",
             [](Engine& e, const std::string& name, const std::string& scores, const Place& q, const Place& k, const Place& v,
                const Place& out, std::array<int, 4> sizes, float factor, const std::vector<Term>& terms,
                std::array<float, 3> p, float out_factor, float lo, float hi) {
                 std::vector<TermPlace> own;
                 for (const auto& [tensor, row, column, heads, op, value] : terms)
                     own.push_back({tensor, row, column, values(heads), term_op(op), value});
                 e.program.add_step(attention_step(e.program, name, scores, place(q), place(k), place(v), place(out),
                                                   {sizes[0], sizes[1], sizes[2], sizes[3]}, factor, std::move(own), p[0], p[1],
                                                   p[2], out_factor, lo, hi));
             },
             nb::kw_only(), "name"_a, "scores"_a, "q"_a, "k"_a, "v"_a, "out"_a, "sizes"_a, "factor"_a, "terms"_a, "p"_a,
             "out_factor"_a, "lo"_a, "hi"_a, "sizes: rows, columns, depth, width; p: factor, lo, hi.")
        .def("add_softmax",
             [](Engine& e, const std::string& name, int src, int dst, int length, int inner, Array<int64_t> rows, int64_t column,
                float factor, float lo, float hi) {
                 e.program.add_step(
                     softmax_step(e.program, name, src, dst, length, inner, values(rows), column, factor, lo, hi));
             },
             "name"_a, "src"_a, "dst"_a, "length"_a, "inner"_a, "rows"_a, "column"_a, "factor"_a, "lo"_a, "hi"_a);
}

}  // namespace bitdial
