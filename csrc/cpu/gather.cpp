// Gather-concat and its exact adjoint. Both are copies at memory speed; no arithmetic but the
// adjoint's additions.
#include <cstring>

#include "../common/numeric.h"
#include "kernels.h"

namespace mos::cpu {

namespace {

size_t dtype_size(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return 4;
    case DType::f64:
      return 8;
    case DType::bf16:
    case DType::f16:
      return 2;
  }
  return 0;
}

// Sums the segments of shards [first, last). Every task scans all tables, r * l integers a module,
// for the shards it owns: no transposed table to build, keep and keep valid, and each pool row is
// written by one task in a fixed order.
template <class G>
void scatter_shards(const std::vector<FactorGradient>& modules, const Matrix& pool_grad, int64_t first, int64_t last) {
  using T = accumulate_t<G>;
  T* out = static_cast<T*>(pool_grad.data);
  const int64_t shard_size = pool_grad.cols;
  std::vector<bool> written(static_cast<size_t>(last - first));
  for (const FactorGradient& module : modules) {
    const int64_t l = module.shards_per_vector, entries = module.grad.rows * l;
    for (int64_t q = 0; q < entries; ++q) {
      const int64_t m = module.index[q];
      if (m < first || m >= last) continue;
      const G* segment =
          static_cast<const G*>(module.grad.data) + (q / l) * module.grad.row_stride + (q % l) * shard_size;
      T* row = out + m * pool_grad.row_stride;
      if (written[static_cast<size_t>(m - first)]) {
        for (int64_t c = 0; c < shard_size; ++c) row[c] += static_cast<T>(segment[c]);
      } else {
        for (int64_t c = 0; c < shard_size; ++c) row[c] = static_cast<T>(segment[c]);
        written[static_cast<size_t>(m - first)] = true;
      }
    }
  }
  for (int64_t m = first; m < last; ++m) {
    if (!written[static_cast<size_t>(m - first)]) {
      std::memset(out + m * pool_grad.row_stride, 0, static_cast<size_t>(shard_size) * sizeof(T));
    }
  }
}

}  // namespace

int64_t first_bad_index(const int32_t* index, int64_t entries, int64_t num_shards) {
  for (int64_t q = 0; q < entries; ++q) {
    if (index[q] < 0 || index[q] >= num_shards) return q;
  }
  return -1;
}

void gather_concat(const Factor& factor, const Matrix& out, const ParallelFor& parallel) {
  const size_t size = dtype_size(factor.dtype), bytes = size * static_cast<size_t>(factor.shard_size);
  if (bytes == 0) return;
  const int64_t l = factor.shards_per_vector;
  parallel(factor.rank, [&](int64_t j) {
    for (int64_t i = 0; i < l; ++i) {
      const int64_t m = factor.index[j * l + i];
      std::memcpy(static_cast<char*>(out.data) + (j * out.row_stride + i * factor.shard_size) * size,
                  static_cast<const char*>(factor.pool) + m * factor.pool_stride * size, bytes);
    }
  });
}

void scatter_add(const std::vector<FactorGradient>& modules, const Matrix& pool_grad, const ParallelFor& parallel) {
  // 64 tasks balance well up to 32 threads; more would only scan the tables more often, as would tasks of less than
  // 8192 elements, 2 us.
  const int64_t tasks = max64(1, min64(64, pool_grad.rows * pool_grad.cols / 8192));
  const int64_t chunk = max64(1, ceil_div(pool_grad.rows, tasks));
  const DType dtype = modules.empty() ? pool_grad.dtype : modules[0].grad.dtype;
  parallel(ceil_div(pool_grad.rows, chunk), [&](int64_t i) {
    dispatch_dtype(dtype, [&](auto tag) {
      scatter_shards<typename decltype(tag)::type>(modules, pool_grad, i * chunk,
                                                   min64(pool_grad.rows, (i + 1) * chunk));
    });
  });
}

}  // namespace mos::cpu
