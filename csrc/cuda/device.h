// Everything a kernel needs beyond plain C++: PTX instructions, shared memory, launches. The only file that knows there
// are two machines below it: nvcc's, and the one that executes the same kernels on a CPU in CI (tests/cuda_emulator).
// Kernels use nothing of CUDA that is not declared here, or in both (threadIdx, __syncthreads, __ballot_sync, ...).
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>

#include "../common/numeric.h"
#include "launch.h"

namespace mos::cuda {

// Dynamic shared memory: of a launch, and the most that any launch of its kernel asks for.
struct SharedBytes {
  int bytes = 0, most = 0;
};

}  // namespace mos::cuda

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define MOS_DEVICE __device__ __forceinline__
// The block's dynamic shared memory.
#define MOS_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

namespace mos::cuda {

MOS_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// 16 bytes from global to shared memory, past L1 and registers; only the first `bytes` (0 or 16) are read, the rest is
// zero. In flight until the copying thread waits for its group.
MOS_DEVICE void cp_async_16(uint32_t target, const void* source, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(target), "l"(source), "r"(bytes) : "memory");
}
MOS_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Returns when all but the kPending youngest groups of this thread have landed.
template <int kPending>
MOS_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane i brings the address of row i % 8 of matrix i / 8.
MOS_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
MOS_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

#define MOS_MMA(name, shape, type)                                                      \
  MOS_DEVICE void name(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type                \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"         \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));   \
  }
MOS_MMA(mma_bf16, "m16n8k16", "bf16")
MOS_MMA(mma_f16, "m16n8k16", "f16")
MOS_MMA(mma_tf32, "m16n8k8", "tf32")
#undef MOS_MMA

MOS_DEVICE uint32_t round_to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(x));
  return bits;
}

// Two floats rounded to 16 bits each, the first in the lower half.
template <class E>
MOS_DEVICE uint32_t pack(float low, float high);
template <>
MOS_DEVICE uint32_t pack<bf16_t>(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
template <>
MOS_DEVICE uint32_t pack<f16_t>(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
MOS_DEVICE float to_float(bf16_t x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
MOS_DEVICE float to_float(f16_t x) { return __half2float(__ushort_as_half(x.bits)); }

// Of a word of two halves: the sign of each all over it.
MOS_DEVICE uint32_t spread_signs(uint32_t x) {
  uint32_t out;
  asm("prmt.b32 %0, %1, 0, 0xBB99;\n" : "=r"(out) : "r"(x));
  return out;
}
// Of the lower two bytes of a word, or the upper two: the sign of each all over a half.
MOS_DEVICE uint32_t twice_signs_low(uint32_t x) {
  uint32_t out;
  asm("prmt.b32 %0, %1, 0, 0x9988;\n" : "=r"(out) : "r"(x));
  return out;
}
MOS_DEVICE uint32_t twice_signs_high(uint32_t x) {
  uint32_t out;
  asm("prmt.b32 %0, %1, 0, 0xBBAA;\n" : "=r"(out) : "r"(x));
  return out;
}
// Bytes 1 and 3 of two words.
MOS_DEVICE uint32_t odd_bytes(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7531); }

// Programmatic dependent launch, from compute capability 9.0 on. A kernel that was launched early (launch.h) runs
// beside the one before it, up to here: returns when that, and what it had waited for, is complete and visible.
MOS_DEVICE void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}
// Lets the next launch start, if it was launched early, once every block of this one has come here. Only after a
// kernel's own wait: the next one's prologue may read what any launch before this one has written.
MOS_DEVICE void let_next_launch_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n");
#endif
}

// Aligned vectors of 16 bytes, global or shared.
MOS_DEVICE uint4 load_16(const void* p) { return *static_cast<const uint4*>(p); }
MOS_DEVICE void store_16(void* p, uint4 v) { *static_cast<uint4*>(p) = v; }

// Stops the kernel; the next synchronisation of the stream reports an error.
MOS_DEVICE void trap() { __trap(); }

// What a kernel was found to be, once for each device: a bit for each of the first 64; on others it is asked every
// time.
struct KernelState {
  std::atomic<uint64_t> known{0};
  std::atomic<uint64_t> early{0};  // its code waits (wait_for_launch_before), so it may be launched early
};

