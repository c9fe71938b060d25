// A stand-in for the CUDA runtime that runs kernels on the CPU, for tests where there is no GPU: the sources
// of csrc/cuda compile against it with a plain C++ compiler, unchanged, and serve CPU tensors.
//
// The threads of a block are fibers, which run one at a time in a random order until they meet a barrier or a
// shuffle; there they wait as real threads do. A thread that should have waited and did not reads what
// another one has not written yet. Barriers that not every thread reaches, or that threads reach in different
// places, are errors. Blocks run one after another, in a random order. What it cannot show: memory that
// another block sees late (fences), torn or racing accesses between blocks, and anything about speed.
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>
#include <source_location>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static  // one block at a time
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the fiber that runs.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

using Location = std::source_location;

void barrier(Location where);
// Waits for the lanes in the mask; hands over 8 bytes, returns those of another lane.
uint64_t shuffle(unsigned mask, uint64_t value, unsigned from_lane, Location where);
unsigned lane();
// Runs a kernel; nonzero when its threads got stuck, or one of them did not wait for the kernel ahead before
// it accessed memory in a way that is seen here: of arrays, of what other CTAs write, by atomics.
int run(dim3 grid, dim3 block, bool starts_early, const std::function<void()>& thread);
void wait_for_previous();
void let_next_start();
const char* error();
void touch();
// A thread loads an array's elements from an address, or stores them there: recorded where a test asked for
// it.
void access(const void* address, size_t bytes);

template <class T>
T shuffle_value(unsigned mask, T value, unsigned from_lane, Location where) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  bits = shuffle(mask, bits, from_lane, where);
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulation

inline void __syncthreads(emulation::Location where = emulation::Location::current()) {
  emulation::barrier(where);
}

template <class T>
T __shfl_down_sync(
    unsigned mask, T value, unsigned delta, int = 32,
    emulation::Location where = emulation::Location::current()) {
  const unsigned from = emulation::lane() + delta;
  return emulation::shuffle_value(mask, value, from < 32 ? from : emulation::lane(), where);
}

inline void __threadfence() {}
// The kernels say it of each address right before they access what lies there.
template <class T>
bool __isGlobal(const T* address) {
  emulation::access(address, sizeof(T));
  return true;
}
#define __builtin_assume(condition) (void)(condition)

template <class T>
T __ldcg(const T* p) {
  emulation::touch();
  return *p;
}

template <class T>
T atomicAdd(T* p, T value) {
  emulation::touch();
  const T before = *p;
  *p += value;
  return before;
}

enum cudaError_t { cudaSuccess = 0, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
using cudaStream_t = void*;

inline void cudaGridDependencySynchronize() { emulation::wait_for_previous(); }
inline void cudaTriggerProgrammaticLaunchCompletion() { emulation::let_next_start(); }

struct cudaFuncAttributes {
  int ptxVersion;
};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = 90;
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return emulation::error(); }

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
  const auto thread = [&] { kernel(arguments...); };
  const bool starts_early = config->numAttrs == 1 &&
                            config->attrs->id == cudaLaunchAttributeProgrammaticStreamSerialization &&
                            config->attrs->val.programmaticStreamSerializationAllowed == 1;
  const bool stuck = emulation::run(config->gridDim, config->blockDim, starts_early, thread) != 0;
  return stuck ? cudaErrorLaunchFailure : cudaSuccess;
}

// Kernels register themselves for the device whose tensors they are tested on.
#define CUDA CPU
