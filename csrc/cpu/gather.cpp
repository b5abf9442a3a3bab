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

// Sums the segments of shards [first, last).
template <class G>
void scatter_shards(const std::vector<FactorGradient>& modules, const Inverse& inverse, const Matrix& pool_grad,
                    int64_t first, int64_t last) {
  using T = accumulate_t<G>;
  const int64_t shard_size = pool_grad.cols;
  for (int64_t m = first; m < last; ++m) {
    T* row = static_cast<T*>(pool_grad.data) + m * pool_grad.row_stride;
    bool written = false;
    for (int64_t i = inverse.starts[m]; i < inverse.starts[m + 1]; ++i) {
      const Place place = inverse.places[i];
      const FactorGradient& module = modules[static_cast<size_t>(place.module)];
      if (module.grad.rows == 0) continue;
      const int32_t l = static_cast<int32_t>(module.shards_per_vector);
      const G* segment = static_cast<const G*>(module.grad.data) + (place.position / l) * module.grad.row_stride +
                         (place.position % l) * shard_size;
      if (written) {
        for (int64_t c = 0; c < shard_size; ++c) row[c] += static_cast<T>(segment[c]);
      } else {
        for (int64_t c = 0; c < shard_size; ++c) row[c] = static_cast<T>(segment[c]);
        written = true;
      }
    }
    if (!written) std::memset(row, 0, static_cast<size_t>(shard_size) * sizeof(T));
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

InverseOf::InverseOf(const std::vector<FactorGradient>& modules, int64_t num_shards)
    : starts_(static_cast<size_t>(num_shards) + 1) {
  // Counts of shard m at m + 1; then the sums before them; then each entry is put at its shard's next place.
  for (const FactorGradient& module : modules) {
    for (int64_t q = 0; q < module.entries(); ++q) ++starts_[static_cast<size_t>(module.index[q]) + 1];
  }
  for (size_t m = 1; m < starts_.size(); ++m) starts_[m] += starts_[m - 1];
  places_.resize(static_cast<size_t>(starts_.back()));
  std::vector<int32_t> next(starts_);
  for (size_t k = 0; k < modules.size(); ++k) {
    for (int64_t q = 0; q < modules[k].entries(); ++q) {
      places_[static_cast<size_t>(next[static_cast<size_t>(modules[k].index[q])]++)] = {static_cast<int32_t>(k),
                                                                                        static_cast<int32_t>(q)};
    }
  }
}

bool inverts(const Inverse& inverse, const std::vector<FactorGradient>& modules, int64_t num_shards) {
  if (inverse.starts[0] != 0 || inverse.starts[num_shards] != inverse.count) return false;
  int64_t missing = 0;
  for (const FactorGradient& module : modules) missing += module.entries();
  for (int64_t m = 0; m < num_shards; ++m) {
    const int64_t first = inverse.starts[m], last = inverse.starts[m + 1];
    if (last < first || last > inverse.count) return false;
    Place before{-1, 0};
    for (int64_t i = first; i < last; ++i) {
      const Place place = inverse.places[i];
      if (place.module < 0 || place.module >= static_cast<int64_t>(modules.size())) return false;
      const FactorGradient& module = modules[static_cast<size_t>(place.module)];
      if (module.grad.rows == 0) continue;
      if (place.position < 0 || place.position >= module.entries() || module.index[place.position] != m) return false;
      // Ascending in a shard, and each entry at its own shard: none can be there twice.
      if (place.module < before.module || (place.module == before.module && place.position <= before.position)) {
        return false;
      }
      before = place;
      --missing;
    }
  }
  return missing == 0;
}

void scatter_add(const std::vector<FactorGradient>& modules, const Inverse& inverse, const Matrix& pool_grad,
                 const ParallelFor& parallel) {
  // 64 tasks balance well up to 32 threads; a task of less than 8192 elements takes 2 us.
  const int64_t tasks = max64(1, min64(64, pool_grad.rows * pool_grad.cols / 8192));
  const int64_t chunk = max64(1, ceil_div(pool_grad.rows, tasks));
  const DType dtype = modules.empty() ? pool_grad.dtype : modules[0].grad.dtype;
  parallel(ceil_div(pool_grad.rows, chunk), [&](int64_t i) {
    dispatch_dtype(dtype, [&](auto tag) {
      scatter_shards<typename decltype(tag)::type>(modules, inverse, pool_grad, i * chunk,
                                                   min64(pool_grad.rows, (i + 1) * chunk));
    });
  });
}

}  // namespace mos::cpu
