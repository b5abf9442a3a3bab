// What csrc/cuda/device.h needs to compile kernels with a plain C++ compiler and to execute them on the CPU. README.md
// explains how; emulator.cpp is the other half. Tests only.
//
// Every CUDA thread is a fiber of the one calling OS thread. Fibers switch only inside the functions below that wait
// for other threads, and each of those remembers where it was called, for the message of a failure.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <tuple>
#include <type_traits>

#define MOS_EMULATOR_HIDDEN __attribute__((visibility("hidden")))

namespace emulator {

// Where a wrapper was called: the default argument of each.
struct Site {
  const char* file;
  int line;
};
constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }

// The built-in variables of the running thread.
struct Thread {
  uint3 index, block_index;
  unsigned lane, warp;
};
extern MOS_EMULATOR_HIDDEN Thread* current;
extern MOS_EMULATOR_HIDDEN dim3 block_size, grid_size;

// Ends the launch with this message, prefixed with the running thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---------------------------------------------------------------------------------------------- rendezvous

// Returns whether any thread's predicate was true.
bool block_barrier(bool predicate, Site site);
void warp_barrier(unsigned mask, Site site);
unsigned ballot(unsigned mask, bool predicate, Site site);
// The value of lane `source`.
uint64_t shuffle(unsigned mask, uint64_t value, unsigned source, Site site);

template <class T>
T shuffle_as(unsigned mask, T value, unsigned source, Site site) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>, "cannot be shuffled");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(mask, bits, source, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// ---------------------------------------------------------------------------------------------- memory

// The block's shared memory: as many bytes as the launch asked for, aligned to `align` bytes and no more.
unsigned char* dynamic_shared(size_t align, Site site = here());
uint32_t shared_address(const void* p, Site site = here());

void cp_async_16(uint32_t target, const void* source, int bytes, Site site = here());
void cp_async_commit();
void wait_for_copies(unsigned pending);
template <int kPending>
void cp_async_wait() {
  wait_for_copies(kPending);
}

[[noreturn]] void misaligned(const char* what, const void* p, Site site);
inline void check_alignment(const char* what, const void* p, Site site) {
  if (reinterpret_cast<uintptr_t>(p) % 16) misaligned(what, p, site);
}
// Plain accesses in the kernel's own translation unit, so that the sanitizers see them.
inline uint4 load_16(const void* p, Site site = here()) {
  check_alignment("load_16", p, site);
  return *static_cast<const uint4*>(p);
}
inline void store_16(void* p, uint4 value, Site site = here()) {
  check_alignment("store_16", p, site);
  *static_cast<uint4*>(p) = value;
}

// ---------------------------------------------------------------------------------------------- matrices

void ldmatrix_x4(uint32_t (&r)[4], uint32_t address, Site site = here());
void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address, Site site = here());
void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = here());
void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = here());
void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = here());

// cvt.rna.tf32.f32: to the nearest, ties away from zero. NaN stays NaN.
inline uint32_t round_to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const bool finite = (bits & 0x7F800000u) != 0x7F800000u;
  return finite ? (bits + 0x1000u) & 0xFFFFE000u : x != x ? 0x7FFFFFFFu : bits;
}

// ---------------------------------------------------------------------------------------------- launches

void wait_for_launch_before(Site site = here());
void let_next_launch_start(Site site = here());

[[noreturn]] inline void trap(Site site = here()) { fail("trap at %s:%d", site.file, site.line); }

// Executes body(arguments) once for every thread of the grid, at once or in synchronize(), as the option `early` wants;
// what went wrong is emulator_last_error().
cudaError_t execute(void (*body)(void*), std::shared_ptr<void> arguments, dim3 grid, dim3 block, size_t shared_bytes,
                    bool early);
cudaError_t synchronize();

struct KernelState {};

// `shared` is a SharedBytes of device.h.
template <class... P, class Shared>
cudaError_t start_kernel(KernelState&, void (*kernel)(P...), dim3 grid, dim3 block, Shared shared, bool early,
                         cudaStream_t, P... p) {
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> parameters;
  };
  const auto body = [](void* arguments) {
    Call* c = static_cast<Call*>(arguments);
    std::apply(c->kernel, c->parameters);
  };
  return execute(body, std::shared_ptr<Call>(new Call{kernel, {p...}}), grid, block, shared.bytes, early);
}

}  // namespace emulator

// ---------------------------------------------------------------------------------------------- the language

#define threadIdx (::emulator::current->index)
#define blockIdx (::emulator::current->block_index)
#define blockDim (::emulator::block_size)
#define gridDim (::emulator::grid_size)
#define __shared__ static_assert(false, "kernels use MOS_DYNAMIC_SHARED (csrc/cuda/device.h)");

inline void __syncthreads(emulator::Site site = emulator::here()) { emulator::block_barrier(false, site); }
inline int __syncthreads_or(int predicate, emulator::Site site = emulator::here()) {
  return emulator::block_barrier(predicate != 0, site);
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, emulator::Site site = emulator::here()) {
  emulator::warp_barrier(mask, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, emulator::Site site = emulator::here()) {
  return emulator::ballot(mask, predicate != 0, site);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, emulator::Site site = emulator::here()) {
  return emulator::shuffle_as(mask, value, static_cast<unsigned>(source) % 32, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other, emulator::Site site = emulator::here()) {
  return emulator::shuffle_as(mask, value, (emulator::current->lane ^ static_cast<unsigned>(other)) % 32, site);
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
