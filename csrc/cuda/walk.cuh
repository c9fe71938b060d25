// How a CUDA kernel walks the segments: `blocks` are dealt to the CTAs in runs. A CTA cuts a run into
// stretches (consecutive blocks of one row), lets one thread find out what there is to do with a stretch, and
// does it with all of them: 16 bytes a load of the widest array where everything is aligned, element by
// element elsewhere.
#pragma once

#include "../common.h"

#include <cuda_runtime.h>

namespace sharpkern::cuda {

// Elements of a parameter in one row of `blocks`; schema.py has its twin. A multiple of 16 bytes in every
// dtype, so that each block of a row is aligned as its first one.
constexpr int64_t kBlock = 2048;

// Blocks of a run, at most. Fewer: CTAs keep closer together, and share the work more evenly; more: they ask
// the table less often.
constexpr int64_t kRun = 16;

constexpr int kThreads = 256;
constexpr int kWarp = 32;

// CTAs that are to fit into a multiprocessor: they bound the registers of a thread to 64. Half the threads it
// can hold are enough, at four loads of 16 bytes apiece, to keep more memory in flight than it needs.
constexpr int kResident = 4;
#define SK_KERNEL(resident) __global__ void __launch_bounds__(kThreads, resident)

// First of all in every kernel. From sm_90 on a kernel may start while the one ahead of it in the stream
// still runs (programmatic dependent launch, see launch.h). Here it waits until that one is complete and its
// writes are visible, before it accesses any global memory. Everything is as in order, because
// - whatever is ahead of that one is complete, too: kernels here wait for it before they complete;
// - only a kernel ahead that asks for it (let_next_start) makes one start early: behind any other kernel,
//   copy or event it starts when that is complete; in a CUDA graph, too, along the edge that a capture makes;
// - what is behind and was launched as usual, copies too, starts when this kernel is complete.
__device__ __forceinline__ void wait_for_previous() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// Right behind it, but only in kernels that write no weights: a kernel of another library may load weights
// before its own wait, because no kernel of a forward pass writes them.
__device__ __forceinline__ void let_next_start() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// Columns of the table; schema.py names them.
enum Column : int64_t { kParam, kGrad, kScale, kBackup, kSlot, kNumel, kGroup, kTicket };

// The table, in any memory order, and the blocks of its rows.
struct Segments {
  int64_t* table;
  int64_t row_stride;
  int64_t column_stride;
  const int32_t* blocks;  // [count, 2]: row, and which kBlock elements of it
  int64_t count;

  __device__ __forceinline__ int64_t& cell(int64_t row, Column column) const {
    return table[row * row_stride + column * column_stride];
  }
};

// Consecutive blocks of one row. Only these numbers and what was made of them pass between threads.
struct Stretch {
  Row row;        // its ticket aside
  int64_t index;  // of the row
  int64_t begin;  // first element, in the row
  int64_t size;   // elements
  int64_t blocks;

  __device__ __forceinline__ bool starts_row() const { return begin == 0; }

  template <class T>
  __device__ __forceinline__ T* at(int64_t address) const {
    return reinterpret_cast<T*>(address) + begin;
  }
  // The stretch's place in a flat buffer.
  template <class T>
  __device__ __forceinline__ T* in(T* buffer) const {
    return buffer + (row.slot + begin);
  }
};

// The longest stretch that starts at a block and ends before `last`.
__device__ __forceinline__ Stretch stretch_at(const Segments& segments, int64_t block, int64_t last) {
  Stretch s;
  s.index = segments.blocks[2 * block];
  const int64_t k = segments.blocks[2 * block + 1];
  s.row.param = segments.cell(s.index, kParam);
  s.row.grad = segments.cell(s.index, kGrad);
  s.row.scale = segments.cell(s.index, kScale);
  s.row.backup = segments.cell(s.index, kBackup);
  s.row.slot = segments.cell(s.index, kSlot);
  s.row.numel = segments.cell(s.index, kNumel);
  s.row.group = segments.cell(s.index, kGroup);
  s.row.ticket = 0;
  const int64_t blocks = (s.row.numel + kBlock - 1) / kBlock - k;
  s.blocks = blocks < last - block ? blocks : last - block;
  s.begin = k * kBlock;
  const int64_t end = s.begin + s.blocks * kBlock;
  s.size = (end < s.row.numel ? end : s.row.numel) - s.begin;
  return s;
}

// The end that the runs are dealt from. An op that goes over what a sum just went over begins with its tail,
// which is still in the L2 cache: ascents and rules after the norm of their gradient, project after dots.
// Sums begin at the head, and so do combine, whose direction an ascent reads next, and restore, since a whole
// forward and backward pass came after what it reads was last used.
enum class Order { kForwards, kBackwards };

// prepare(stretch), by one thread, returns a Work; move(work, elements), by all threads, does it. As many
// runs as keep all CTAs equally busy; they are dealt one after the other, so that what CTAs work on at a time
// lies side by side, and what there is nothing to do with is nobody's whole share. A CTA may come back to a
// row. Who has which blocks, and in which order, depends on the numbers of blocks and CTAs alone.
template <class Work, Order kOrder = Order::kForwards, class Prepare, class Move>
__device__ __forceinline__ void walk(const Segments& segments, Prepare&& prepare, Move&& move) {
  // Thread 0's; in shared memory, where it costs no registers.
  struct Cursor {
    int64_t runs;
    int64_t turn;   // the next run's
    int64_t block;  // the next one
    int64_t last;   // of its run
  };
  struct Message {
    Work work;
    int64_t size;  // 0: that was all
  };
  __shared__ Cursor cursor;
  __shared__ Message shared;
  if (threadIdx.x == 0) {
    const int64_t per_round = gridDim.x * kRun;
    cursor = {(segments.count + per_round - 1) / per_round * gridDim.x, blockIdx.x, 0, 0};
  }
  while (true) {
    if (threadIdx.x == 0) {
      if (cursor.block == cursor.last && cursor.turn < cursor.runs) {
        const int64_t run = kOrder == Order::kBackwards ? cursor.runs - 1 - cursor.turn : cursor.turn;
        cursor.block = segments.count * run / cursor.runs;
        cursor.last = segments.count * (run + 1) / cursor.runs;
        cursor.turn += gridDim.x;
      }
      shared.size = 0;
      if (cursor.block < cursor.last) {
        const Stretch stretch = stretch_at(segments, cursor.block, cursor.last);
        shared.size = stretch.size;
        shared.work = prepare(stretch);
        cursor.block += stretch.blocks;
      }
    }
    __syncthreads();
    const Message now = shared;
    __syncthreads();  // the next message may be written
    if (now.size == 0) {
      return;
    }
    move(now.work, now.size);
  }
}

// An address that came as an integer: without this the accesses would be generic ones, and ask what it is.
template <class P>
__device__ __forceinline__ P* global(P* address) {
  __builtin_assume(__isGlobal(address));
  return address;
}

// V neighbouring elements, moved at once. Never more than 16 bytes, which would take two instructions: each
// would touch every other half of a sector.
template <class S, int V>
struct alignas(V * sizeof(S)) Pack {
  static_assert(V * sizeof(S) <= 16);
  S x[V];
};

// What a thread holds of one array: U packs, a whole CTA's packs apart, so that U loads are in flight.
template <class S, int U, int V>
struct Packs {
  Pack<S, V> pack[U];
};

template <int U, int V>
struct Tile {
  static constexpr int kUnroll = U;
  static constexpr int64_t kStep = int64_t(V) * kThreads;

