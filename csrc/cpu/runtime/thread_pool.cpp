#include "thread_pool.h"

#include <unistd.h>

#include <chrono>
#include <new>

namespace bitdial {

namespace {
// How long a worker looks for the next piece of work before it sleeps. Steps of a network follow each other within
// microseconds; sleeping and waking costs about 5-50 us. Believed, not tuned.
constexpr auto kSpin = std::chrono::microseconds(60);

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}
}  // namespace

// What is to be done is one word: generation, number of tasks, next task. A worker takes a task by adding 1 to it and looks at
// the number of tasks in the same word, so one that wakes up late takes part in what goes on then, or in nothing; and the
// caller waits for tasks, not for workers. A worker that the system does not run costs no time.
struct ThreadPool::Shared {
    static constexpr int kBits = 20;
    static constexpr uint64_t kMask = (uint64_t(1) << kBits) - 1;
    static uint64_t count(uint64_t word) { return word >> kBits & kMask; }
    static uint64_t next(uint64_t word) { return word & kMask; }
    static bool open(uint64_t word) { return next(word) < count(word); }

    std::mutex mutex;
    std::condition_variable wake;
    std::atomic<uint64_t> word{0};
    std::atomic<int> done{0};
    std::atomic<int> asleep{0};
    std::atomic<bool> stopping{false};
    // Written by the caller while no task is open, read by those who hold a task.
    const std::function<void(int, int)>* task = nullptr;

    // Does tasks until none is left to take.
    void help(int thread) {
        while (open(word.load(std::memory_order_acquire))) {
            const uint64_t mine = word.fetch_add(1, std::memory_order_acq_rel);
            if (!open(mine)) return;
            (*task)(static_cast<int>(next(mine)), thread);
            done.fetch_add(1, std::memory_order_release);
        }
    }
};

ThreadPool::ThreadPool(int threads) : threads_(threads) {}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::start() {
    shared_ = new Shared;
    owner_ = getpid();
    try {
        for (int t = 1; t < threads_; t++) workers_.emplace_back(work, shared_, t);
    } catch (...) {
        stop();
        throw;
    }
}

void ThreadPool::stop() {
    if (shared_ == nullptr) return;
    if (owner_ != getpid()) {
        // A fork: the threads are not in this process, and their mutex may be held for ever. Leave both behind.
        for (auto& w : workers_) w.detach();
        workers_.clear();
        shared_ = nullptr;
        return;
    }
    {
        std::lock_guard<std::mutex> lock(shared_->mutex);
        shared_->stopping = true;
    }
    shared_->wake.notify_all();
    for (auto& w : workers_) w.join();
    workers_.clear();
    delete shared_;
    shared_ = nullptr;
}

void ThreadPool::work(Shared* s, int thread) {
    while (!s->stopping.load(std::memory_order_relaxed)) {
        const auto until = std::chrono::steady_clock::now() + kSpin;
        while (!Shared::open(s->word.load(std::memory_order_acquire)) && !s->stopping.load(std::memory_order_relaxed)) {
            for (int i = 0; i < 64; i++) pause();
            if (std::chrono::steady_clock::now() > until) {
                std::unique_lock<std::mutex> lock(s->mutex);
                s->asleep.fetch_add(1);
                s->wake.wait(lock, [&] { return Shared::open(s->word.load()) || s->stopping.load(); });
                s->asleep.fetch_sub(1);
            }
        }
        s->help(thread);
    }
}

void ThreadPool::for_each(int count, bool leased, const std::function<void(int, int)>& task) {
    if (!leased || threads_ == 1 || count <= 1 || workers_.empty() || count > static_cast<int>(Shared::kMask - 2048)) {
        for (int i = 0; i < count; i++) task(i, 0);
        return;
    }
    Shared* s = shared_;
    s->task = &task;
    s->done.store(0, std::memory_order_relaxed);
    const uint64_t generation = (s->word.load(std::memory_order_relaxed) >> (2 * Shared::kBits)) + 1;
    s->word.store(generation << (2 * Shared::kBits) | static_cast<uint64_t>(count) << Shared::kBits);
    if (s->asleep.load() > 0) {
        // A worker that is about to sleep holds the mutex from its last look at the word until it waits.
        { std::lock_guard<std::mutex> lock(s->mutex); }
        s->wake.notify_all();
    }
    s->help(0);
    for (int spins = 0; s->done.load(std::memory_order_acquire) != count; spins++) {
        pause();
        if (spins > 2000) std::this_thread::yield();  // the task's holder may need this processor
    }
}

ThreadPool::Lease::Lease(ThreadPool& pool) : pool_(pool), held_(false) {
    if (pool.threads_ == 1) return;
    const pid_t self = getpid();
    pid_t holder = 0;
    held_ = pool.taken_by_.compare_exchange_strong(holder, self);
    // A holder of another process is one that this process was forked from: it will never give the pool back here.
    if (!held_ && holder != self) held_ = pool.taken_by_.compare_exchange_strong(holder, self);
    if (!held_) return;
    if (pool.owner_ != self) {
        try {
            pool.stop();
            pool.start();
        } catch (...) {  // no more threads to be had: compute alone
            pool.taken_by_.store(0);
            held_ = false;
        }
    }
}

ThreadPool::Lease::~Lease() {
    if (held_) pool_.taken_by_.store(0);
}

}  // namespace bitdial