// Looks at a kernel on the current device, and allows it more than the 48 KiB of shared memory that all may have.
template <class Kernel>
cudaError_t look_at(KernelState& state, Kernel kernel, int most_shared_bytes, bool& early) {
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  early = state.early.load(std::memory_order_relaxed) & bit;
  if (state.known.load(std::memory_order_acquire) & bit) return cudaSuccess;
  const void* function = reinterpret_cast<const void*>(kernel);
  // Not the device's capability: a new GPU may run what was compiled from the PTX of an old one, which has no wait.
  cudaFuncAttributes attributes;
  if (const cudaError_t error = cudaFuncGetAttributes(&attributes, function)) return error;
  early = attributes.ptxVersion >= 90;
  if (most_shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared_bytes);
    if (error != cudaSuccess) return error;
  }
  if (early) state.early.fetch_or(bit, std::memory_order_relaxed);
  state.known.fetch_or(bit, std::memory_order_release);
  return cudaSuccess;
}

template <class... P>
cudaError_t start_kernel(KernelState& state, void (*kernel)(P...), dim3 grid, dim3 block, SharedBytes shared,
                         bool early, cudaStream_t stream, P... p) {
  bool able = false;
  if (const cudaError_t error = look_at(state, kernel, shared.most, able)) return error;
  cudaLaunchAttribute programmatic;
  programmatic.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  programmatic.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<size_t>(shared.bytes);
  config.stream = stream;
  config.attrs = &programmatic;
  config.numAttrs = early && able ? 1 : 0;
  void* arguments[] = {&p...};
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments);
}

}  // namespace mos::cuda

#else

#include "cuda_emulator.h"

#define MOS_DEVICE inline
#define MOS_DYNAMIC_SHARED(name) unsigned char* name = emulator::dynamic_shared(128)

namespace mos::cuda {

using emulator::cp_async_16;
using emulator::cp_async_commit;
using emulator::cp_async_wait;
using emulator::KernelState;
using emulator::ldmatrix_x4;
using emulator::ldmatrix_x4_trans;
using emulator::let_next_launch_start;
using emulator::load_16;
using emulator::mma_bf16;
using emulator::mma_f16;
using emulator::mma_tf32;
using emulator::round_to_tf32;
using emulator::shared_address;
using emulator::start_kernel;
using emulator::store_16;
using emulator::trap;
using emulator::wait_for_launch_before;

template <class E>
MOS_DEVICE uint32_t pack(float low, float high) {
  return static_cast<uint32_t>(E::round(low).bits) | static_cast<uint32_t>(E::round(high).bits) << 16;
}
MOS_DEVICE float to_float(bf16_t x) { return x; }
MOS_DEVICE float to_float(f16_t x) { return x; }
MOS_DEVICE uint32_t spread_signs(uint32_t x) { return (x >> 15 & 0x00010001u) * 0xFFFFu; }
MOS_DEVICE uint32_t odd_bytes(uint32_t a, uint32_t b) {
  return (a >> 8 & 0xFFu) | (a >> 16 & 0xFF00u) | (b << 8 & 0xFF0000u) | (b & 0xFF000000u);
}
MOS_DEVICE uint32_t twice_signs_low(uint32_t x) { return spread_signs((x << 8 & 0x8000u) | (x << 16 & 0x80000000u)); }
MOS_DEVICE uint32_t twice_signs_high(uint32_t x) { return twice_signs_low(x >> 16); }

}  // namespace mos::cuda

#endif

namespace mos::cuda {

// Starts a kernel, and remembers what was started for the message of a failure (launch.h).
template <auto kKernel, class... P>
cudaError_t launch(const char* name, const char* arithmetic, dim3 grid, int threads, SharedBytes shared, bool early,
                   cudaStream_t stream, P... p) {
  static KernelState state;
  last_launch() = {name, arithmetic, {grid.x, grid.y, grid.z}, threads, static_cast<size_t>(shared.bytes)};
  return start_kernel(state, kKernel, grid, dim3(threads), shared, early, stream, p...);
}

}  // namespace mos::cuda
