#include "program.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <new>
#include <stdexcept>

namespace bitdial {

namespace {

constexpr size_t kKeptContexts = 8;

}  // namespace

// Fills what lies around the images, and the slack behind the last one, with the byte of value 0.
void fill_margin(const TensorSpec& t, uint8_t* base, int n) {
    const int64_t pitch = t.pitch_y();
    for (int i = 0; i < n * t.factor; i++) {
        uint8_t* image = base + i * t.pitch_n();
        std::memset(image, t.zero, size_t(pitch * t.halo_h));
        std::memset(image + pitch * (t.halo_h + t.h), t.zero, size_t(pitch * t.halo_bottom));
        if (t.halo_w || t.halo_right)
            for (int y = 0; y < t.h; y++) {
                uint8_t* row = image + pitch * (t.halo_h + y);
                std::memset(row, t.zero, size_t(t.halo_w) * t.c);
                std::memset(row + int64_t(t.halo_w + t.w) * t.c, t.zero, size_t(t.halo_right) * t.c);
            }
    }
    std::memset(base + n * t.factor * t.pitch_n(), t.zero, 128);
}

bool Context::intact() const {
    return arena.intact() && std::all_of(scratch.begin(), scratch.end(), [](const Buffer& b) { return b.intact(); });
}

ByteView Run::bytes(int tensor) const {
    const TensorSpec& t = program.tensor(tensor);
    return {context.base[tensor] + t.origin(), context.n * t.factor, t.h, t.w, t.c, t.pitch_n(), t.pitch_y(), t.pitch_x()};
}
ConstByteView Run::const_bytes(int tensor) const {
    const ByteView v = bytes(tensor);
    return {v.data, v.n, v.h, v.w, v.c, v.pitch_n, v.pitch_y, v.pitch_x};
}
uint8_t* Run::origin(int tensor) const { return context.base[tensor] + program.tensor(tensor).origin(); }
float* Run::floats(int tensor) const { return reinterpret_cast<float*>(context.base[tensor]); }
int Run::samples(int tensor) const { return context.n * program.tensor(tensor).factor; }

void Run::rows(int count, const std::function<void(int, int)>& work) {
    if (!leased || pool.threads() == 1 || count < 2) {
        work(0, count);
        return;
    }
    const int pieces = std::min(count, pool.threads() * 2);
    pool.for_each(pieces, leased, [&](int i, int) {
        work(static_cast<int>(int64_t(count) * i / pieces), static_cast<int>(int64_t(count) * (i + 1) / pieces));
    });
}

bool ForkLock::lock() {
    const pid_t self = getpid();
    for (;;) {
        pid_t holder = 0;
        if (holder_.compare_exchange_weak(holder, self, std::memory_order_acquire)) return false;
        if (holder != 0 && holder != self && holder_.compare_exchange_strong(holder, self, std::memory_order_acquire)) return true;
        sched_yield();
    }
}

class Program::Guard {
   public:
    explicit Guard(Program& p) : program_(p) {
        if (p.lock_.lock()) new (&p.free_) std::vector<std::unique_ptr<Context>>();  // the old list may be half changed
    }
    ~Guard() { program_.lock_.unlock(); }
    Guard(const Guard&) = delete;
    Guard& operator=(const Guard&) = delete;

