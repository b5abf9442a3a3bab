// What ops.cpp must know of the device below torch: which tensors are on it, how to make it current, its stream.
// Tests execute the operators on CPU tensors, with the emulator below the kernels (tests/cuda_emulator/README.md).
#pragma once

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "../common/stable.h"

namespace mos::cuda {

#if defined(MOS_EMULATOR)

#define MOS_DISPATCH_KEY CPU
inline bool on_device(const Tensor& t) { return t.is_cpu(); }
struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};
inline cudaStream_t current_stream(int32_t) { return nullptr; }

#else

#define MOS_DISPATCH_KEY CUDA
inline bool on_device(const Tensor& t) { return t.is_cuda(); }
using torch::stable::accelerator::DeviceGuard;

// torch's current stream. Looked up in the libtorch_cuda that is already loaded, so that this library links beside a
// CPU-only torch.
inline cudaStream_t current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(function, "mos_ext: CUDA tensors need a CUDA build of torch");
  void* stream = nullptr;
  STD_TORCH_CHECK(function(device, &stream) == 0, "mos_ext: torch has no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

#endif

}  // namespace mos::cuda
