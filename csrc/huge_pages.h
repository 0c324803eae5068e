// Large results live on pages that the system first has to map: with 4 KiB pages that costs several
// times the writing.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "core/common.h"

namespace birl {

// To be called before memory is written for the first time; a hint, and without effect elsewhere.
inline void prefer_huge_pages(void* begin, Index bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr Index kPage = Index{2} << 20;
  if (bytes < 2 * kPage) return;
  const auto from = (reinterpret_cast<std::uintptr_t>(begin) + kPage - 1) / kPage * kPage;
  const auto to = (reinterpret_cast<std::uintptr_t>(begin) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#else
  (void)begin;
  (void)bytes;
#endif
}

}  // namespace birl
