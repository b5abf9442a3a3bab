// CUDA kernels of the mos_ext operators, through torch's stable ABI; compiled by the host compiler alone. Operators
// that have no kernel here run their default (mos_ext/ops/schema.py): the same products through cuBLAS.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "../common/interface.h"
#include "../common/stable.h"
#include "launch.h"

namespace mos::cuda {

namespace {

// torch's current stream. Looked up in the libtorch_cuda that is already loaded, so that this library links beside a
// CPU-only torch.
cudaStream_t current_stream(int32_t device) {
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

void check_launch(cudaError_t error, const char* kernel, int64_t rows, int64_t cols) {
  STD_TORCH_CHECK(error == cudaSuccess, "mos_ext: launching ", kernel, " for ", rows, " x ", cols,
                  " failed: ", cudaGetErrorString(error));
}

Tensor gather_concat_op(const Tensor& pool, const Tensor& index) {
  const Tensor pool_c = torch::stable::contiguous(pool), index_c = torch::stable::contiguous(index);
  const Factor factor = factor_of(pool_c, index_c);
  STD_TORCH_CHECK(index.is_cuda() && index.get_device() == pool.get_device(), "index must be on the pool's device");
  const torch::stable::accelerator::DeviceGuard guard(pool.get_device());
  Tensor out = torch::stable::new_empty(pool, {factor.rank, factor.cols()});
  check_launch(launch_gather_concat(factor, output_matrix_of(out), current_stream(pool.get_device())), "gather_concat",
               factor.rank, factor.cols());
  return out;
}

Tensor scatter_add_op(std::vector<Tensor> grads, std::vector<Tensor> indices, int64_t num_shards) {
  STD_TORCH_CHECK(!grads.empty() && grads.size() == indices.size(), "need one index for each of one or more grads");
  const int64_t shard_size = indices[0].size(1) ? grads[0].size(1) / indices[0].size(1) : 0;
  const int32_t device = grads[0].get_device();
  const torch::stable::accelerator::DeviceGuard guard(device);
  std::vector<FactorGradient> modules;
  for (size_t k = 0; k < grads.size(); ++k) {
    grads[k] = rows_contiguous(grads[k]);
    indices[k] = torch::stable::contiguous(indices[k]);
    STD_TORCH_CHECK(grads[k].get_device() == device && indices[k].is_cuda() && indices[k].get_device() == device,
                    "grads and indices must be on one device");
    modules.push_back(factor_gradient_of(grads[k], indices[k], shard_size, grads[0].scalar_type()));
  }
  Tensor out = torch::stable::new_empty(grads[0], {num_shards, shard_size}, accumulate_type(grads[0]));
  check_launch(launch_scatter_add(modules.data(), static_cast<int>(modules.size()), output_matrix_of(out),
                                  current_stream(device)),
               "scatter_add", num_shards, shard_size);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mos_ext, CUDA, m) {
  m.impl("gather_concat", TORCH_BOX(&gather_concat_op));
  m.impl("scatter_add", TORCH_BOX(&scatter_add_op));
}

}  // namespace mos::cuda

extern "C" __attribute__((visibility("default"), used)) const char mos_ext_cuda_interface[] = MOS_EXT_INTERFACE;