  template <class S>
  static __device__ __forceinline__ Packs<S, U, V> load(const S* address, int64_t i) {
    Packs<S, U, V> packs;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      packs.pack[u] = *global(reinterpret_cast<const Pack<S, V>*>(address + (i + u * kStep)));
    }
    return packs;
  }

  template <class S>
  static __device__ __forceinline__ Packs<S, U, V> zeros() {
    Packs<S, U, V> packs;
    each([&](int u, int v) { packs.pack[u].x[v] = S(0); });
    return packs;
  }

  template <class S>
  static __device__ __forceinline__ void store(S* address, int64_t i, const Packs<S, U, V>& packs) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      *global(reinterpret_cast<Pack<S, V>*>(address + (i + u * kStep))) = packs.pack[u];
    }
  }

  // f(u, v) for every element.
  template <class F>
  static __device__ __forceinline__ void each(F&& f) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        f(u, v);
      }
    }
  }
};

// f(tile, first element of this thread) until all of [0, n) is covered. S: the widest dtype of the arrays,
// whose packs have 16 bytes. U: unrolling, in packs of 16 bytes of T.
template <class T, int U, class S = T, class F>
__device__ __forceinline__ void elements(int64_t n, bool aligned, F&& f) {
  constexpr int V = 16 / sizeof(S);
  int64_t i = 0;
  if (aligned) {
    constexpr int kUnroll = U * sizeof(S) / sizeof(T);
    constexpr int64_t kStep = Tile<kUnroll, V>::kStep * kUnroll;
    for (; i + kStep <= n; i += kStep) {
      f(Tile<kUnroll, V>{}, i + threadIdx.x * V);
    }
    for (int64_t j = i + threadIdx.x * V; j + V <= n; j += Tile<1, V>::kStep) {
      f(Tile<1, V>{}, j);
    }
    i = n / V * V;
  }
  // Rows that are not aligned can be large, too: behind a gradient of odd length in a communication bucket,
  // say.
  for (; i + 4 * kThreads <= n; i += 4 * kThreads) {
    f(Tile<4, 1>{}, i + threadIdx.x);
  }
  for (int64_t j = i + threadIdx.x; j < n; j += kThreads) {
    f(Tile<1, 1>{}, j);
  }
}

// Whether every pointer suits 16-byte loads; null ones do.
template <class... P>
__device__ __forceinline__ bool are_aligned(const P*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) | ...) % 16) == 0;
}

// What a thread holds, rounded to T; as it is where that is its dtype.
template <class T, class W, int U, int V>
__device__ __forceinline__ auto rounded(const Packs<W, U, V>& packs) {
  if constexpr (std::is_same_v<T, W>) {
    return packs;
  } else {
    Packs<T, U, V> narrow;
    Tile<U, V>::each([&](int u, int v) { narrow.pack[u].x[v] = static_cast<T>(packs.pack[u].x[v]); });
    return narrow;
  }
}

// A tile of the weights that a perturbation starts from: those of a master, or of the parameter.
template <class Tile, class T, class W>
__device__ __forceinline__ auto load_weights(Tile tile, const T* w, const W* backup, int64_t i) {
  if constexpr (kIsMaster<T, W>) {
    return tile.load(backup, i);
  } else {
    return tile.load(w, i);
  }
}

// to[0, n) = from[0, n), rounded
template <class T, class W>
__device__ __forceinline__ void copy(T* to, const W* from, int64_t n, bool aligned) {
  constexpr int kUnroll = kIsMaster<T, W> ? 2 : 4;  // as many loads of 16 bytes
  elements<T, kUnroll, W>(
      n, aligned, [&](auto tile, int64_t i) { tile.store(to, i, rounded<T>(tile.load(from, i))); });
}

}  // namespace sharpkern::cuda
