// Gather-concat, and K5, its exact adjoint.
//
// Traffic: gather reads and writes r * d elements once. The adjoint reads every factor gradient once and writes the
// pool gradient once; a warp goes through its shard's part of the inverse, or, where there is none (one layer's tables,
// r * l integers), scans them, out of L1 and L2. No atomics and no barriers: each element of the pool gradient belongs
// to one thread, which adds in module and position order, so runs are bitwise equal.
#include "tiles.h"

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
__global__ void gather_concat_kernel(const __grid_constant__ GatherParams p) {
  const W* pool = static_cast<const W*>(p.pool);
  W* out = static_cast<W*>(p.out);
  const int64_t word = blockIdx.y * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (word >= p.segment_words) return;
  for (int64_t q = blockIdx.x; q < p.segments; q += gridDim.x) {
    const int64_t shard = p.index[q];
    if (shard < 0 || shard >= p.num_shards) trap();  // like torch's own gathers: an error at the next synchronisation
    out[q * p.segment_words + word] = pool[shard * p.pool_stride_words + word];
  }
}

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
  Inverse inverse;
  int32_t first, count, total;  // modules of this launch, of all launches
  bool accumulate;              // add to out (every launch but the first)
};

// Whether a position of a module's table names a shard.
MOS_DEVICE bool names(const ScatterModule& module, int position, int64_t shard) {
  return position >= 0 && position < module.entries && module.index[position] == shard;
}

// sum += this lane's columns of the segment at a position of a module's table.
template <class G, class S, int kColumns>
MOS_DEVICE void add_segment(S (&sum)[kColumns], const ScatterModule& module, int position, int64_t column,
                            int64_t shard_size) {
  const int64_t row = position / module.shards_per_vector, part = position % module.shards_per_vector;
  const G* source = static_cast<const G*>(module.grad) + row * module.row_stride + part * shard_size + column;
  if constexpr (kColumns == 4) {
    add_planes<1>(sum, source, 0, 1, true, 4);
  } else {
    sum[0] += static_cast<S>(to_sum(source[0]));
  }
}

