// What ops.cpp must know of the device below torch: which tensors are on it, how to make it current, its stream.
// Tests execute the operators on CPU tensors, with the emulator below the kernels (tests/cuda_emulator/README.md).
#pragma once

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "../common/stable.h"

#if defined(MOS_EMULATOR)
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#endif

namespace mos::cuda {

#if defined(MOS_EMULATOR)

#define MOS_DISPATCH_KEY CPU
inline bool on_device(const Tensor& t) { return t.is_cpu(); }
struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};
inline cudaStream_t current_stream(int32_t) { return nullptr; }
inline void add_product(const Tensor& c, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(c.get(), c.get(), a.get(), b.get(), 1.0, 1.0));
}

#else

#define MOS_DISPATCH_KEY CUDA
inline bool on_device(const Tensor& t) { return t.is_cuda(); }
using torch::stable::accelerator::DeviceGuard;

// A function of the libtorch_cuda that is already loaded. Looked up, so that this library links beside a CPU-only
// torch.
template <class Function>
inline Function torch_cuda(const char* name) {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* function = library ? dlsym(library, name) : nullptr;
  STD_TORCH_CHECK(function, "mos_ext: CUDA tensors need a CUDA build of torch, which has ", name);
  return reinterpret_cast<Function>(function);
}

inline cudaStream_t current_stream(int32_t device) {
  static const auto function = torch_cuda<AOTITorchError (*)(int32_t, void**)>("aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  STD_TORCH_CHECK(function(device, &stream) == 0, "mos_ext: torch has no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

// c += a b, as torch's addmm_ computes it: on its current stream, with its switches for TF32, reduced precision and the
// library to ask. `self` being `out`, nothing is copied: the product reads its C where it writes.
inline void add_product(const Tensor& c, const Tensor& a, const Tensor& b) {
  using Handle = AtenTensorHandle;
  static const auto function =
      torch_cuda<AOTITorchError (*)(Handle out, Handle self, Handle, Handle, double beta, double alpha)>(
          "aoti_torch_cuda_addmm_out");
  TORCH_ERROR_CODE_CHECK(function(c.get(), c.get(), a.get(), b.get(), 1.0, 1.0));
}

#endif

}  // namespace mos::cuda
