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
    GroupParams groups;
  } sum[kSums];
};

constexpr int kSumThreads = 256;

// Blocks (x: elements; y: which sum; z, with groups: the first plane). Of the groups that begin in a part of rows only
// the last can have rows beyond it, and those are summed up in as many planes from that part's on (backward.cu).
template <class S, bool kGrouped>
__global__ void __launch_bounds__(kSumThreads, 4) sum_kernel(const __grid_constant__ SumParams<S> p) {
  const typename SumParams<S>::One& one = p.sum[blockIdx.y];
  const int64_t first = (blockIdx.x * static_cast<int64_t>(kSumThreads) + threadIdx.x) * kQuad;
  wait_for_launch_before();
  let_next_launch_start();
  const S* planes = one.planes;
  S* out = one.out;
  int count = one.count;
  if constexpr (kGrouped) {
    const GroupParams& g = one.groups;
    const GroupRows rows = find_group(g, blockIdx.z, false, threadIdx.x % kWarp);
    count = (rows.end - rows.begin - 1) / g.part;  // beyond the first part
    const uint32_t begin = divide(static_cast<uint32_t>(rows.begin), g.by_part);
    if (rows.group == g.count || begin != blockIdx.z || count < 1) return;
    planes += blockIdx.z * one.elements, out += rows.group * one.elements;
  }
  if (first >= one.elements) return;
  S sum[kQuad] = {};
  const int64_t live = one.elements - first;
  if constexpr (kGrouped) add_planes<8>(sum, out + first, 0, 1, one.aligned, live);
  add_planes<8>(sum, planes + first, one.elements, count, one.aligned, live);
  write_quad(out + first, sum, one.aligned, live);
}

template <class S>
cudaError_t sum_as(const Sum* sums, int count, bool early, const Groups& groups, cudaStream_t stream) {
  SumParams<S> params{};
  int64_t most = 0, parts = 1;
  for (int i = 0; i < count; ++i) {
    const ConstPlanes& p = sums[i].planes;
    const int64_t elements = p.rows * p.cols;
    params.sum[i] = {
        static_cast<const S*>(p.data),
        static_cast<S*>(sums[i].out),
        elements,
        static_cast<int32_t>(p.count),
        elements % kQuad == 0 &&
            (reinterpret_cast<uintptr_t>(p.data) | reinterpret_cast<uintptr_t>(sums[i].out)) % kVector == 0,
        group_params(groups, {}, sums[i].part)};
    most = max64(most, elements);
    if (groups) parts = max64(parts, p.count);
  }
  if (most == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(ceil_div(most, kSumThreads * kQuad)), static_cast<unsigned>(count),
                  static_cast<unsigned>(parts));
  const char* arithmetic = sizeof(S) == 4 ? "float32" : "float64";
  return groups
             ? launch<sum_kernel<S, true>>("sum", arithmetic, grid, kSumThreads, SharedBytes{}, early, stream, params)
             : launch<sum_kernel<S, false>>("sum", arithmetic, grid, kSumThreads, SharedBytes{}, early, stream, params);
}

}  // namespace

cudaError_t launch_sum(const Sum* sums, int count, DType dtype, bool early, cudaStream_t stream, const Groups& groups) {
  if (count < 1 || count > kSums) return cudaErrorInvalidValue;
  return dtype == DType::f64 ? sum_as<double>(sums, count, early, groups, stream)
                             : sum_as<float>(sums, count, early, groups, stream);
}

}  // namespace mos::cuda
