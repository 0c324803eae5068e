// Large results live on pages that the system first has to map: with 4 KiB pages that costs several
// times the writing.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <new>

#include "core/common.h"

namespace birl {

// To be called before memory is written for the first time; a hint, and without effect elsewhere.
inline void prefer_huge_pages(void* begin, Index bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr Index kPage = Index{2} << 20;
  if (bytes < kPage) return;
  const auto from = (reinterpret_cast<std::uintptr_t>(begin) + kPage - 1) / kPage * kPage;
  const auto to = (reinterpret_cast<std::uintptr_t>(begin) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#else
  (void)begin;
  (void)bytes;
#endif
}

// Uninitialised scratch: of whole huge pages where it is large, because a fresh small page costs a
// fault of microseconds.
template <class T>
class ScratchArray {
 public:
  explicit ScratchArray(Index count) {
    constexpr Index kPage = Index{2} << 20;
    Index bytes = count * static_cast<Index>(sizeof(T));
    const bool large = bytes >= kPage / 2;
    if (large) bytes = (bytes + kPage - 1) / kPage * kPage;
    alignment_ = std::align_val_t{static_cast<std::size_t>(large ? kPage : 64)};
    data_ = static_cast<T*>(::operator new(static_cast<std::size_t>(bytes), alignment_));
    if (large) prefer_huge_pages(data_, bytes);
  }
  ~ScratchArray() { ::operator delete(data_, alignment_); }
  ScratchArray(const ScratchArray&) = delete;
  ScratchArray& operator=(const ScratchArray&) = delete;

  T* get() const { return data_; }

 private:
  std::align_val_t alignment_;
  T* data_;
};

}  // namespace birl
