// The scheduler behind cuda_runtime.h, and the calls into torch that a torch without CUDA lacks.
#include "cuda_runtime.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <string>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

// Not a power of two: the tops of the stacks would share a few sets of the cache.
constexpr size_t kStack = (128 << 10) + 17 * 64;
constexpr unsigned kWarp = 32;

enum class State { kReady, kBarrier, kShuffle, kDone };

// Where to go on: frame, place in the code and stack, kept by the compiler's own setjmp. Unlike swapcontext
// it makes no system call, and unlike the C library's it takes a few instructions.
using Place = void* [5];

// A thread of a block, and of every block after it: system calls to start one would take longer than most
// kernels.
struct Fiber {
  ucontext_t context;  // to start on its stack
  Place at;            // to go on
  bool started = false;
  bool waited = false;  // for the kernel ahead
  State state = State::kReady;
  emulation::Location where;
  unsigned mask = 0;
  uint64_t value = 0;  // that it brings to a shuffle
  uint64_t shown =
      0;  // that the others of the last shuffle see: nobody is at the next one before all have read it
};

std::vector<Fiber> fibers;
char* stacks = nullptr;
Place scheduler;
unsigned current = 0;
const std::function<void()>* body = nullptr;
std::string message;

std::mt19937 random_order;
int launches = 0;
bool early = false;  // a thread did not wait for the kernel ahead before it accessed memory, or at all
bool started_early = false;  // the last launch may
bool triggered = false;      // a thread of it let the next one do so
int multiprocessors = 3;

struct Access {
  int64_t block, thread, address, bytes;
};
bool recording = false;
std::vector<Access> accesses;

// Not in the function that kept the place.
[[noreturn, gnu::noinline]] void go_on(Place& place) { __builtin_longjmp(place, 1); }

// Back to the scheduler, until it resumes this fiber.
[[gnu::noinline]] void leave(State state) {
  fibers[current].state = state;
  if (__builtin_setjmp(fibers[current].at) == 0) {
    go_on(scheduler);
  }
}

void enter() {
  while (true) {
    (*body)();
    early = early || !fibers[current].waited;
    leave(State::kDone);
  }
}

void wait(State state, emulation::Location where) {
  fibers[current].where = where;
  leave(state);
}

[[noreturn, gnu::noinline]] void start(unsigned i) {
  Fiber& fiber = fibers[i];
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stacks + i * kStack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter, 0);
  setcontext(&fiber.context);
  std::abort();
}

[[gnu::noinline]] void resume(unsigned i) {
  current = i;
  threadIdx = dim3(i);
  if (__builtin_setjmp(scheduler) == 0) {
    if (fibers[i].started) {
      go_on(fibers[i].at);
    }
    start(i);
  }
}

std::string describe(unsigned i) {
  const Fiber& fiber = fibers[i];
  std::string text = "thread " + std::to_string(i);
  switch (fiber.state) {
    case State::kReady:
      return text + " is ready";
    case State::kDone:
      return text + " is through";
    default:
      return text +
             (fiber.state == State::kBarrier ? " waits at the barrier in line "
                                             : " waits at the shuffle in line ") +
             std::to_string(fiber.where.line()) + " of " + fiber.where.file_name();
  }
}

bool same_place(const Fiber& a, const Fiber& b) {
  return a.state == b.state && a.where.line() == b.where.line() && a.where.column() == b.where.column();
}

// Lets go who need not wait any longer; false when nobody may.
bool release() {
  bool any = false;
  for (unsigned first = 0; first < fibers.size(); first += kWarp) {
    const unsigned end = std::min<unsigned>(first + kWarp, fibers.size());
    for (unsigned i = first; i < end; ++i) {
      if (fibers[i].state != State::kShuffle) {
        continue;
      }
      bool together = true;
      for (unsigned j = first; j < end; ++j) {
        if (fibers[i].mask >> (j - first) & 1) {
          together = together && same_place(fibers[i], fibers[j]) && fibers[i].mask == fibers[j].mask;
        }
      }
      if (together) {
        const unsigned mask = fibers[i].mask;
        for (unsigned j = first; j < end; ++j) {
          if (mask >> (j - first) & 1) {
            fibers[j].state = State::kReady;
            fibers[j].shown = fibers[j].value;
          }
        }
        any = true;
      }
    }
  }
  if (any) {
    return true;
  }
  for (const Fiber& fiber : fibers) {
    if (fiber.state != State::kBarrier || !same_place(fiber, fibers[0])) {
      return false;
    }
  }
  for (Fiber& fiber : fibers) {
    fiber.state = State::kReady;
  }
  return true;
}

