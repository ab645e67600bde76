// A mutex that a forked process finds unlocked: forks wait until no thread is inside. Without it a child inherits the lock
// of a thread that it does not have, and waits for ever. Meant for a few short critical sections.
#pragma once
#include <pthread.h>

#include <algorithm>
#include <mutex>
#include <vector>

namespace flexiq {

class ForkSafeMutex {
   public:
    ForkSafeMutex() {
        std::lock_guard<std::mutex> lock(registry().mutex);
        registry().all.push_back(this);
    }
    ~ForkSafeMutex() {
        std::lock_guard<std::mutex> lock(registry().mutex);
        auto& all = registry().all;
        all.erase(std::find(all.begin(), all.end(), this));
    }
    ForkSafeMutex(const ForkSafeMutex&) = delete;
    ForkSafeMutex& operator=(const ForkSafeMutex&) = delete;
    void lock() { mutex_.lock(); }
    void unlock() { mutex_.unlock(); }

   private:
    struct Registry {
        std::mutex mutex;
        std::vector<ForkSafeMutex*> all;
        Registry() {
            pthread_atfork([] { registry().lock_all(); }, [] { registry().unlock_all(); }, [] { registry().unlock_all(); });
        }
        void lock_all() {
            mutex.lock();
            for (ForkSafeMutex* m : all) m->lock();
        }
        void unlock_all() {
            for (ForkSafeMutex* m : all) m->unlock();
            mutex.unlock();
        }
    };
    static Registry& registry() {
        static Registry* one = new Registry;  // never destroyed: forks may come at any time
        return *one;
    }
    std::mutex mutex_;
};

}  // namespace flexiq
