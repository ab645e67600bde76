#include "training.h"

#include <nanobind/stl/string.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "../kernels.h"
#include "../runtime/thread_pool.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace bitdial;

namespace {

// Tensors come as addresses, since Python knows no bfloat16 arrays; bitdial.finetuning.kernels checks types, sizes and layout,
// and is the only caller. 0 is no tensor.
template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// A vector over channels, repeated so that narrow rows become long ones: `Shape` says how often.
struct Shape {
    int64_t rows, channels, repeats = 1;
    Shape(int64_t rows_, int64_t channels_) : rows(rows_), channels(channels_) {
        while (rows % 2 == 0 && rows > 1 && channels <= 256) rows /= 2, channels *= 2, repeats *= 2;
    }
};

std::vector<float> repeated(uintptr_t vector, const Shape& shape) {
    const float* from = pointer<float>(vector);
    const int64_t own = shape.channels / shape.repeats;
    std::vector<float> result;
    result.reserve(static_cast<size_t>(shape.channels));
    for (int64_t i = 0; i < shape.repeats; i++) result.insert(result.end(), from, from + own);
    return result;
}

// The steps on one instruction set, with threads of their own.
class Training {
   public:
    Training(const std::string& isa, int threads) : kernels_(kernels_of(isa)), pool_(std::max(threads, 1)) {}

    void requantize(int types, uintptr_t acc, uintptr_t multiplier, uintptr_t bias, uintptr_t residual, float factor, float lo,
                    float hi, uintptr_t out, uintptr_t inside, int64_t rows, int64_t channels) {
        const Shape shape(rows, channels);
        const std::vector<float> m = repeated(multiplier, shape), b = repeated(bias, shape);
        const RequantizeArgs args{pointer<void>(acc), m.data(), b.data(), pointer<void>(residual), factor, lo, hi,
                                  pointer<void>(out), pointer<uint8_t>(inside), shape.channels};
        share(shape, [&](int64_t, int64_t from, int64_t to) { kernels_.requantize(args, Types(types), from, to); });
    }

    // The sums of `grad_bias` are those of fixed blocks of rows added in order, whatever the number of threads.
    void requantize_grad(int types, uintptr_t grad, uintptr_t inside, uintptr_t multiplier, float factor, uintptr_t grad_acc,
                         uintptr_t grad_residual, uintptr_t grad_bias, int64_t rows, int64_t channels) {
        const Shape shape(rows, channels);
        const std::vector<float> m = repeated(multiplier, shape);
        const RequantizeGradArgs args{pointer<void>(grad), pointer<uint8_t>(inside), m.data(), factor, pointer<void>(grad_acc),
                                      pointer<void>(grad_residual), nullptr, shape.channels};
        std::vector<float> sums;
        if (grad_bias) sums.resize(static_cast<size_t>(blocks(shape) * shape.channels), 0.f);
        share(shape, [&](int64_t block, int64_t from, int64_t to) {
            RequantizeGradArgs own = args;
            if (grad_bias) own.grad_bias = sums.data() + block * shape.channels;
            kernels_.requantize_grad(own, Types(types), from, to);
        });
        if (!grad_bias) return;
        std::vector<double> total(static_cast<size_t>(channels), 0.0);
        for (size_t at = 0; at < sums.size(); at++) total[at % static_cast<size_t>(channels)] += sums[at];
        std::copy(total.begin(), total.end(), pointer<float>(grad_bias));
    }

    void extract_floats(int types, uintptr_t x, uintptr_t inverse, uintptr_t power, uintptr_t lo, uintptr_t hi, uintptr_t out,
               uintptr_t inside, int64_t rows, int64_t channels) {
        const Shape shape(rows, channels);
        const std::vector<float> i = repeated(inverse, shape), p = repeated(power, shape), l = repeated(lo, shape),
                                 h = repeated(hi, shape);
        const ExtractFloatsArgs args{pointer<void>(x), i.data(), p.data(), l.data(), h.data(), pointer<void>(out),
                             pointer<uint8_t>(inside), shape.channels};
        share(shape, [&](int64_t, int64_t from, int64_t to) { kernels_.extract_floats(args, Types(types), from, to); });
    }

    void look_up(int types, uintptr_t x, uintptr_t values, uintptr_t slopes, uintptr_t out, uintptr_t slope, int64_t rows,
                 int64_t channels) {
        const Shape shape(rows, channels);
        const LookUpArgs args{pointer<void>(x), pointer<float>(values), pointer<float>(slopes), pointer<void>(out),
                              pointer<void>(slope), shape.channels};
        share(shape, [&](int64_t, int64_t from, int64_t to) { kernels_.look_up(args, Types(types), from, to); });
    }

    void pass(int types, uintptr_t grad, uintptr_t inside, uintptr_t out, int64_t rows, int64_t channels) {
        const Shape shape(rows, channels);
        const PassArgs args{pointer<void>(grad), pointer<uint8_t>(inside), pointer<void>(out), shape.channels};
        share(shape, [&](int64_t, int64_t from, int64_t to) { kernels_.pass(args, Types(types), from, to); });
    }

   private:
    static constexpr int64_t kElements = 32768;  // of a block, about: some ten microseconds of work

    static int64_t block_rows(const Shape& shape) { return std::max<int64_t>(1, kElements / shape.channels); }
    static int64_t blocks(const Shape& shape) { return (shape.rows + block_rows(shape) - 1) / block_rows(shape); }

    template <typename Task>
    void share(const Shape& shape, const Task& task) {
        const int64_t each = block_rows(shape), count = blocks(shape);
        if (count > 1000000) throw std::invalid_argument("a tensor is too large");
        ThreadPool::Lease lease(pool_);
        pool_.for_each(static_cast<int>(count), lease.held(), [&](int block, int) {
            task(block, block * each, std::min(shape.rows, (block + 1) * each));
        });
    }

    const Kernels& kernels_;
    ThreadPool pool_;
};

}  // namespace

void bind_training(nb::module_& m) {
    nb::class_<Training>(m, "Training")
        .def(nb::init<const std::string&, int>(), "isa"_a, "threads"_a)
        .def("requantize", &Training::requantize, nb::call_guard<nb::gil_scoped_release>())
        .def("requantize_grad", &Training::requantize_grad, nb::call_guard<nb::gil_scoped_release>())
        .def("extract_floats", &Training::extract_floats, nb::call_guard<nb::gil_scoped_release>())
        .def("look_up", &Training::look_up, nb::call_guard<nb::gil_scoped_release>())
        .def("pass_through", &Training::pass, nb::call_guard<nb::gil_scoped_release>());
}
