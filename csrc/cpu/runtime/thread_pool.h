// Worker threads of one engine. The caller works too: a pool of `threads` has threads - 1 workers.
#pragma once
#include <sys/types.h>

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace bitdial {

class ThreadPool {
   public:
    explicit ThreadPool(int threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int threads() const { return threads_; }

    // task(index, thread) for every index in 0 .. count - 1, thread in 0 .. threads - 1; returns when all are done. Only
    // the holder of a Lease may call it; without one (`leased` false) everything runs on the calling thread as thread 0.
    void for_each(int count, bool leased, const std::function<void(int, int)>& task);

    // The workers serve one run at a time. A run that finds them taken computes alone instead of waiting. In a process
    // forked from the one that made the pool there are no workers; they are started again by the first lease.
    class Lease {
       public:
        explicit Lease(ThreadPool& pool);
        ~Lease();
        Lease(const Lease&) = delete;
        Lease& operator=(const Lease&) = delete;
        bool held() const { return held_; }

       private:
        ThreadPool& pool_;
        bool held_;
    };

   private:
    struct Shared;
    void start();
    void stop();
    static void work(Shared* shared, int thread);

    int threads_;
    pid_t owner_ = 0;  // process that the workers live in; read and written under a lease
    std::atomic<pid_t> taken_by_{0};  // process of the run that holds the workers
    Shared* shared_ = nullptr;
    std::vector<std::thread> workers_;
};

}  // namespace bitdial
