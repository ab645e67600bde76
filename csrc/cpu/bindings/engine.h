// What the files of this folder share: the class behind `Program`, and arrays from Python.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <cmath>
#include <vector>

#include "../runtime/program.h"

namespace bitdial {

template <typename T>
using Array = nanobind::ndarray<const T, nanobind::c_contig, nanobind::device::cpu>;
using AnyArray = nanobind::ndarray<nanobind::ro, nanobind::c_contig, nanobind::device::cpu>;  // inputs may be read-only
using Pair = std::array<int, 2>;

template <typename T>
std::vector<T> values(const Array<T>& a) {
    return std::vector<T>(a.data(), a.data() + a.size());
}

// The dial belongs to the program, so that turning it is one store without a look at any Python object.
class Engine {
   public:
    Engine(const std::string& isa, int threads, std::vector<double> ratios, bool small)
        : program(isa, threads, small), ratios_(std::move(ratios)) {}

    // The table's ratio now in force, or NaN if `ratio` is not within it (the caller says why).
    double set_ratio(double ratio) {
        if (!(ratio >= 0.0 && ratio <= 1.0)) return std::nan("");
        int at = -1;
        for (size_t i = 0; i < ratios_.size(); i++)
            if (ratios_[i] <= ratio + 1e-9) at = static_cast<int>(i);
        if (at < 0) return std::nan("");
        dial_.store(at, std::memory_order_relaxed);
        return ratios_[at];
    }
    int dial() const { return dial_.load(std::memory_order_relaxed); }
    size_t ratios() const { return ratios_.size(); }

    Program program;

   private:
    std::vector<double> ratios_;
    std::atomic<int> dial_{0};
};

// Adds the steps of ../runtime/float_steps.h to the class Program.
void bind_float_steps(nanobind::class_<Engine>& program);
// Likewise of ../runtime/attention_steps.h.
void bind_attention_steps(nanobind::class_<Engine>& program);

}  // namespace bitdial
