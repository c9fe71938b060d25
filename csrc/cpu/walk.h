// How a CPU kernel walks the segments: threads split slot space into chunks, and each piece of a row
// inside a chunk goes to a plain loop that the compiler vectorises once for each instruction set.
#pragma once

#include "../common.h"
#include "../math.h"

#include <cstring>

#if defined(__x86_64__) || defined(_M_X64)
#include <emmintrin.h>
#define SK_X86 1
#endif

// One binary for every x86-64: the loader picks the clone the machine can run.
#if defined(SK_X86) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__)
#define SK_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SK_CLONES
#endif

namespace sharpkern::cpu {

// Elements a kernel computes between two bursts of streaming stores.
constexpr int64_t kBurst = 64;

// From this many bytes a buffer on, what is only written goes around the cache: the line would
// otherwise be read before it is written (+4 bytes an fp32 element) and be gone before its next use.
constexpr int64_t kStreamBytes = int64_t(8) << 20;

// Chunks a thread gets at least: a quarter of a million elements, some 50 us of work. Less is not worth
// waking a thread for, and on a busy machine waiting for it takes far longer than the work.
constexpr int64_t kGrain = 16;

template <class T>
bool stream(const Rows& rows) {
#if defined(SK_X86)
  return rows.extent() * static_cast<int64_t>(sizeof(T)) >= kStreamBytes;
#else
  (void)rows;
  return false;
#endif
}

// f(first element, how many of them) for every burst of a piece.
template <class F>
SK_INLINE void for_bursts(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + kBurst <= n; i += kBurst) {
    f(i, kBurst);
  }
  if (i < n) {
    f(i, n - i);
  }
}

// Half types take their conversions and copies in loops of their own, without a branch: beside arithmetic of
// another width, and where they are copied as they are, the compiler would vectorise nothing.
template <class From, class To>
SK_INLINE void convert(const From* from, To* to, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    if constexpr (std::is_same_v<To, BFloat16> || std::is_same_v<To, Half>) {
      const uint16_t bits = static_cast<To>(from[j]).x;  // one store, whatever the branches of the rounding
      to[j].x = bits;
    } else {
      to[j] = static_cast<To>(from[j]);
    }
  }
}

template <class T>
SK_INLINE void copy(const T* from, T* to, int64_t n) {
  std::memcpy(to, from, n * sizeof(T));
}

// dst[0, kBurst) = burst, around the cache. Both are 16-byte aligned.
template <class T>
SK_INLINE void stream_burst(T* dst, const T* burst) {
#if defined(SK_X86)
  auto* to = reinterpret_cast<__m128i*>(dst);
  const auto* from = reinterpret_cast<const __m128i*>(burst);
  for (int64_t i = 0; i < kBurst * static_cast<int64_t>(sizeof(T)) / 16; ++i) {
    _mm_stream_si128(to + i, _mm_load_si128(from + i));
  }
#else
  std::copy(burst, burst + kBurst, dst);
#endif
}

SK_INLINE void stream_end() {
#if defined(SK_X86)
  _mm_sfence();
#endif
}

template <class T>
SK_INLINE bool streamable(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % 64 == 0;
}

// f(row, offset in the row, slot, length) for every piece of [begin, end) of slot space.
template <class F>
void walk(const Rows& rows, int64_t begin, int64_t end, F&& f) {
  const Row* row =
      std::partition_point(rows.begin(), rows.end(), [&](const Row& r) { return r.slot + r.numel <= begin; });
  for (; row != rows.end() && row->slot < end; ++row) {
    const int64_t first = std::max(begin, row->slot);
    const int64_t last = std::min(end, row->slot + row->numel);
    if (first < last) {
      f(row - rows.begin(), first - row->slot, first, last - first);
    }
  }
}

// Chunks that are walked forwards at a time: a quarter of a million elements, so that memory is read in long
// runs.
constexpr int64_t kRun = 16;

// walk() over the whole of slot space, on torch's threads, each from its last run to its first: the sum over
// the gradient before it went from the first to the last, and has left the last ones in the cache.
template <class F>
void walk_parallel(const Rows& rows, F&& f) {
  const int64_t chunks = (rows.extent() + kChunk - 1) / kChunk;
  torch::stable::parallel_for(0, chunks, 2, [&](int64_t first, int64_t last) {
    for (; last > first; last -= kRun) {
      walk(rows, std::max(first, last - kRun) * kChunk, last * kChunk, f);
    }
  });
}

// w = the weights that a backup has.
template <class T, class W>
SK_CLONES void put_back(T* w, const W* backup, int64_t n) {
  if constexpr (std::is_same_v<T, W>) {
    std::copy(backup, backup + n, w);
  } else {
    convert(backup, w, n);
  }
}

template <class T>
T* at(int64_t address, int64_t offset) {
  return reinterpret_cast<T*>(address) + offset;
}

}  // namespace sharpkern::cpu
