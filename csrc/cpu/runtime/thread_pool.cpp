#include "thread_pool.h"

#include <unistd.h>

#include <chrono>
#include <new>

namespace flexiq {

namespace {
// How long a worker looks for the next piece of work before it sleeps. Steps of a network follow each other within
// microseconds; sleeping and waking costs about 5-50 us. Believed, not tuned.
constexpr auto kSpin = std::chrono::microseconds(60);

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}
}  // namespace

struct ThreadPool::Shared {
    std::mutex mutex;
    std::condition_variable wake;
    std::atomic<uint64_t> generation{0};
    std::atomic<int> next{0};
    std::atomic<int> finished{0};
    std::atomic<bool> stopping{false};
    const std::function<void(int, int)>* task = nullptr;
    int count = 0;
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
    uint64_t seen = 0;
    for (;;) {
        const auto until = std::chrono::steady_clock::now() + kSpin;
        while (s->generation.load(std::memory_order_acquire) == seen && !s->stopping.load(std::memory_order_relaxed)) {
            for (int i = 0; i < 64; i++) pause();
            if (std::chrono::steady_clock::now() > until) {
                std::unique_lock<std::mutex> lock(s->mutex);
                s->wake.wait(lock, [&] { return s->generation.load() != seen || s->stopping.load(); });
            }
        }
        if (s->stopping.load()) return;
        seen = s->generation.load(std::memory_order_acquire);
        for (int i; (i = s->next.fetch_add(1)) < s->count;) (*s->task)(i, thread);
        s->finished.fetch_add(1, std::memory_order_release);
    }
}

void ThreadPool::for_each(int count, bool leased, const std::function<void(int, int)>& task) {
    if (!leased || threads_ == 1 || count <= 1 || workers_.empty()) {
        for (int i = 0; i < count; i++) task(i, 0);
        return;
    }
    Shared* s = shared_;
    s->task = &task;
    s->count = count;
    s->next.store(0);
    s->finished.store(0);
    {
        std::lock_guard<std::mutex> lock(s->mutex);
        s->generation.fetch_add(1, std::memory_order_release);
    }
    s->wake.notify_all();
    for (int i; (i = s->next.fetch_add(1)) < count;) task(i, 0);
    while (s->finished.load(std::memory_order_acquire) != static_cast<int>(workers_.size())) pause();
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

}  // namespace flexiq
