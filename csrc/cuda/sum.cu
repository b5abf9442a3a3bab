// Adds the planes of a split sum, in order. For results that leave the kernels: where the next kernel reads the planes,
// it adds them itself.
#include "tiles.h"

namespace mos::cuda {

namespace {

template <class S>
struct SumParams {
  struct One {
    const S* planes;
    S* out;
    int64_t elements;
    int32_t count;
    bool aligned;  // planes and out, in quads
  } sum[kSums];
};

constexpr int kSumThreads = 256;

// Blocks (x: elements; y: which sum).
template <class S>
__global__ void __launch_bounds__(kSumThreads, 4) sum_kernel(const __grid_constant__ SumParams<S> p) {
  const typename SumParams<S>::One& one = p.sum[blockIdx.y];
  const int64_t first = (blockIdx.x * static_cast<int64_t>(kSumThreads) + threadIdx.x) * kQuad;
  wait_for_launch_before();
  let_next_launch_start();
  if (first >= one.elements) return;
  S sum[kQuad] = {};
  const int64_t live = one.elements - first;
  add_planes<8>(sum, one.planes + first, one.elements, one.count, one.aligned, live);
  write_quad(one.out + first, sum, one.aligned, live);
}

template <class S>
cudaError_t sum_as(const Sum* sums, int count, bool early, cudaStream_t stream) {
  SumParams<S> params{};
  int64_t most = 0;
  for (int i = 0; i < count; ++i) {
    const ConstPlanes& p = sums[i].planes;
    const int64_t elements = p.rows * p.cols;
    params.sum[i] = {
        static_cast<const S*>(p.data), static_cast<S*>(sums[i].out), elements, static_cast<int32_t>(p.count),
        elements % kQuad == 0 &&
            (reinterpret_cast<uintptr_t>(p.data) | reinterpret_cast<uintptr_t>(sums[i].out)) % kVector == 0};
    most = max64(most, elements);
  }
  if (most == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(ceil_div(most, kSumThreads * kQuad)), static_cast<unsigned>(count));
  return launch<sum_kernel<S>>("sum", sizeof(S) == 4 ? "float32" : "float64", grid, kSumThreads, SharedBytes{}, early,
                               stream, params);
}

}  // namespace

cudaError_t launch_sum(const Sum* sums, int count, DType dtype, bool early, cudaStream_t stream) {
  if (count < 1 || count > kSums) return cudaErrorInvalidValue;
  return dtype == DType::f64 ? sum_as<double>(sums, count, early, stream) : sum_as<float>(sums, count, early, stream);
}

}  // namespace mos::cuda
