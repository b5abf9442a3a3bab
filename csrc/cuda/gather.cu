// Gather-concat and its exact adjoint on CUDA.
//
// Traffic: gather reads and writes r * d elements once. The adjoint reads every factor gradient once and writes the
// pool gradient once; the index tables (r * l integers a module) are scanned by every block out of L2. No atomics: each
// element of the pool gradient belongs to one thread, which adds in module and position order, so runs are bitwise
// equal.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "heuristics.h"
#include "launch.h"

namespace mos::cuda {

namespace {

template <int kBytes>
struct Word;
template <>
struct Word<16> {
  using type = uint4;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<2> {
  using type = uint16_t;
};

struct GatherParams {
  const void* pool;
  void* out;
  const int32_t* index;
  int64_t segments;       // r * l
  int64_t segment_words;  // of one shard
  int64_t pool_stride_words;
  int64_t num_shards;
};

// Blocks (x: segments, strided; y: words of a segment). A segment's destination is its number: the output is
// contiguous.
template <class W>
__global__ void gather_concat_kernel(GatherParams p) {
  const W* pool = static_cast<const W*>(p.pool);
  W* out = static_cast<W*>(p.out);
  const int64_t word = blockIdx.y * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (word >= p.segment_words) return;
  for (int64_t q = blockIdx.x; q < p.segments; q += gridDim.x) {
    const int64_t shard = p.index[q];
    if (shard < 0 || shard >= p.num_shards) __trap();  // like torch's own gathers: an error at the next synchronisation
    out[q * p.segment_words + word] = pool[shard * p.pool_stride_words + word];
  }
}

template <class T>
__device__ __forceinline__ T widen(T value) {
  return value;
}
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }

struct ScatterModule {
  const void* grad;
  const int32_t* index;
  int64_t row_stride;
  int32_t entries, shards_per_vector;  // entries = r * l
};

struct ScatterParams {
  ScatterModule module[kScatterModules];
  void* out;
  int64_t num_shards, shard_size;
  int32_t count;
  bool accumulate;  // add to out (every launch but the first)
};

constexpr int kMaxWarps = 8;  // 256 threads

// Blocks (x: shards, strided; y: columns). The block scans each table together, a ballot per warp, and all its threads
// then walk the matches in ascending order, each adding its own column.
template <class G, class T>
__global__ void scatter_add_kernel(const __grid_constant__ ScatterParams p) {
  __shared__ unsigned matches[kMaxWarps];
  const int64_t column = blockIdx.y * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  const bool mine = column < p.shard_size;
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  T* out = static_cast<T*>(p.out);
  for (int64_t shard = blockIdx.x; shard < p.num_shards; shard += gridDim.x) {
    T sum = p.accumulate && mine ? out[shard * p.shard_size + column] : T(0);
    for (int k = 0; k < p.count; ++k) {
      const ScatterModule& module = p.module[k];
      const G* grad = static_cast<const G*>(module.grad);
      for (int first = 0; first < module.entries; first += blockDim.x) {
        const int entry = first + static_cast<int>(threadIdx.x);
        const bool match = entry < module.entries && module.index[entry] == shard;
        const unsigned ballot = __ballot_sync(0xFFFFFFFFu, match);
        if (threadIdx.x % kWarp == 0) matches[warp] = ballot;
        // Also keeps a fast warp from overwriting what a slow one still reads: everyone leaves the loop below first.
        if (__syncthreads_or(match)) {
          for (int w = 0; w < warps; ++w) {
            for (unsigned bits = matches[w]; bits; bits &= bits - 1) {
              const int q = first + w * kWarp + __ffs(static_cast<int>(bits)) - 1;
              const int64_t row = q / module.shards_per_vector, part = q % module.shards_per_vector;
              if (mine) sum += static_cast<T>(widen(grad[row * module.row_stride + part * p.shard_size + column]));
            }
          }
        }
        __syncthreads();
      }
    }
    if (mine) out[shard * p.shard_size + column] = sum;
  }
}

template <class W>
void gather_as(const Factor& f, const Matrix& out, int64_t segment_bytes, int64_t stride_bytes, cudaStream_t stream) {
  const int64_t width = sizeof(W), words = segment_bytes / width;
  const GatherParams params{f.pool,      out.data, f.index, f.rank * f.shards_per_vector, words, stride_bytes / width,
                            f.num_shards};
  const int threads = threads_for(words);
  const int64_t segments = params.segments < 65535 ? params.segments : 65535;
  const dim3 grid(static_cast<unsigned>(segments), static_cast<unsigned>(blocks_for(words, threads)));
  gather_concat_kernel<W><<<grid, threads, 0, stream>>>(params);
}

template <class G, class T>
cudaError_t scatter_as(const FactorGradient* modules, int count, const Matrix& pool_grad, cudaStream_t stream) {
  const int threads = threads_for(pool_grad.cols);
  const int64_t shards = pool_grad.rows < 65535 ? pool_grad.rows : 65535;
  const dim3 grid(static_cast<unsigned>(shards), static_cast<unsigned>(blocks_for(pool_grad.cols, threads)));
  for (int k = 0; k < count; ++k) {
    // The kernel counts entries of a table in 32 bits, with room for one block past the end.
    if (modules[k].grad.rows * modules[k].shards_per_vector > INT32_MAX - 256) return cudaErrorInvalidValue;
  }
  for (int first = 0; first == 0 || first < count; first += kScatterModules) {
    ScatterParams params{};
    params.out = pool_grad.data;
    params.num_shards = pool_grad.rows;
    params.shard_size = pool_grad.cols;
    params.count = count - first < kScatterModules ? count - first : kScatterModules;
    params.accumulate = first > 0;
    for (int k = 0; k < params.count; ++k) {
      const FactorGradient& m = modules[first + k];
      params.module[k] = {m.grad.data, m.index, m.grad.row_stride,
                          static_cast<int32_t>(m.grad.rows * m.shards_per_vector),
                          static_cast<int32_t>(m.shards_per_vector)};
    }
    scatter_add_kernel<G, T><<<grid, threads, 0, stream>>>(params);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

}  // namespace

cudaError_t launch_gather_concat(const Factor& factor, const Matrix& out, cudaStream_t stream) {
  const int64_t size = size_of(factor.dtype), bytes = factor.shard_size * size, stride = factor.pool_stride * size;
  if (factor.rank * factor.shards_per_vector == 0 || bytes == 0) return cudaSuccess;
  const auto address = [](const void* p) { return static_cast<uint64_t>(reinterpret_cast<uintptr_t>(p)); };
  switch (copy_width(bytes, stride, address(factor.pool), address(out.data))) {
    case 16:
      gather_as<Word<16>::type>(factor, out, bytes, stride, stream);
      break;
    case 8:
      gather_as<Word<8>::type>(factor, out, bytes, stride, stream);
      break;
    case 4:
      gather_as<Word<4>::type>(factor, out, bytes, stride, stream);
      break;
    default:
      gather_as<Word<2>::type>(factor, out, bytes, stride, stream);
      break;
  }
  return cudaGetLastError();
}

cudaError_t launch_scatter_add(const FactorGradient* modules, int count, const Matrix& pool_grad, cudaStream_t stream) {
  if (pool_grad.rows == 0 || pool_grad.cols == 0) return cudaSuccess;
  switch (count ? modules[0].grad.dtype : pool_grad.dtype) {
    case DType::f32:
      return scatter_as<float, float>(modules, count, pool_grad, stream);
    case DType::f64:
      return scatter_as<double, double>(modules, count, pool_grad, stream);
    case DType::bf16:
      return scatter_as<__nv_bfloat16, float>(modules, count, pool_grad, stream);
    case DType::f16:
      return scatter_as<__half, float>(modules, count, pool_grad, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace mos::cuda
