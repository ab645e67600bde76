// A network compiled to a flat list of steps over tensors in one arena. Built once, then shared by any number of threads;
// what a run writes lies in a Context, one per concurrent run, kept for the next one.
#pragma once
#include <sys/types.h>

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "../kernels.h"
#include "conv_layer.h"
#include "memory.h"
#include "thread_pool.h"

namespace bitdial {

struct TensorSpec {
    int factor = 1;  // samples per sample of the batch
    int h = 1, w = 1, c = 1;
    bool is_float = false, channels_first = false, external = false;
    int whole = 0;  // bytes per element of values that the network computes with as they are: int64, int32, bool; else 0
    int alias = -1;  // the tensor whose memory it is, which has as many bytes and no margin
    bool constant = false;  // one sample for all
    int zero = 0;
    int halo_h = 0, halo_w = 0;           // top and left
    int halo_bottom = 0, halo_right = 0;  // may be larger where tiles reach over
    bool dense() const { return is_float || whole; }  // in the network's order, without margins
    int item() const { return is_float ? 4 : whole ? whole : 1; }
    int64_t pitch_x() const { return dense() ? (channels_first ? 1 : c) : c; }
    int64_t pitch_y() const { return dense() ? (channels_first ? w : int64_t(w) * c) : int64_t(halo_w + w + halo_right) * c; }
    int64_t pitch_n() const { return dense() ? int64_t(h) * w * c : pitch_y() * (halo_h + h + halo_bottom); }
    int64_t stride_c() const { return dense() && channels_first ? int64_t(h) * w : 1; }
    int64_t origin() const { return dense() ? 0 : pitch_y() * halo_h + pitch_x() * halo_w; }
    // With room to read over the end; arrays from outside have none.
    int64_t bytes(int n) const { return pitch_n() * n * factor * item() + (external ? 0 : 256); }
    // Bytes from one sample of the batch to the next.
    int64_t sample_bytes() const { return constant ? 0 : pitch_n() * factor * item(); }
};

// Fills what lies around n images, and the slack behind the last one, with the byte of value 0.
void fill_margin(const TensorSpec& t, uint8_t* base, int n);

struct Choice {
    Method method = METHOD_DIRECT;
    int chunk = 0;
};

class Program;

// Memory of one run at one batch size.
struct Context {
    int n = 0;
    Buffer arena;
    std::vector<uint8_t*> base;     // per tensor
    std::vector<Buffer> scratch;    // per thread
    bool intact() const;            // nobody wrote behind them
};

struct Run {
    const Program& program;
    Context& context;
    ThreadPool& pool;
    bool leased;
    int ratio;
    int64_t not_finite = 0;
    ByteView bytes(int tensor) const;
    ConstByteView const_bytes(int tensor) const;
    float* floats(int tensor) const;
    uint8_t* origin(int tensor) const;  // of any tensor's first element
    int samples(int tensor) const;
    void rows(int count, const std::function<void(int, int)>& work);  // rows in a few pieces over the threads
};

class Step {
   public:
    virtual ~Step() = default;
    virtual void run(Run& run) = 0;
    virtual int64_t scratch() const { return 0; }  // bytes per thread, whatever the ratio and the batch
    // Other bias rows, [ratios][outputs], weight shifts and low weights of a layer; no run may be under way. Contexts stay good.
    virtual void renew(std::vector<int32_t> bias, std::vector<uint8_t> weight_shift, std::vector<int8_t> low_weight);
    std::string name, kind;
    std::vector<int> reads, writes;
    std::vector<int> temporaries;  // in the arena during this step only; their margins are the step's own business
    std::vector<int> begins;       // those of `writes` whose margin is to be filled before the step; set by `finish`
};

class ConvStep;

// Guards the list of contexts. Held for moments only, so waiting yields; a holder in another process is one that was
// stopped by a fork in the middle of its work, and what it guarded is then abandoned.
class ForkLock {
   public:
    // True if the lock was taken over from a process that this one was forked from.
    bool lock();
    void unlock() { holder_.store(0, std::memory_order_release); }

   private:
    std::atomic<pid_t> holder_{0};
};

class Program {
   public:
    Program(const std::string& isa, int threads, bool small);
    bool small() const { return small_; }
    ~Program();

    int add_tensor(const TensorSpec& spec);
    // A value that is the same in every run: one sample, copied.
    int add_constant(TensorSpec spec, const void* data);
    void add_step(std::unique_ptr<Step> step);
    ConvStep* add_conv(ConvSpec spec, int src, int dst, int residual, float residual_factor, float lo, float hi, int kind,
                       bool folded);
    void set_external(int tensor, bool external) { tensors_[root(tensor)].external = external; }
    // The tensor is read or written from outside right before step `step` (steps(): after the last): no other may take its
    // place between then and its compiled uses. Before the first run.
    void touch(int tensor, int step) { touched_.emplace_back(root(tensor), step); }
    // The tensor whose memory a tensor shares, itself where it has its own.
    int root(int tensor) const { return tensors_[tensor].alias < 0 ? tensor : tensors_[tensor].alias; }
    // Aliases follow what their tensors point to.
    void place_aliases(Context& context) const;

