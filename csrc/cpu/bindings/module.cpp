// The Python border of the CPU engine: the extension module bitdial.engines.cpu._native.
#include <algorithm>
#include <chrono>
#include <optional>
#include <tuple>

#include "../runtime/simple_steps.h"
#include "engine.h"
#include "training.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace bitdial;

namespace {

Window window(Pair kernel, Pair stride, Pair pad, Pair dilation) {
    return {kernel[0], kernel[1], stride[0], stride[1], pad[0], pad[1], dilation[0], dilation[1]};
}

void check_external(const Engine& e, const std::vector<std::pair<int, AnyArray>>& arrays, int n) {
    for (const auto& [t, a] : arrays) {
        const TensorSpec& s = e.program.tensor(t);
        if (static_cast<int64_t>(a.nbytes()) != int64_t(n) * s.factor * s.h * s.w * s.c * s.item())
            throw std::invalid_argument("an array has not the size of its tensor");
    }
}

std::vector<std::pair<int, void*>> addresses(const std::vector<std::pair<int, AnyArray>>& arrays) {
    std::vector<std::pair<int, void*>> result;
    for (const auto& [t, a] : arrays) result.emplace_back(t, const_cast<void*>(a.data()));
    return result;
}

template <typename Result, typename Args, typename... Rest>
size_t argument_bytes(Result (*)(const Args&, Rest...)) {
    return sizeof(Args);
}
template <typename Result, typename... Parameters>
size_t argument_bytes(Result (*)(Parameters...)) {
    return 0;
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Compiled kernels of bitdial's CPU engine.";
    m.def("version", [] { return BITDIAL_VERSION; }, "Version of bitdial that this extension was built from.");
    m.def("supported_isas", &supported_isas, "Instruction sets that this processor runs, best first.");
    m.def("cpu_name", &cpu_name);
    m.def(
        "kernels",
        [](const std::string& isa) {
            const Kernels& k = kernels_of(isa);
            std::vector<std::tuple<std::string, std::string, uintptr_t, size_t>> list;
#define BITDIAL_ITEM(folder, name, ...) \
    list.emplace_back(#folder, #name, reinterpret_cast<uintptr_t>(k.name), argument_bytes(k.name));
            BITDIAL_KERNEL_LIST(BITDIAL_ITEM)
#undef BITDIAL_ITEM
            return list;
        },
        "isa"_a, "Every kernel of a set: folder, name, address, and size of the structure that its first parameter refers to.");
    m.def(
        "facts",
        [](const std::string& isa) {
            const Facts f = kernels_of(isa).facts();
            nb::dict result;
            result["has_fip"] = f.has_fip, result["narrow_is_faster"] = f.narrow_is_faster;
            return result;
        },
        "isa"_a, "Whether the fast inner product is built for a set, and whether it sums narrow operands up in 16 bits.");
    m.attr("METHODS") = nb::tuple(nb::cast(std::vector<std::string>(kMethodNames, kMethodNames + kMethods)));
    m.def(
        "burn",
        [](const std::string& isa, int64_t rounds) {
            const Kernels& k = kernels_of(isa);
            int32_t sink = 0;
            nb::gil_scoped_release release;
            const auto begin = std::chrono::steady_clock::now();
            const int64_t done = k.burn(rounds, &sink);
            const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
            return std::make_pair(done, seconds);
        },
        "isa"_a, "rounds"_a, "(byte products made on registers, seconds).");

    bind_training(m);
    nb::class_<Context>(m, "Context").def_ro("samples", &Context::n);

    nb::class_<Engine> program(m, "Program");
    bind_float_steps(program);
    bind_attention_steps(program);
    program.def(nb::init<const std::string&, int, std::vector<double>, bool>(), "isa"_a, "threads"_a, "ratios"_a, "small"_a = false)
        .def("add_tensor",
             [](Engine& e, int h, int w, int c, bool is_float, bool channels_first, bool external, int zero, int factor,
                Pair halo, int whole, int alias) {
                 TensorSpec t;
                 t.h = h, t.w = w, t.c = c, t.is_float = is_float, t.channels_first = channels_first, t.external = external;
                 t.zero = zero, t.factor = factor, t.whole = whole;
                 if (alias >= 0) t.alias = e.program.root(alias), t.constant = e.program.tensor(alias).constant;
                 t.halo_h = t.halo_bottom = halo[0];
                 t.halo_w = t.halo_right = halo[1];
                 return e.program.add_tensor(t);
             },
             nb::kw_only(), "h"_a, "w"_a, "c"_a, "is_float"_a = false, "channels_first"_a = false, "external"_a = false,
             "zero"_a = 0, "factor"_a = 1, "halo"_a = Pair{0, 0}, "whole"_a = 0, "alias"_a = -1)
        .def("set_external", [](Engine& e, int tensor, bool on) { e.program.set_external(tensor, on); })
        .def("touch", [](Engine& e, int tensor, int step) { e.program.touch(tensor, step); })
        .def("add_conv",
             [](Engine& e, const std::string& name, int src, int dst, int residual, float residual_factor, float lo, float hi,
                bool accumulators, bool folded, Array<int8_t> weight, Pair stride, Pair pad, Pair dilation, int conv_groups,
                int amax, int wmax, bool input_signed, Array<int32_t> bounds, Array<uint8_t> activation_shift,
                Array<uint8_t> weight_shift, Array<uint8_t> low, Array<int32_t> bias, Array<float> multiplier,
                std::optional<Array<int8_t>> low_weight, bool dynamic) {
                 if (weight.ndim() != 4 || bias.ndim() != 2 || low.ndim() != 2 || weight_shift.ndim() != 2)
                     throw std::invalid_argument("layer '" + name + "': an array has the wrong number of axes");
                 ConvSpec s;
                 s.name = name;
                 s.outputs = static_cast<int>(weight.shape(0));
                 s.inputs = static_cast<int>(weight.shape(1));
                 s.kernel_h = static_cast<int>(weight.shape(2));
                 s.kernel_w = static_cast<int>(weight.shape(3));
                 s.stride_h = stride[0], s.stride_w = stride[1], s.pad_h = pad[0], s.pad_w = pad[1];
                 s.dilation_h = dilation[0], s.dilation_w = dilation[1], s.conv_groups = conv_groups;
                 s.amax = amax, s.wmax = wmax, s.input_signed = input_signed, s.dynamic = dynamic;
                 s.ratios = static_cast<int>(bias.shape(0));
                 const size_t groups = bounds.size() - 1, local = groups / conv_groups;
                 if (bias.shape(0) != e.ratios() || bias.shape(1) != weight.shape(0) || multiplier.size() != weight.shape(0) ||
                     activation_shift.size() != groups || weight_shift.shape(0) != weight.shape(0) ||
                     weight_shift.shape(1) != local || low.shape(0) != bias.shape(0) || low.shape(1) != groups ||
                     e.program.tensor(src).c != s.inputs * conv_groups || e.program.tensor(dst).c != s.outputs)
                     throw std::invalid_argument("layer '" + name + "': its arrays do not fit each other");
                 if (low_weight && low_weight->size() != weight.size())
                     throw std::invalid_argument("layer '" + name + "': its low weights are not as many as its weights");
                 s.weight = values(weight);
                 if (low_weight) s.low_weight = values(*low_weight);
                 s.bounds = values(bounds);
                 s.activation_shift = values(activation_shift);
                 s.weight_shift = values(weight_shift);
                 s.low = values(low);
                 s.bias = values(bias);
                 s.multiplier = values(multiplier);
                 nb::gil_scoped_release release;
                 e.program.add_conv(std::move(s), src, dst, residual, residual_factor, lo, hi,
                                    accumulators ? OUT_ACCUMULATORS : OUT_BYTES, folded);
             },
             "name"_a, nb::kw_only(), "src"_a, "dst"_a, "residual"_a = -1, "residual_factor"_a = 0.f, "lo"_a, "hi"_a,
             "accumulators"_a = false, "folded"_a = false, "weight"_a, "stride"_a, "pad"_a, "dilation"_a, "conv_groups"_a,
             "amax"_a, "wmax"_a, "input_signed"_a, "bounds"_a, "activation_shift"_a, "weight_shift"_a, "low"_a, "bias"_a,
             "multiplier"_a, "low_weight"_a = nb::none(), "dynamic"_a = false)
        .def("add_depthwise",
             [](Engine& e, const std::string& name, int src, int dst, int residual, float residual_factor, float lo, float hi,
                Array<int8_t> weight, Pair kernel, Pair stride, Pair pad, Pair dilation, int multiplicity, Array<int32_t> bias,
                Array<float> multiplier, int64_t macs) {
                 const size_t outputs = static_cast<size_t>(e.program.tensor(dst).c);
                 if (bias.ndim() != 2 || bias.shape(0) != e.ratios() || bias.shape(1) != outputs || multiplier.size() != outputs ||
                     weight.size() != outputs * static_cast<size_t>(kernel[0]) * static_cast<size_t>(kernel[1]) ||
                     static_cast<size_t>(e.program.tensor(src).c) * static_cast<size_t>(multiplicity) != outputs)
                     throw std::invalid_argument("layer '" + name + "': its arrays do not fit each other");
                 std::vector<std::vector<int32_t>> rows;
                 for (size_t r = 0; r < bias.shape(0); r++)
                     rows.emplace_back(bias.data() + r * bias.shape(1), bias.data() + (r + 1) * bias.shape(1));
                 e.program.add_step(depthwise_step(name, src, dst, residual, window(kernel, stride, pad, dilation), multiplicity,
                                                   values(weight), rows, values(multiplier), residual_factor, {1, 1, lo, hi},
                                                   macs));
             },
             "name"_a, nb::kw_only(), "src"_a, "dst"_a, "residual"_a = -1, "residual_factor"_a = 0.f, "lo"_a, "hi"_a,
             "weight"_a, "kernel"_a, "stride"_a, "pad"_a, "dilation"_a, "multiplicity"_a, "bias"_a, "multiplier"_a, "macs"_a)
        .def("add_quantize",
             [](Engine& e, const std::string& name, int src, int dst, float inverse, float lo, float hi, bool counted) {
                 e.program.add_step(quantize_step(name, src, dst, {inverse, 1, lo, hi}, counted));
             },
             "name"_a, "src"_a, "dst"_a, "inverse"_a, "lo"_a, "hi"_a, "counted"_a = true)
        .def("add_dequantize", [](Engine& e, const std::string& name, int src, int dst,
                                  float scale) { e.program.add_step(dequantize_step(name, src, dst, scale)); })
        .def("add_table", [](Engine& e, const std::string& name, int src, int dst,
                             Array<uint8_t> table) { e.program.add_step(table_step(name, src, dst, values(table))); })
        .def("add_add", [](Engine& e, const std::string& name, int a, int b, int dst, float ra, float rb, float lo,
                           float hi) { e.program.add_step(add_step(name, a, b, dst, {ra, rb, lo, hi})); })
        .def("add_mul", [](Engine& e, const std::string& name, int a, int b, int dst, float f, float lo,
                           float hi) { e.program.add_step(mul_step(name, a, b, dst, {f, 1, lo, hi})); })
        .def("add_rescale",
             [](Engine& e, const std::string& name, int src, int dst, int axis, int offset, float factor, float lo, float hi) {
                 e.program.add_step(rescale_step(name, src, dst, axis, offset, {factor, 1, lo, hi}));
             })
        .def("add_max_pool",
             [](Engine& e, const std::string& name, int src, int dst, Pair kernel, Pair stride, Pair pad, Pair dilation) {
                 e.program.add_step(max_pool_step(name, src, dst, window(kernel, stride, pad, dilation)));
             })
        .def("add_sum_pool",
             [](Engine& e, const std::string& name, int src, int dst, Pair kernel, Pair stride, Pair pad, float factor, float lo,
                float hi) {
                 e.program.add_step(sum_pool_step(name, src, dst, window(kernel, stride, pad, {1, 1}), {factor, 1, lo, hi}));
             })
        .def("add_copy",
             [](Engine& e, const std::string& name, int src, int dst, std::vector<int32_t> extent,
                std::vector<int64_t> src_stride, std::vector<int64_t> dst_stride, int64_t src_offset, int64_t dst_offset,
                std::vector<int32_t> gather, int gather_axis, bool fill) {
                 e.program.add_step(copy_step(name, src, dst, std::move(extent), std::move(src_stride), std::move(dst_stride),
                                              src_offset, dst_offset, std::move(gather), gather_axis, fill));
             })
        .def("add_move",
             [](Engine& e, const std::string& name, int src, int dst, Array<int32_t> from, Array<int32_t> to, int unit, bool fill) {
                 if (from.size() != to.size()) throw std::invalid_argument("offsets differ in number");
                 e.program.add_step(move_step(name, src, dst, values(from), values(to), unit, fill));
             })
        // The memory of a value that is not 8-bit, as it is.
        .def("read_whole",
             [](Engine& e, Context& c, int tensor, nb::ndarray<nb::c_contig, nb::device::cpu> out) {
                 const TensorSpec& t = e.program.tensor(tensor);
                 if (!t.dense() || static_cast<int64_t>(out.nbytes()) != t.sample_bytes() * c.n)
                     throw std::invalid_argument("the array has not the size of the tensor");
                 std::memcpy(out.data(), c.base[e.program.root(tensor)], out.nbytes());
             })
        .def("write_whole",
             [](Engine& e, Context& c, int tensor, AnyArray from) {
                 const TensorSpec& t = e.program.tensor(tensor);
                 if (!t.dense() || static_cast<int64_t>(from.nbytes()) != t.sample_bytes() * c.n)
                     throw std::invalid_argument("the array has not the size of the tensor");
                 std::memcpy(c.base[e.program.root(tensor)], from.data(), from.nbytes());
             })
        // A tensor's values as float32 in its logical order, and back: for operators that run elsewhere.
        .def("read",
             [](Engine& e, Context& c, int tensor, nb::ndarray<float, nb::c_contig, nb::device::cpu> out,
                bool channels_first) {
                 const TensorSpec& t = e.program.tensor(tensor);
                 if (static_cast<int64_t>(out.size()) != int64_t(c.n) * t.factor * t.h * t.w * t.c)
                     throw std::invalid_argument("the array has not the size of the tensor");
                 if (t.is_float) {
                     std::memcpy(out.data(), c.base[e.program.root(tensor)], out.nbytes());
                     return;
                 }
                 const ConstByteView v{c.base[e.program.root(tensor)] + t.origin(), c.n * t.factor, t.h, t.w, t.c, t.pitch_n(), t.pitch_y(),
                                       t.pitch_x()};
                 const int64_t area = int64_t(t.h) * t.w, all = area * t.c;
                 const DequantizeArgs a = channels_first ? DequantizeArgs{v, t.zero, 1.f, out.data(), all, t.w, 1, area}
                                                         : DequantizeArgs{v, t.zero, 1.f, out.data(), all, int64_t(t.w) * t.c, t.c, 1};
                 e.program.kernels().dequantize(a, 0, v.n * v.h);
             })
        .def("write",
             [](Engine& e, Context& c, int tensor, Array<float> from, bool channels_first) {
                 const TensorSpec& t = e.program.tensor(tensor);
                 if (static_cast<int64_t>(from.size()) != int64_t(c.n) * t.factor * t.h * t.w * t.c)
                     throw std::invalid_argument("the array has not the size of the tensor");
                 if (t.is_float) {
                     std::memcpy(c.base[e.program.root(tensor)], from.data(), from.nbytes());
                     return;
                 }
                 fill_margin(t, c.base[tensor], c.n);
                 const ByteView v{c.base[tensor] + t.origin(), c.n * t.factor, t.h, t.w, t.c, t.pitch_n(), t.pitch_y(),
                                  t.pitch_x()};
                 const int64_t area = int64_t(t.h) * t.w, all = area * t.c;
                 QuantizeArgs a{from.data(), all, int64_t(t.w) * t.c, t.c, 1, v, 1.f, t.zero ? -127.f : 0.f,
                                t.zero ? 127.f : 255.f, t.zero};
                 if (channels_first) a.src_y = t.w, a.src_x = 1, a.src_c = area;
                 e.program.kernels().quantize(a, 0, v.n * v.h);
             })
        .def(
            "finish", [](Engine& e, bool all) { e.program.finish(all); }, "all"_a = false,
            nb::call_guard<nb::gil_scoped_release>())
        .def("seal", [](Engine& e) { e.program.seal(); })
        .def("steps",
             [](Engine& e) {
                 std::vector<std::pair<std::string, std::string>> result;
                 for (int i = 0; i < e.program.steps(); i++)
                     result.emplace_back(e.program.step(i).name, e.program.step(i).kind);
                 return result;
             })
        .def("set_ratio", &Engine::set_ratio)
        .def("dial", &Engine::dial)
        .def("run",
             [](Engine& e, const std::vector<std::pair<int, AnyArray>>& arrays, int n, int ratio) {
                 check_external(e, arrays, n);
                 const auto external = addresses(arrays);
                 nb::gil_scoped_release release;
                 return e.program.run(external, n, ratio, 0, e.program.steps(), nullptr);
             },
             "arrays"_a, "n"_a, "ratio"_a, "All steps. Returns how many NaN and infinite values the inputs held.")
        .def("profile",
             [](Engine& e, const std::vector<std::pair<int, AnyArray>>& arrays, int n, int ratio, int repeats) {
                 check_external(e, arrays, n);
                 const auto external = addresses(arrays);
                 nb::gil_scoped_release release;
                 std::vector<std::vector<double>> times(e.program.steps());
                 for (int r = 0; r < repeats; r++) {
                     std::vector<double> once(e.program.steps(), 0.0);
                     e.program.run(external, n, ratio, 0, e.program.steps(), &once);
                     for (size_t i = 0; i < once.size(); i++) times[i].push_back(once[i]);
                 }
                 std::vector<double> result;
                 for (auto& t : times) {
                     std::nth_element(t.begin(), t.begin() + t.size() / 2, t.end());
                     result.push_back(t[t.size() / 2]);
                 }
                 return result;
             },
             "arrays"_a, "n"_a, "ratio"_a, "repeats"_a, "Median seconds of every step.")
        .def("acquire", [](Engine& e, int n) { return e.program.acquire(n); }, nb::call_guard<nb::gil_scoped_release>())
        .def("release", [](Engine& e, std::unique_ptr<Context> c) { e.program.release(std::move(c)); })
        .def("renew",
             [](Engine& e, int step, Array<int32_t> bias, Array<uint8_t> weight_shift, std::optional<Array<int8_t>> low_weight) {
                 if (step < 0 || step >= e.program.steps()) throw std::invalid_argument("no such step");
                 auto rows = values(bias);
                 auto shifts = values(weight_shift);
                 auto low = low_weight ? values(*low_weight) : std::vector<int8_t>();
                 nb::gil_scoped_release release;
                 e.program.step(step).renew(std::move(rows), std::move(shifts), std::move(low));
             },
             "step"_a, "bias"_a, "weight_shift"_a, "low_weight"_a = nb::none(),
             "Other bias rows, weight shifts and stored low weights for the layer of a step, from its next run on; before `seal`.")
        // The bytes of an 8-bit tensor where they lie, [samples, h, w, c], q or q + 128: until the next run in the context.
        .def("view",
             [](Engine& e, Context& c, int tensor) {
                 const TensorSpec& t = e.program.tensor(tensor);
                 if (t.dense()) throw std::invalid_argument("the tensor does not hold bytes");
                 uint8_t* data = c.base[e.program.root(tensor)] + t.origin();
                 const size_t shape[4] = {size_t(c.n) * t.factor, size_t(t.h), size_t(t.w), size_t(t.c)};
                 const int64_t strides[4] = {t.pitch_n(), t.pitch_y(), t.pitch_x(), 1};
                 return nb::ndarray<nb::numpy, uint8_t>(data, 4, shape, nb::find(c), strides);
             })
        .def("bind",
             [](Engine& e, Context& c, int tensor, AnyArray array) {
                 check_external(e, {{tensor, array}}, c.n);
                 c.base[tensor] = static_cast<uint8_t*>(const_cast<void*>(array.data()));
             })
        .def("run_in",
             [](Engine& e, Context& c, int ratio, int from, int to) { return e.program.run_in(c, ratio, from, to, nullptr); },
             nb::call_guard<nb::gil_scoped_release>())
        .def("methods",
             [](Engine& e, const std::string& name) {
                 std::vector<std::string> result;
                 for (int i = 0; i < kMethods; i++)
                     result.push_back(e.program.conv(name)->layer().obstacle(static_cast<Method>(i)));
                 return result;
             },
             "Per method of METHODS: '' if it is exact for the layer, else why not.")
        .def("choose",
             [](Engine& e, const std::string& name, int ratio, int method, int chunk) {
                 if (method < 0 || method >= kMethods) throw std::invalid_argument("no such method");
                 e.program.conv(name)->choose(ratio, {static_cast<Method>(method), chunk});
             })
        .def("choice",
             [](Engine& e, const std::string& name, int ratio) {
                 const Choice c = e.program.conv(name)->choice(ratio);
                 return std::make_pair(static_cast<int>(c.method), c.chunk);
             })
        .def("usual",
             [](Engine& e, const std::string& name, int ratio) {
                 const Choice c = e.program.conv(name)->usual(ratio);
                 return std::make_pair(static_cast<int>(c.method), c.chunk);
             })
        .def("counters",
             [](Engine& e) {
                 std::vector<std::tuple<std::string, std::string, int64_t, int64_t, int64_t, int64_t>> result;
                 for (int i = 0; i < e.program.steps(); i++) {
                     if (auto* conv = dynamic_cast<ConvStep*>(&e.program.step(i))) {
                         for (int k = 0; k < kMethods; k++) {
                             const auto& t = conv->totals[k];
                             if (t.runs) result.emplace_back(conv->name, kMethodNames[k], t.low, t.high, t.multiplications, t.runs);
                         }
                     } else if (auto* d = dynamic_cast<CountedStep*>(&e.program.step(i))) {
                         for (const auto& c : d->counts)
                             if (c.runs) result.emplace_back(c.layer, d->kind, 0, c.macs, c.macs, c.runs);
                     }
                 }
                 return result;
             },
             "(layer, kernel, low MACs, high MACs, byte multiplications issued, runs)")
        .def("reset_counters",
             [](Engine& e) {
                 for (int i = 0; i < e.program.steps(); i++) {
                     if (auto* conv = dynamic_cast<ConvStep*>(&e.program.step(i)))
                         for (auto& t : conv->totals) t.low = t.high = t.multiplications = t.runs = 0;
                     else if (auto* d = dynamic_cast<CountedStep*>(&e.program.step(i)))
                         for (auto& c : d->counts) c.macs = c.runs = 0;
                 }
             })
        .def("weight_bytes", [](Engine& e, const std::string& name) { return e.program.conv(name)->layer().weight_bytes(); })
        .def("arena_bytes", [](Engine& e, int n) { return e.program.arena_bytes(n); })
        .def("context_bytes", [](Engine& e) { return e.program.context_bytes(); });
}