   private:
    Program& program_;
};

Program::Program(const std::string& isa, int threads, bool small)
    : small_(small), kernels_(&kernels_of(isa)), facts_(kernels_->facts()), pool_(threads) {
    if (threads < 1 || threads > 1024) throw std::invalid_argument("threads must lie in 1..1024");
}
Program::~Program() = default;

int Program::add_tensor(const TensorSpec& spec) {
    tensors_.push_back(spec);
    return static_cast<int>(tensors_.size()) - 1;
}

int Program::add_constant(TensorSpec spec, const void* data) {
    spec.constant = true;
    const int tensor = add_tensor(spec);
    const int64_t bytes = spec.pitch_n() * spec.item();
    Buffer values(spec.bytes(1));
    std::memcpy(values.data(), data, static_cast<size_t>(bytes));
    constants_.emplace_back(tensor, std::move(values));
    return tensor;
}

void Program::place_aliases(Context& context) const {
    for (size_t t = 0; t < tensors_.size(); t++)
        if (tensors_[t].alias >= 0) context.base[t] = context.base[tensors_[t].alias];
}

void Step::renew(std::vector<int32_t>, std::vector<uint8_t>, std::vector<int8_t>) {
    throw std::invalid_argument("step '" + name + "' is not one layer with weights");
}

void Program::add_step(std::unique_ptr<Step> step) { steps_.push_back(std::move(step)); }

ConvStep* Program::add_conv(ConvSpec spec, int src, int dst, int residual, float residual_factor, float lo, float hi, int kind,
                            bool folded) {
    auto step = std::make_unique<ConvStep>(*this, std::move(spec), src, dst, residual, residual_factor, lo, hi, kind, folded);
    ConvStep* raw = step.get();
    convs_.push_back(raw);
    steps_.push_back(std::move(step));
    return raw;
}

ConvStep* Program::conv(const std::string& name) {
    for (ConvStep* c : convs_)
        if (c->name == name) return c;
    throw std::invalid_argument("no compiled layer is named '" + name + "'");
}

void Program::finish(bool all) {
    for (ConvStep* c : convs_) c->keep(all);
    std::vector<bool> begun(tensors_.size(), false);  // a concatenation fills its output in several steps
    for (auto& step : steps_) {
        step->begins.clear();
        for (int t : step->writes)
            if (!begun[t] && !tensors_[t].dense() && !tensors_[root(t)].external) step->begins.push_back(t);
        for (int t : step->writes) begun[t] = true;
    }
    Guard guard(*this);
    for (auto& c : free_) context_bytes_ -= c->arena.bytes();
    free_.clear();
}

void Program::seal() {
    for (ConvStep* c : convs_) c->layer().seal();
}

// First fit by falling size; two tensors may share bytes when no step needs both.
std::vector<int64_t> Program::place(int n, int64_t* total) const {
    const int count = static_cast<int>(tensors_.size());
    std::vector<int> from(count, 1 << 30), to(count, -1);
    for (int s = 0; s < steps(); s++)
        for (const auto* list : {&steps_[s]->reads, &steps_[s]->writes, &steps_[s]->temporaries})
            for (int any : *list) {
                const int t = root(any);
                from[t] = std::min(from[t], s);
                to[t] = std::max(to[t], s);
            }
    for (const auto& [t, s] : touched_) {
        from[t] = std::min(from[t], s);
        to[t] = std::max(to[t], s);
    }
    std::vector<int> order;
    for (int t = 0; t < count; t++)
        if (to[t] >= 0 && !tensors_[t].external && !tensors_[t].constant) order.push_back(t);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return tensors_[a].bytes(n) > tensors_[b].bytes(n); });
    std::vector<int64_t> offset(count, -1);
    *total = 0;
    std::vector<int> placed;
    for (int t : order) {
        std::vector<std::pair<int64_t, int64_t>> used;
        for (int p : placed)
            if (from[p] <= to[t] && from[t] <= to[p]) used.emplace_back(offset[p], offset[p] + tensors_[p].bytes(n));
        std::sort(used.begin(), used.end());
        int64_t at = 0;
        const int64_t need = (tensors_[t].bytes(n) + 63) / 64 * 64;
        for (const auto& u : used) {
            if (at + need <= u.first) break;
            at = std::max(at, (u.second + 63) / 64 * 64);
        }
        offset[t] = at;
        *total = std::max(*total, at + need);
        placed.push_back(t);
    }
    return offset;
}

int64_t Program::arena_bytes(int n) {
    int64_t total = 0;
    place(n, &total);
    return total;
}

std::unique_ptr<Context> Program::acquire(int n) {
    {
        Guard guard(*this);
        for (auto it = free_.begin(); it != free_.end(); ++it)
            if ((*it)->n == n) {
                auto context = std::move(*it);
                free_.erase(it);
                return context;
            }
    }
    auto context = std::make_unique<Context>();
    context->n = n;
    int64_t total = 0;
    const auto offsets = place(n, &total);
    context->arena = Buffer(total, true);
    context->base.assign(tensors_.size(), nullptr);
    for (size_t t = 0; t < tensors_.size(); t++)
        if (offsets[t] >= 0) context->base[t] = context->arena.data() + offsets[t];
    for (const auto& [tensor, values] : constants_) context->base[tensor] = values.data();
    int64_t scratch = 0;
    for (const auto& s : steps_) scratch = std::max(scratch, s->scratch());
    for (int t = 0; t < pool_.threads(); t++) context->scratch.emplace_back(scratch, true);
    context_bytes_ += context->arena.bytes();
    return context;
}

void Program::release(std::unique_ptr<Context> context) {
    std::unique_ptr<Context> dropped;
    const bool intact = context->intact();
    Guard guard(*this);
    if (!intact) {
        context_bytes_ -= context->arena.bytes();
        throw std::runtime_error("a kernel of the CPU engine wrote behind its memory; this is a fault of bitdial, please report it");
    }
    free_.insert(free_.begin(), std::move(context));
    if (free_.size() > kKeptContexts) {
        dropped = std::move(free_.back());
        free_.pop_back();
        context_bytes_ -= dropped->arena.bytes();
    }
}

int64_t Program::run_in(Context& context, int ratio, int from, int to, std::vector<double>* seconds) {
    place_aliases(context);
    ThreadPool::Lease lease(pool_);
    Run run{*this, context, pool_, lease.held(), ratio};
    using clock = std::chrono::steady_clock;
    for (int s = from; s < to; s++) {
        const auto begin = clock::now();
        Step& step = *steps_[s];
        for (int t : step.begins) fill_margin(tensors_[t], context.base[t], context.n);
        step.run(run);
        if (seconds) (*seconds)[s] += std::chrono::duration<double>(clock::now() - begin).count();
    }
    return run.not_finite;
}

int64_t Program::run(const std::vector<std::pair<int, void*>>& external, int n, int ratio, int from, int to,
                     std::vector<double>* seconds) {
    auto context = acquire(n);
    for (const auto& e : external) context->base[e.first] = static_cast<uint8_t*>(e.second);
    int64_t bad = 0;
    try {
        bad = run_in(*context, ratio, from, to, seconds);
    } catch (...) {  // inputs that a step refuses
        release(std::move(context));
        throw;
    }
    release(std::move(context));
    return bad;
}

}  // namespace bitdial
