// Steps around the operators of elementwise/, pool/, copy/ and depthwise/.
#pragma once
#include <deque>

#include "program.h"

namespace bitdial {

struct Scaling {  // factors and limits of an 8-bit operator, see bitdial/quantization/program.py
    float a = 1, b = 1, lo = 0, hi = 255;
};
struct Window {
    int kernel_h = 1, kernel_w = 1, stride_h = 1, stride_w = 1, pad_h = 0, pad_w = 0, dilation_h = 1, dilation_w = 1;
};

// counted: NaN and infinite values that it reads are reported.
std::unique_ptr<Step> quantize_step(const std::string& name, int src, int dst, Scaling s, bool counted);
std::unique_ptr<Step> dequantize_step(const std::string& name, int src, int dst, float scale);
std::unique_ptr<Step> table_step(const std::string& name, int src, int dst, std::vector<uint8_t> table);
std::unique_ptr<Step> add_step(const std::string& name, int a, int b, int dst, Scaling s);
std::unique_ptr<Step> mul_step(const std::string& name, int a, int b, int dst, Scaling s);
// One input of a concatenation along the channels (axis 3) or rows (axis 1 or 2), from `offset` on.
std::unique_ptr<Step> rescale_step(const std::string& name, int src, int dst, int axis, int offset, Scaling s);
std::unique_ptr<Step> max_pool_step(const std::string& name, int src, int dst, Window w);
std::unique_ptr<Step> sum_pool_step(const std::string& name, int src, int dst, Window w, Scaling s);
// extents and strides of axes 1..5; axis 0 is the sample.
std::unique_ptr<Step> copy_step(const std::string& name, int src, int dst, std::vector<int32_t> extent,
                                std::vector<int64_t> src_stride, std::vector<int64_t> dst_stride, int64_t src_offset,
                                int64_t dst_offset, std::vector<int32_t> gather, int gather_axis, bool fill);
// Any rearrangement within a sample of the batch: `unit` bytes at to[i] of the destination are those at from[i] of the source
// (offsets in bytes from the tensors' origins); all other bytes of the destination are its value 0 if `fill`.
std::unique_ptr<Step> move_step(const std::string& name, int src, int dst, const std::vector<int32_t>& from,
                                const std::vector<int32_t>& to, int unit, bool fill);
std::unique_ptr<Step> depthwise_step(const std::string& name, int src, int dst, int residual, Window w, int multiplicity,
                                     std::vector<int8_t> weight, std::vector<std::vector<int32_t>> bias,
                                     std::vector<float> multiplier, float residual_factor, Scaling s, int64_t macs);

// Multiply-accumulates that a step executed so far, at 8 bits, per layer of the network that it computes; its kind is the
// kernel's name.
class CountedStep : public Step {
   public:
    struct Count {
        explicit Count(std::string layer_) : layer(std::move(layer_)) {}
        std::string layer;
        std::atomic<int64_t> macs{0}, runs{0};
    };
    std::deque<Count> counts;
};

}  // namespace bitdial
