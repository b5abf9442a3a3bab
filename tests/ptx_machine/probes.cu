// Small kernels and host code that try the stand-in for the CUDA runtime, compiled by nvcc like csrc/cuda: probes.py
// says what must come of them.
#include <cuda_runtime_api.h>

#include <cstdint>

namespace {

struct Params {
  const float* in;
  float* out;
};

enum Bug { kCorrect, kWaitsTooLate, kNeverWaits, kWritesBeforeTheWait };

__device__ void wait_for_launch_before() { asm volatile("griddepcontrol.wait;\n" ::: "memory"); }
__device__ void let_next_launch_begin() { asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory"); }

// out[i] = in[i] + 1, as a link of a chain of launches.
template <Bug kBug>
__global__ void link(const __grid_constant__ Params p) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  if (kBug == kWritesBeforeTheWait) p.out[i] = 0.f;
  float value = 0.f;
  if (kBug == kWaitsTooLate) value = p.in[i];
  if (kBug != kNeverWaits) {
    wait_for_launch_before();
    let_next_launch_begin();
  }
  if (kBug != kWaitsTooLate) value = p.in[i];
  p.out[i] = value + 1.f;
}

// out[i] = the i-th float of shared memory from the other end of the block.
__global__ void reverse(const __grid_constant__ Params p) {
  extern __shared__ float shared[];
  shared[threadIdx.x] = p.in[threadIdx.x];
  __syncthreads();
  p.out[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

cudaError_t launch(void (*kernel)(Params), Params p, unsigned blocks, unsigned threads, size_t shared,
                   cudaLaunchAttribute* attributes, unsigned count) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.attrs = attributes;
  config.numAttrs = count;
  void* arguments[] = {&p};
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments);
}
cudaError_t launch_link(int bug, Params p, bool programmatic) {
  void (*const kernels[])(Params) = {link<kCorrect>, link<kWaitsTooLate>, link<kNeverWaits>,
                                     link<kWritesBeforeTheWait>};
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = programmatic;
  return launch(kernels[bug], p, 3, 64, 0, &attribute, 1);
}

}  // namespace

extern "C" {

// Three links over 192 floats each; the second may have a bug.
int probe_chain(const float* in, float* second, float* third, float* out, int bug, int programmatic) {
  const cudaError_t errors[] = {launch_link(kCorrect, {in, second}, false),
                                launch_link(bug, {second, third}, programmatic),
                                launch_link(kCorrect, {third, out}, programmatic)};
  for (const cudaError_t error : errors) {
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

int probe_reverse(const float* in, float* out, int64_t threads, int64_t shared_bytes, int64_t allowed_bytes) {
  if (allowed_bytes) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(reverse), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(allowed_bytes));
    if (error != cudaSuccess) return error;
  }
  Params p{in, out};
  void* arguments[] = {&p};
  return cudaLaunchKernel(reinterpret_cast<const void*>(reverse), dim3(1), dim3(static_cast<unsigned>(threads)),
                          arguments, static_cast<size_t>(shared_bytes), nullptr);
}

int probe_attribute(int id) {
  cudaLaunchAttribute attribute{};
  attribute.id = static_cast<cudaLaunchAttributeID>(id);
  return launch(reverse, {nullptr, nullptr}, 1, 32, 0, &attribute, 1);
}

int probe_unregistered(const float* function) {
  void* arguments[] = {nullptr};
  return cudaLaunchKernel(function, dim3(1), dim3(32), arguments, 0, nullptr);
}

int probe_capability() {
  int device = -1, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return -1;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) return -1;
  if (cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) return -1;
  return 10 * major + minor;
}

int probe_driver_is_as_new_as_the_runtime() {
  int driver = 0, runtime = 1;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  return driver >= runtime && cudaGetLastError() == cudaSuccess;
}

}  // extern "C"