bool run_block(std::vector<unsigned>& order) {
  for (Fiber& fiber : fibers) {
    fiber.waited = false;
    fiber.state = State::kReady;
  }
  while (true) {
    std::shuffle(order.begin(), order.end(), random_order);
    for (const unsigned i : order) {
      if (fibers[i].state == State::kReady) {
        resume(i);
      }
    }
    const auto done = [](const Fiber& fiber) { return fiber.state == State::kDone; };
    if (std::all_of(fibers.begin(), fibers.end(), done)) {
      return true;
    }
    if (!release()) {
      return false;
    }
  }
}

}  // namespace

namespace emulation {

unsigned lane() { return threadIdx.x % kWarp; }

void barrier(Location where) { wait(State::kBarrier, where); }

uint64_t shuffle(unsigned mask, uint64_t value, unsigned from_lane, Location where) {
  const unsigned warp = threadIdx.x - lane();
  fibers[current].mask = mask;
  fibers[current].value = value;
  wait(State::kShuffle, where);
  return fibers[warp + from_lane].shown;
}

void wait_for_previous() { fibers[current].waited = true; }

void let_next_start() { triggered = true; }

void touch() { early = early || !fibers[current].waited; }

void access(const void* address, size_t bytes) {
  touch();
  if (recording) {
    const auto number = reinterpret_cast<int64_t>(address);
    accesses.push_back({blockIdx.x, threadIdx.x, number, static_cast<int64_t>(bytes)});
  }
}

int run(dim3 grid, dim3 block, bool starts_early, const std::function<void()>& thread) {
  ++launches;
  if (grid.x == 0 || block.x == 0 || block.x % kWarp != 0 || grid.y * grid.z * block.y * block.z != 1) {
    message = "invalid configuration";
    return 1;
  }
  if (fibers.size() != block.x) {
    munmap(stacks, fibers.size() * kStack);
    stacks = static_cast<char*>(
        mmap(nullptr, block.x * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (stacks == MAP_FAILED) {
      message = "no memory for stacks";
      return 1;
    }
    fibers = std::vector<Fiber>(block.x);
  }
  body = &thread;
  early = triggered = false;
  started_early = starts_early;
  gridDim = grid;
  blockDim = block;
  std::vector<unsigned> blocks(grid.x);
  std::iota(blocks.begin(), blocks.end(), 0u);
  std::shuffle(blocks.begin(), blocks.end(), random_order);
  std::vector<unsigned> order(block.x);
  std::iota(order.begin(), order.end(), 0u);
  for (const unsigned b : blocks) {
    blockIdx = dim3(b);
    if (!run_block(order)) {
      message = "block " + std::to_string(b) + " is stuck: " + describe(0);
      for (unsigned i = 1; i < fibers.size(); ++i) {
        if (!same_place(fibers[i], fibers[0])) {
          message += ", " + describe(i);
          break;
        }
      }
      for (Fiber& fiber : fibers) {
        fiber.started = false;  // it hangs in this kernel
      }
      return 1;
    }
  }
  if (early) {
    message = "a thread does not wait for the kernel ahead";
    return 1;
  }
  return 0;
}

const char* error() { return message.c_str(); }

}  // namespace emulation

cudaError_t cudaSetDevice(int) { return cudaSuccess; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = multiprocessors;
  return cudaSuccess;
}

// For the tests: the order of threads and blocks, and the size of the device.
extern "C" void emulation_configure(unsigned seed, int count) {
  random_order.seed(seed);
  multiprocessors = count;
}

// Starts a new record, or ends it; how many accesses it has.
extern "C" int64_t emulation_record(bool on) {
  recording = on;
  if (on) {
    accesses.clear();
  }
  return static_cast<int64_t>(accesses.size());
}

extern "C" const int64_t* emulation_accesses() { return &accesses.data()->block; }

extern "C" int emulation_launches() { return launches; }

// Of the last launch: 1 where it may start before the one ahead is complete, 2 more where it lets the next
// one.
extern "C" int emulation_overlap() { return int{started_early} + 2 * int{triggered}; }

extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

extern "C" int32_t aoti_torch_create_device_guard(int32_t, void** guard) {
  *guard = nullptr;
  return 0;
}

extern "C" int32_t aoti_torch_delete_device_guard(void*) { return 0; }
