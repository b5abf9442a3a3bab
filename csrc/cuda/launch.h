// The CUDA kernels, as host functions. Torch-free: raw views, sizes, a stream. Each returns what the launch returned;
// last_launch() says what was launched. Index tables must be in range (checked where they are made; a kernel that meets
// one that is not stops with an error) and every pointer on the stream's device.
//
// Nothing here allocates, synchronises or reads device memory, and geometry is a function of shapes alone
// (heuristics.h), so every launch can be captured into a CUDA graph.
//
// `early` launches may start while the launch before them on the stream still runs (programmatic dependent launch, from
// compute capability 9.0 on). They wait for it before they read what it writes, but read everything else at once, so
// that must be older: early is only what follows a launch of this file in the same operator.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/params.h"

namespace mos::cuda {

// The most recent launch of this host thread, for the message of a failure.
struct LaunchRecord {
  const char* kernel;
  const char* arithmetic;
  unsigned grid[3];
  int threads;
  size_t shared_bytes;
};
LaunchRecord& last_launch();

// Dropout whose seed is on the device, so that a captured graph draws anew at each replay. seed is null when threshold
// is 0.
struct DeviceDropout {
  const int64_t* seed;
  uint32_t threshold;
};

// Partial sums that are added when they are read: `count` matrices (rows, cols) of the accumulation type (float; double
// for double), one behind the other. How kernels split a long sum over blocks without atomics.
struct Planes {
  void* data;
  int64_t count;
  int64_t rows, cols;
};
struct ConstPlanes {
  const void* data;
  int64_t count;
  int64_t rows, cols;
};

// How a product of float32 matrices is computed; other dtypes ignore it.
enum class Float32 : int32_t { exact, tf32 };

// Every launch below may be told that rows are in groups (params.h): then the factor is that of each row's group, its
// scale the group's, and S, dS and dropout count places. Rows of nobody are zeros in S and in what is written, are not
// touched in what is accumulated into, and reach nothing. (Where `rows` names them, what is written is zeroed before:
// kernels touch no other row.) Ends and the rest are as old as the factor.

// K1. s (T, r) = drop(x) F^T, as shrink_planes(x, factor) planes.
int64_t shrink_planes(const Matrix& x, const Factor& factor, const Groups& groups = {});
cudaError_t launch_shrink(const Matrix& x, const Factor& factor, const DeviceDropout& dropout, const Planes& s,
                          Float32 float32, cudaStream_t stream, const Groups& groups = {});

// K2. y (T, C) = scale * drop'(s F) + bias, or y += without bias. Sums the planes of s in order and, where s_sum is not
// null, writes the sum there: (T, r), contiguous. Dropout here is that of shrink's backward: forward has none.
struct ExpandOptions {
  const void* bias = nullptr;  // (C,) contiguous, of y's dtype
  bool accumulate = false;
  DeviceDropout dropout{nullptr, 0};
  void* s_sum = nullptr;
  bool early = false;
};
cudaError_t launch_expand(const ConstPlanes& s, const Factor& factor, double scale, const Matrix& y,
                          const ExpandOptions& options, Float32 float32, cudaStream_t stream,
                          const Groups& groups = {});

// Blocks of columns in which launch_expand and launch_shrink_backward each read all of s or ds.
int64_t expand_readers(const Matrix& y, int64_t rank, const Groups& groups = {});
int64_t shrink_backward_readers(const Matrix& x, int64_t rank, const Groups& groups = {});

// How many planes the two backward passes want for a matrix (T, C) and a rank.
//
// In groups, the gradient of each is written where it belongs, `grads` (groups, r, C), but for what its rows beyond the
// first `part` add: that is a plane for each further part, which launch_sum adds to it. Since no group can begin a part
// within another's, all groups together need no more planes than one group of all rows.
struct BackwardPlanes {
  int64_t projected;    // of dS (T, r)
  int64_t factor_grad;  // of dF (r, C)
  int64_t part;         // rows of a plane of dF
};
BackwardPlanes backward_planes(const Matrix& activations, int64_t rank, const Groups& groups = {});

// K3, the dy pass: ds (T, r) = scale * dy F^T and factor_grad (r, C) = scale * s^T dy from one read of dy.
cudaError_t launch_expand_backward(const Matrix& dy, const ConstPlanes& s, const Factor& factor, double scale,
                                   const Planes& ds, const Planes& factor_grad, Float32 float32, cudaStream_t stream,
                                   const Groups& groups = {}, void* grads = nullptr);

// K4, the x pass: factor_grad (r, C) = ds^T drop(x) and dx (+)= drop'(ds F) from one read of x. Ranks above
// shrink_backward_fused_rank(dtype) take a second launch for dx.
int64_t shrink_backward_fused_rank(DType dtype);
cudaError_t launch_shrink_backward(const Matrix& x, const ConstPlanes& ds, const Factor& factor,
                                   const DeviceDropout& dropout, const Matrix& dx, bool accumulate,
                                   const Planes& factor_grad, bool early, Float32 float32, cudaStream_t stream,
                                   const Groups& groups = {}, void* grads = nullptr);

// out[i] = the sum of planes, in order; up to kSums of them in one launch. `out` may be the first plane. With groups,
// out is the gradients of all, to each of which its planes are added.
constexpr int kSums = 2;
struct Sum {
  ConstPlanes planes;
  void* out;
  int64_t part = 0;  // with groups: BackwardPlanes
};
cudaError_t launch_sum(const Sum* sums, int count, DType dtype, bool early, cudaStream_t stream,
                       const Groups& groups = {});

// out (rank, cols), contiguous = the assembled factor, in the pool's dtype.
cudaError_t launch_gather_concat(const Factor& factor, const Matrix& out, cudaStream_t stream);

// K5. Modules per launch of scatter_add: their descriptions travel as kernel parameters, 32 bytes each of the 4 KiB
// there are.
constexpr int kScatterModules = 64;

// Adjoint of gather_concat for `count` modules of a pool: pool_grad (num_shards, shard_size), contiguous and float
// (double for double gradients), is overwritten with the sums in module order. More than kScatterModules take several
// launches, in order. With an inverse, whose places are checked against the tables, each shard costs what its own
// entries do; without one, a look at all tables.
cudaError_t launch_scatter_add(const FactorGradient* modules, int count, const Inverse& inverse,
                               const Matrix& pool_grad, cudaStream_t stream);

}  // namespace mos::cuda
