// Aligned memory that knows its size, and whether somebody wrote behind it.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define BITDIAL_ADDRESS_SANITIZER
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define BITDIAL_ADDRESS_SANITIZER
#endif
#endif
#ifdef BITDIAL_ADDRESS_SANITIZER
#include <sanitizer/asan_interface.h>
#endif

namespace bitdial {

// In builds with the address sanitizer, touching forbidden memory is an error.
inline void forbid(uint8_t* memory, int64_t bytes) {
#ifdef BITDIAL_ADDRESS_SANITIZER
    ASAN_POISON_MEMORY_REGION(memory, static_cast<size_t>(bytes));
#else
    static_cast<void>(memory), static_cast<void>(bytes);
#endif
}
inline void allow(uint8_t* memory, int64_t bytes) {
#ifdef BITDIAL_ADDRESS_SANITIZER
    ASAN_UNPOISON_MEMORY_REGION(memory, static_cast<size_t>(bytes));
#else
    static_cast<void>(memory), static_cast<void>(bytes);
#endif
}

// Memory that is forbidden for as long as this lives.
class Forbidden {
   public:
    Forbidden(uint8_t* memory, int64_t bytes) : memory_(memory), bytes_(bytes) { forbid(memory_, bytes_); }
    ~Forbidden() { allow(memory_, bytes_); }
    Forbidden(const Forbidden&) = delete;
    Forbidden& operator=(const Forbidden&) = delete;

   private:
    uint8_t* memory_;
    int64_t bytes_;
};

class Buffer {
   public:
    Buffer() = default;
    // guarded: bytes of a known value lie behind it, in every build; `intact` tells whether they still have it.
    explicit Buffer(int64_t bytes, bool guarded = false) {
        if (bytes <= 0) return;
        // Huge pages where they are to be had: weights are streamed, and misses of the address cache cost time.
        const int64_t align = bytes >= (1 << 21) ? (1 << 21) : 64;
        guard_ = guarded ? 256 : 0;
        room_ = (bytes + guard_ + align - 1) / align * align;
        data_ = static_cast<uint8_t*>(std::aligned_alloc(static_cast<size_t>(align), static_cast<size_t>(room_)));
        if (!data_) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
        if (align > 64) madvise(data_, static_cast<size_t>(room_), MADV_HUGEPAGE);
#endif
        bytes_ = bytes;
        std::memset(data_, 0, static_cast<size_t>(bytes_));
        std::memset(data_ + bytes_, kGuardByte, static_cast<size_t>(guard_));
        forbid(data_ + bytes_, room_ - bytes_);
    }
    ~Buffer() {
        if (data_) allow(data_ + bytes_, room_ - bytes_);
        std::free(data_);
    }
    Buffer(Buffer&& other) noexcept { swap(other); }
    Buffer& operator=(Buffer&& other) noexcept {
        swap(other);
        return *this;
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    void swap(Buffer& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(bytes_, other.bytes_);
        std::swap(guard_, other.guard_);
        std::swap(room_, other.room_);
    }
    uint8_t* data() const { return data_; }
    int64_t bytes() const { return bytes_; }
    bool intact() const {
#ifndef BITDIAL_ADDRESS_SANITIZER
        for (int64_t i = 0; i < guard_; i++)
            if (data_[bytes_ + i] != kGuardByte) return false;
#endif
        return true;
    }

   private:
    static constexpr uint8_t kGuardByte = 0xC3;
    uint8_t* data_ = nullptr;
    int64_t bytes_ = 0, guard_ = 0, room_ = 0;
};

}  // namespace bitdial
