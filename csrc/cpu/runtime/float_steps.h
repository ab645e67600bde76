// Steps over values in the network's own order: float32, and the int64, int32 and bool values that masks and look-ups are
// made of. Positions and strides count elements of one sample of the batch; constants are the same for every sample.
#pragma once
#include "program.h"
#include "simple_steps.h"

namespace bitdial {

struct Axes {  // of one sample; the last one innermost
    std::vector<int64_t> extent;
    std::vector<std::vector<int64_t>> stride;  // per operand, the result last
    std::vector<int64_t> offset;
};
// The same with the sample in front, whose extent steps set when they run.
Axes with_samples(const Program& program, Axes axes, const std::vector<int>& operands);

// weight, bias, dst, bytes: -1 where there is none. order: per sample, the source row of every row; empty: as they come.
std::unique_ptr<Step> layer_norm_step(const Program& program, const std::string& name, int src, int weight, int bias,
                                      int columns, int dst, int bytes, float eps, Scaling s, std::vector<int32_t> order);
// axes: here and below, of `with_samples`.
std::unique_ptr<Step> combine_step(const std::string& name, CombineOp op, int a, int b, int dst, Axes axes, float lo, float hi);
// dst [outer][inner] = sum over `count` of src [outer][count][inner].
std::unique_ptr<Step> reduce_step(const std::string& name, int src, int dst, int64_t outer, int64_t count, int64_t inner,
                                  float divisor, bool square, bool root);
// Rows of `table` by int64 numbers. Throws std::out_of_range for a number that is no row's.
std::unique_ptr<Step> embedding_step(const std::string& name, int ids, int table, int dst);

// Element by element on values of any type. Comparisons and logic give bool; `where` takes a where the condition holds, which
// is its third operand.
enum class WholeOp {
    kConvert, kEqual, kNotEqual, kLess, kLessEqual, kAnd, kOr, kXor, kWhere, kAdd, kSubtract, kMultiply, kMaximum, kMinimum
};
enum class Kind { kFloat, kLong, kInt, kBool };
// kind: of the operands that are computed with; to: of the result.
std::unique_ptr<Step> whole_step(const std::string& name, WholeOp op, Kind kind, Kind to, std::vector<int> operands, int dst,
                                 Axes axes);
// A fixed rearrangement of elements of 4 or 8 bytes, or of dense ones of 1.
std::unique_ptr<Step> rearrange_step(const std::string& name, int src, int dst, Axes axes);

}  // namespace bitdial