    // Packs what the choices need; to be called after building and after every change of choices, with no run under way.
    // all: pack what every exact method needs, to try them out.
    void finish(bool all = false);
    // After the last `finish`: gives back the copy of the weights that packing needs.
    void seal();

    // inputs/outputs: (tensor, address) of external tensors. Steps [from, to). Returns the count of NaN and infinities.
    int64_t run(const std::vector<std::pair<int, void*>>& external, int n, int ratio, int from, int to,
                std::vector<double>* seconds);
    // For runs that leave the compiled steps in between: a context to hold on to.
    std::unique_ptr<Context> acquire(int n);
    void release(std::unique_ptr<Context> context);  // throws, and keeps nothing, if a step wrote behind its memory
    int64_t run_in(Context& context, int ratio, int from, int to, std::vector<double>* seconds);

    const TensorSpec& tensor(int t) const { return tensors_[t]; }
    int steps() const { return static_cast<int>(steps_.size()); }
    Step& step(int i) { return *steps_[i]; }
    ConvStep* conv(const std::string& name);
    const Kernels& kernels() const { return *kernels_; }
    const Facts& facts() const { return facts_; }
    int threads() const { return pool_.threads(); }
    int64_t arena_bytes(int n);
    int64_t context_bytes() const { return context_bytes_.load(); }

   private:
    std::vector<int64_t> place(int n, int64_t* total) const;

    bool small_;
    const Kernels* kernels_;
    Facts facts_;
    std::vector<TensorSpec> tensors_;
    std::vector<std::pair<int, Buffer>> constants_;  // tensor and its values
    std::vector<std::pair<int, int>> touched_;
    std::vector<std::unique_ptr<Step>> steps_;
    std::vector<ConvStep*> convs_;
    ThreadPool pool_;
    class Guard;
    ForkLock lock_;
    std::vector<std::unique_ptr<Context>> free_;
    std::atomic<int64_t> context_bytes_{0};
};

// Convolution or linear layer, with the extraction of its input in front.
class ConvStep : public Step {
   public:
    ConvStep(Program& program, ConvSpec spec, int src, int dst, int residual, float residual_factor, float lo, float hi,
             int kind, bool folded);
    void run(Run& run) override;
    int64_t scratch() const override { return scratch_; }
    // With the kernel that is always exact.
    void renew(std::vector<int32_t> bias, std::vector<uint8_t> weight_shift, std::vector<int8_t> low_weight) override;

    ConvLayer& layer() { return layer_; }
    void choose(int ratio, Choice choice);
    Choice choice(int ratio) const { return choices_[ratio]; }
    Choice usual(int ratio) const;  // the deterministic choice, without measurement
    int default_chunk(Method m) const;
    void keep(bool all);
    // Layers of one tap without padding are extracted pixel by pixel inside the kernels. With dynamic shifts these work sample by
    // sample then, which does not pay where samples have few pixels.
    bool extracts_here() const {
        const ConvSpec& c = layer_.spec();
        const TensorSpec& d = program_.tensor(dst_);
        return c.kernel_h == 1 && c.kernel_w == 1 && c.pad_h == 0 && c.pad_w == 0 && c.conv_groups == 1 &&
               (!layer_.dynamic() || d.factor * d.h * d.w >= 24);
    }
    struct Totals {
        std::atomic<int64_t> low{0}, high{0}, multiplications{0}, runs{0};
    };
    Totals totals[kMethods];

   private:
    void set_geometry(const Run& run, ConvArgs& args, int conv_group) const;
    int64_t most_scratch();
    void extract(Run& run, Method m);
    void choose_shifts(Run& run, Method m);
    // Memory of a sample of the batch, for dynamic shifts.
    uint8_t* sample(const Run& run, int n) const {
        return run.context.base[samples_] + n * layer_.sample_layout().bytes;
    }
    void take_sample(const Run& run, ConvArgs& a, Method m, int n, int conv_group) const;
    Program& program_;
    ConvLayer layer_;
    int src_, dst_, residual_, extracted_ = -1, samples_ = -1, kind_;
    float residual_factor_, lo_, hi_;
    bool saturates_;
    std::vector<Choice> choices_;
    int64_t scratch_ = -1;  // for the choices as they are; below 0: they changed and `keep` is due
    std::vector<int32_t> src_taps_, low_taps_;
};

}  // namespace bitdial
