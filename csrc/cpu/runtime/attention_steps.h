// Steps around the operators of attention/attention.h.
#pragma once
#include "program.h"

namespace bitdial {

// An 8-bit operand or the output of a product: a tensor, and where its elements lie in a sample (from the tensor's origin, in
// elements). table: empty, or 256 bytes that replace those of an operand; zero: of the values as the product takes them.
struct ProductPlace {
    int tensor = -1;
    int64_t outer = 0, inner = 0;  // of the output: row and column
    std::vector<int64_t> heads;
    std::vector<uint8_t> table;
    int zero = 0;
};

// A tensor, constant or not, that scores meet: of floats, or of bool; strides as in ScoreTerm.
struct TermPlace {
    int tensor = -1;
    int64_t row = 0, column = 0;
    std::vector<int64_t> heads;
    TermOp op = TERM_ADD;
    float value = 0;
};

struct ProductSizes {
    int rows = 1, columns = 1, depth = 1, width = 1;
};

// All throw std::invalid_argument where elements lie outside of their tensor.
std::unique_ptr<Step> matmul_step(const Program& program, const std::string& name, ProductPlace left, ProductPlace right,
                                  ProductPlace out, ProductSizes sizes, float m, float lo, float hi);
// scores: name of the layer whose product the scores are; `name` is that of the product with the values.
std::unique_ptr<Step> attention_step(const Program& program, const std::string& name, const std::string& scores,
                                     ProductPlace q, ProductPlace k, ProductPlace v, ProductPlace out, ProductSizes sizes,
                                     float m, std::vector<TermPlace> terms, float factor, float p_lo, float p_hi, float out_m,
                                     float lo, float hi);
// Over an axis of `length` elements that lie `inner` elements apart. A float dst takes the result as it is; bytes are
// rne(clamp(fl(p * factor), lo, hi)), where row r of a sample begins at rows[r] from the origin, elements `column` apart.
std::unique_ptr<Step> softmax_step(const Program& program, const std::string& name, int src, int dst, int length, int inner,
                                   std::vector<int64_t> rows, int64_t column, float factor, float lo, float hi);

}  // namespace bitdial
