// The steps of ../runtime/float_steps.h for Python. Strides and extents are those of one sample; see there.
#include "../runtime/float_steps.h"

#include "engine.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace bitdial {

namespace {

using Longs = std::vector<int64_t>;

Axes axes_of(const Engine& e, const Longs& extent, std::vector<Longs> stride, const Longs& offset,
             const std::vector<int>& operands) {
    return with_samples(e.program, {extent, std::move(stride), offset}, operands);
}

Kind kind_of(const std::string& dtype) {
    if (dtype == "float32") return Kind::kFloat;
    if (dtype == "int64") return Kind::kLong;
    if (dtype == "int32") return Kind::kInt;
    if (dtype == "bool") return Kind::kBool;
    throw std::invalid_argument("no values of " + dtype + " here");
}

WholeOp whole_op_of(const std::string& word) {
    static const char* const words[] = {"convert", "eq", "ne", "lt", "le", "and", "or", "xor", "where", "add", "sub", "mul", "max", "min"};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        if (word == words[i]) return static_cast<WholeOp>(i);
    throw std::invalid_argument("no operator is called " + word);
}

CombineOp combine_op_of(const std::string& word) {
    if (word == "add") return COMBINE_ADD;
    if (word == "sub") return COMBINE_SUBTRACT;
    if (word == "mul") return COMBINE_MULTIPLY;
    if (word == "div") return COMBINE_DIVIDE;
    throw std::invalid_argument("no operator is called " + word);
}

}  // namespace

void bind_float_steps(nb::class_<Engine>& program) {
    program
        .def("add_constant",
             [](Engine& e, AnyArray values, int w, int c, int whole) {
                 TensorSpec t;
                 t.w = w, t.c = c, t.is_float = whole == 0, t.whole = whole;
                 if (static_cast<int64_t>(values.nbytes()) != t.pitch_n() * t.item())
                     throw std::invalid_argument("an array has not the size of its tensor");
                 return e.program.add_constant(t, values.data());
             },
             "values"_a, nb::kw_only(), "w"_a, "c"_a, "whole"_a = 0)
        .def("add_layer_norm",
             [](Engine& e, const std::string& name, int src, int weight, int bias, int columns, int dst, int bytes, float eps,
                float factor, float lo, float hi, std::vector<int32_t> order) {
                 e.program.add_step(
                     layer_norm_step(e.program, name, src, weight, bias, columns, dst, bytes, eps, {factor, 1, lo, hi}, std::move(order)));
             },
             "name"_a, nb::kw_only(), "src"_a, "weight"_a, "bias"_a, "columns"_a, "dst"_a, "bytes"_a, "eps"_a, "factor"_a = 1.f,
             "lo"_a = 0.f, "hi"_a = 0.f, "order"_a = std::vector<int32_t>{})
        .def("add_combine",
             [](Engine& e, const std::string& name, const std::string& op, int a, int b, int dst, const Longs& extent,
                std::vector<Longs> stride, const Longs& offset, float lo, float hi) {
                 e.program.add_step(combine_step(name, combine_op_of(op), a, b, dst,
                                                 axes_of(e, extent, std::move(stride), offset, {a, b, dst}), lo, hi));
             })
        .def("add_reduce",
             [](Engine& e, const std::string& name, int src, int dst, int64_t outer, int64_t count, int64_t inner, float divisor,
                bool square, bool root) {
                 e.program.add_step(reduce_step(name, src, dst, outer, count, inner, divisor, square, root));
             })
        .def("add_embedding", [](Engine& e, const std::string& name, int ids, int table,
                                 int dst) { e.program.add_step(embedding_step(name, ids, table, dst)); })
        .def("add_elementwise",
             [](Engine& e, const std::string& name, const std::string& op, const std::string& kind, const std::string& to,
                std::vector<int> operands, int dst, const Longs& extent, std::vector<Longs> stride, const Longs& offset) {
                 std::vector<int> all = operands;
                 all.push_back(dst);
                 e.program.add_step(whole_step(name, whole_op_of(op), kind_of(kind), kind_of(to), std::move(operands), dst,
                                               axes_of(e, extent, std::move(stride), offset, all)));
             })
        .def("add_rearrange", [](Engine& e, const std::string& name, int src, int dst, const Longs& extent,
                                 std::vector<Longs> stride, const Longs& offset) {
            e.program.add_step(rearrange_step(name, src, dst, axes_of(e, extent, std::move(stride), offset, {src, dst})));
        });
}

}  // namespace bitdial
