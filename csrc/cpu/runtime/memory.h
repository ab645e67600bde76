// Aligned memory that knows its size.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace bitdial {

class Buffer {
   public:
    Buffer() = default;
    explicit Buffer(int64_t bytes) {
        if (bytes <= 0) return;
        // Huge pages where they are to be had: weights are streamed, and misses of the address cache cost time.
        const int64_t align = bytes >= (1 << 21) ? (1 << 21) : 64;
        const int64_t rounded = (bytes + align - 1) / align * align;
        data_ = static_cast<uint8_t*>(std::aligned_alloc(static_cast<size_t>(align), static_cast<size_t>(rounded)));
        if (!data_) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
        if (align > 64) madvise(data_, static_cast<size_t>(rounded), MADV_HUGEPAGE);
#endif
        std::memset(data_, 0, static_cast<size_t>(rounded));
        bytes_ = bytes;
    }
    ~Buffer() { std::free(data_); }
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
    }
    uint8_t* data() const { return data_; }
    int64_t bytes() const { return bytes_; }

   private:
    uint8_t* data_ = nullptr;
    int64_t bytes_ = 0;
};

}  // namespace bitdial
