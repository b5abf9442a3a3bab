// The CUDA kernels, as host functions. Torch-free: raw views, sizes, a stream; each returns what cudaGetLastError says.
// Index tables must be in range (checked where they are made) and every pointer on the stream's device.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/params.h"

namespace mos::cuda {

// out (rank, cols), contiguous = the assembled factor, in the pool's dtype.
cudaError_t launch_gather_concat(const Factor& factor, const Matrix& out, cudaStream_t stream);

// Modules per launch of scatter_add: their descriptions travel as kernel parameters, 32 bytes each of the 4 KiB there
// are.
constexpr int kScatterModules = 64;

// Adjoint of gather_concat for `count` modules of a pool: pool_grad (num_shards, shard_size), contiguous and float
// (double for double gradients), is overwritten with the sums in module order. More than kScatterModules take several
// launches, in order.
cudaError_t launch_scatter_add(const FactorGradient* modules, int count, const Matrix& pool_grad, cudaStream_t stream);

}  // namespace mos::cuda