// Blocks (x: shards, strided; y: columns, kColumns a lane). A warp looks at 32 places of its shard, or, without an
// inverse, for its shard in 32 entries of a table, and adds those that are this launch's in ascending order.
template <class G, class S, int kColumns>
__global__ void __launch_bounds__(kThreads) scatter_add_kernel(const __grid_constant__ ScatterParams p) {
  constexpr unsigned kAll = 0xFFFFFFFFu;
  const int lane = threadIdx.x % kWarp;
  const int64_t column = (blockIdx.y * static_cast<int64_t>(kThreads) + threadIdx.x) * kColumns;
  const bool mine = column < p.shard_size;
  S* out = static_cast<S*>(p.out);
  for (int64_t shard = blockIdx.x; shard < p.num_shards; shard += gridDim.x) {
    S sum[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) sum[c] = p.accumulate && mine ? out[shard * p.shard_size + column + c] : S(0);
    if (p.inverse.starts != nullptr) {
      const int64_t begin = p.inverse.starts[shard], end = p.inverse.starts[shard + 1];
      if (begin < 0 || end > p.inverse.count) trap();
      for (int64_t first = begin; first < end; first += kWarp) {
        const bool inside = first + lane < end;
        const Place place = inside ? p.inverse.places[first + lane] : Place{};
        if (inside && (place.module < 0 || place.module >= p.total)) trap();
        const int k = place.module - p.first;
        const bool here = inside && k >= 0 && k < p.count && p.module[k].entries > 0;
        if (here && !names(p.module[k], place.position, shard)) trap();
        for (unsigned bits = __ballot_sync(kAll, here); bits; bits &= bits - 1) {
          const int from = __ffs(static_cast<int>(bits)) - 1;
          const int module = __shfl_sync(kAll, k, from), position = __shfl_sync(kAll, place.position, from);
          if (mine) add_segment<G>(sum, p.module[module], position, column, p.shard_size);
        }
      }
    } else {
      for (int k = 0; k < p.count; ++k) {
        const ScatterModule& module = p.module[k];
        for (int first = 0; first < module.entries; first += kWarp) {
          const int64_t index = first + lane < module.entries ? module.index[first + lane] : -1;
          if (first + lane < module.entries && (index < 0 || index >= p.num_shards)) trap();
          for (unsigned bits = __ballot_sync(kAll, index == shard); bits; bits &= bits - 1) {
            const int position = first + __ffs(static_cast<int>(bits)) - 1;
            if (mine) add_segment<G>(sum, module, position, column, p.shard_size);
          }
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (mine) out[shard * p.shard_size + column + c] = sum[c];
    }
  }
}

template <class W>
cudaError_t gather_as(const Factor& f, const Matrix& out, int64_t segment_bytes, int64_t stride_bytes,
                      cudaStream_t stream) {
  const int64_t width = sizeof(W), words = segment_bytes / width;
  const GatherParams params{f.pool,      out.data, f.index, f.rank * f.shards_per_vector, words, stride_bytes / width,
                            f.num_shards};
  const int threads = threads_for(words);
  const dim3 grid(static_cast<unsigned>(min64(params.segments, 65535)),
                  static_cast<unsigned>(ceil_div(words, threads)));
  return launch<gather_concat_kernel<W>>("gather_concat", "copy", grid, threads, SharedBytes{}, /*early=*/false, stream,
                                         params);
}

template <class G, class S, int kColumns>
cudaError_t scatter_as(const FactorGradient* modules, int count, const Inverse& inverse, const Matrix& pool_grad,
                       cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(min64(pool_grad.rows, 65535)),
                  static_cast<unsigned>(ceil_div(pool_grad.cols, kThreads * kColumns)));
  for (int k = 0; k < count; ++k) {
    // The kernel counts entries of a table in 32 bits, with room for one warp past the end.
    if (modules[k].entries() > INT32_MAX - kWarp) return cudaErrorInvalidValue;
  }
  for (int first = 0; first == 0 || first < count; first += kScatterModules) {
    ScatterParams params{};
    params.out = pool_grad.data;
    params.num_shards = pool_grad.rows;
    params.shard_size = pool_grad.cols;
    params.inverse = inverse;
    params.first = first;
    params.total = count;
    params.count = static_cast<int32_t>(min64(count - first, kScatterModules));
    params.accumulate = first > 0;
    for (int k = 0; k < params.count; ++k) {
      const FactorGradient& m = modules[first + k];
      params.module[k] = {m.grad.data, m.index, m.grad.row_stride, static_cast<int32_t>(m.entries()),
                          static_cast<int32_t>(m.shards_per_vector)};
    }
    const cudaError_t error =
        launch<scatter_add_kernel<G, S, kColumns>>("scatter_add", sizeof(S) == 4 ? "float32" : "float64", grid,
                                                   kThreads, SharedBytes{}, /*early=*/false, stream, params);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// Factor gradients are float: four of them are one vector, where every module's rows and segments allow it.
bool fours(const FactorGradient* modules, int count, const Matrix& pool_grad) {
  bool all = pool_grad.cols % 4 == 0;
  for (int k = 0; k < count; ++k) {
    all =
        all && reinterpret_cast<uintptr_t>(modules[k].grad.data) % kVector == 0 && modules[k].grad.row_stride % 4 == 0;
  }
  return all;
}

}  // namespace

cudaError_t launch_gather_concat(const Factor& factor, const Matrix& out, cudaStream_t stream) {
  const int64_t size = size_of(factor.dtype), bytes = factor.shard_size * size, stride = factor.pool_stride * size;
  if (factor.rank * factor.shards_per_vector == 0 || bytes == 0) return cudaSuccess;
  const auto address = [](const void* p) { return static_cast<uint64_t>(reinterpret_cast<uintptr_t>(p)); };
  switch (copy_width(bytes, stride, address(factor.pool), address(out.data))) {
    case 16:
      return gather_as<Word<16>::type>(factor, out, bytes, stride, stream);
    case 8:
      return gather_as<Word<8>::type>(factor, out, bytes, stride, stream);
    case 4:
      return gather_as<Word<4>::type>(factor, out, bytes, stride, stream);
    default:
      return gather_as<Word<2>::type>(factor, out, bytes, stride, stream);
  }
}

cudaError_t launch_scatter_add(const FactorGradient* modules, int count, const Inverse& inverse,
                               const Matrix& pool_grad, cudaStream_t stream) {
  if (pool_grad.rows == 0 || pool_grad.cols == 0) return cudaSuccess;
  switch (count ? modules[0].grad.dtype : pool_grad.dtype) {
    case DType::f32:
      return fours(modules, count, pool_grad) ? scatter_as<float, float, 4>(modules, count, inverse, pool_grad, stream)
                                              : scatter_as<float, float, 1>(modules, count, inverse, pool_grad, stream);
    case DType::f64:
      return scatter_as<double, double, 1>(modules, count, inverse, pool_grad, stream);
    case DType::bf16:
      return scatter_as<bf16_t, float, 1>(modules, count, inverse, pool_grad, stream);
    case DType::f16:
      return scatter_as<f16_t, float, 1>(modules, count, inverse, pool_grad, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace mos::cuda
