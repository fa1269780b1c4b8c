// Scratch memory that a thread keeps from call to call, as what a task needs is small and wanted again at once.

#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>
#include <new>

namespace bertjax {

class Scratch {
 public:
  Scratch() = default;
  ~Scratch() { std::free(start_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // At least that many bytes, with anything in them. Throws std::bad_alloc.
  template <class T>
  T* Get(size_t bytes) {
    if (bytes > size_) Grow(bytes);
    return static_cast<T*>(start_);
  }

  // Gives back what is more than is worth keeping: a batch's activations may be.
  void Trim() {
    if (size_ > kKept) Release();
  }

 private:
  // Large pages: taking memory in small ones costs as much time as a matrix product that fills it.
  static constexpr size_t kPage = size_t(2) << 20, kKept = size_t(32) << 20;

  void Release() {
    std::free(start_);
    start_ = nullptr;
    size_ = 0;
  }

  void Grow(size_t bytes) {
    Release();
    const size_t size = (bytes + kPage - 1) / kPage * kPage;
    start_ = std::aligned_alloc(kPage, size);
    if (start_ == nullptr) throw std::bad_alloc();
    madvise(start_, size, MADV_HUGEPAGE);
    size_ = size;
  }

  void* start_ = nullptr;
  size_t size_ = 0;
};

}  // namespace bertjax
