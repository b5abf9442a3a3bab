// K1: S = drop(x) F^T, with F read from the pool.
//
// A block owns 64 rows (128 where it has 64 ranks, so that F is read half as often), its ranks, and a range of columns;
// its sums stay in registers until the range is done. Tiles of x and of F stream through shared memory, three stages
// deep. Each warp copies, drops and multiplies its own rows of x, so only F makes the warps wait for each other: one
// barrier per tile. F arrives as the pool stores it; a float pool under 16-bit activations is narrowed in place by the
// thread that copied it, between its wait and the barrier.
//
// Traffic: x once; F once per block of rows, from L2; S once per range of columns.
#include "tiles.h"

namespace mos::cuda {

namespace {

template <class E, class S>
struct ShrinkParams {
  Rows<const E> x;
  FactorParams factor;
  const int64_t* seed;
  uint32_t threshold;
  S scale;  // of kept elements
  S* planes;
  int64_t column_tiles, tiles_of_part;
  int32_t factor_group;  // bytes between groups of F in shared memory: room for the pool's elements and for E's
};

template <class M, int kRanks, bool kWhole>
__global__ void __launch_bounds__(kThreads, kRanks == 64 ? 3 : 4)
    shrink_kernel(const __grid_constant__ ShrinkParams<typename M::E, typename M::S> p) {
  using E = typename M::E;
  using S = typename M::S;
  constexpr int kRows = shrink_rows(sizeof(E), kRanks), kOwnRows = kRows / kWarps;
  constexpr int kCols = shrink_cols(sizeof(E), kRanks), kGroups = kCols / kGroup, kStages = kShrinkStages;
  constexpr int kOwn = kOwnRows * kGroups / kWarp, kFactorGroups = kRanks * kGroups;
  constexpr int kXPitch = pitch_of(kCols, sizeof(E)), kXBytes = kRows * kXPitch;
  MOS_DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x % kWarp, first_row = threadIdx.x / kWarp * kOwnRows;
  const int64_t row0 = blockIdx.x * static_cast<int64_t>(kRows);
  const int rank0 = blockIdx.z * kRanks, ranks = min(kRanks, p.factor.rank - rank0);
  const int64_t tile0 = blockIdx.y * p.tiles_of_part;
  const int tiles = static_cast<int>(min64(p.tiles_of_part, p.column_tiles - tile0));
  const int factor_pitch = shrink_factor_pitch(kCols, p.factor_group), factor_bytes = kRanks * factor_pitch;
  unsigned char* factor_shared = shared + kStages * kXBytes;
  int32_t* shared_table = reinterpret_cast<int32_t*>(factor_shared + kStages * factor_bytes);
  bool bad = false;

  // Looked up for every group of every tile: from shared memory it costs no trip to L2.
  const int entries = ranks * p.factor.shards_per_vector;
  const int32_t* table = p.factor.index + static_cast<int64_t>(rank0) * p.factor.shards_per_vector;
  if (entries <= kTableEntries) {
    for (int i = threadIdx.x; i < entries; i += kThreads) shared_table[i] = table[i];
    table = shared_table;
    __syncthreads();
  }

  const auto x_tile = [&](int tile) { return shared_matrix<E>(shared + tile % kStages * kXBytes, kXPitch); };
  const auto factor_tile = [&](int tile) {
    return SharedMatrix<E>{factor_shared + tile % kStages * factor_bytes, factor_pitch, p.factor_group};
  };

  const auto load = [&](int tile) {
    const int64_t col0 = (tile0 + tile) * kCols;
    const SharedMatrix<E> x = x_tile(tile), factor = factor_tile(tile);
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int i = j * kWarp + lane, row = first_row + i / kGroups, col = i % kGroups * kGroup;
      load_group<kWhole>(x.at(row, col), p.x, row0 + row, col0 + col);
    }
    for (int i = threadIdx.x; i < kFactorGroups; i += kThreads) {
      const int rank = i / kGroups, col = i % kGroups * kGroup;
      E* target = factor.at(rank, col);
      const bool inside = rank < ranks && col0 + col < p.factor.cols;
      if (kWhole || p.factor.aligned) {
        const int64_t offset = inside ? pool_offset(p.factor, table, rank, col0 + col, bad) : 0;
        const char* source = static_cast<const char*>(p.factor.pool) + offset * p.factor.pool_bytes;
        for (int v = 0; v < kGroup * p.factor.pool_bytes; v += kVector) {
          cp_async_16(shared_address(target) + v, source + v, inside ? kVector : 0);
        }
      } else {
        load_factor_elements(target, p.factor, table, rank, col0 + col, inside, bad);
      }
    }
  };
  // What the copying thread does to its own groups once they have landed.
  const auto finish = [&](int tile) {
    if (p.threshold) {
      const int64_t col0 = (tile0 + tile) * kCols;
      const SharedMatrix<E> x = x_tile(tile);
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        const int i = j * kWarp + lane, row = first_row + i / kGroups, col = i % kGroups * kGroup;
        drop_group(x.at(row, col), keep_mask(p.seed, p.threshold, row0 + row, col0 + col));
      }
    }
    if (sizeof(E) != 4 && p.factor.pool_bytes == 4 && (kWhole || p.factor.aligned)) {
      const SharedMatrix<E> factor = factor_tile(tile);
      for (int i = threadIdx.x; i < kFactorGroups; i += kThreads) {
        E* group = factor.at(i / kGroups, i % kGroups * kGroup);
        RawGroup<E> raw;
        load_raw(raw, group, p.factor.pool_bytes);
        store_raw(group, raw, p.factor.pool_bytes);
      }
    }
  };

  Block<S> sums[kOwnRows / 16][kRanks / 16];
#pragma unroll
  for (int m = 0; m < kOwnRows / 16; ++m) {
#pragma unroll
    for (int n = 0; n < kRanks / 16; ++n) clear(sums[m][n]);
  }
#pragma unroll
  for (int tile = 0; tile < kStages - 1; ++tile) {
    if (tile < tiles) load(tile);
    cp_async_commit();
  }
  for (int tile = 0; tile < tiles; ++tile) {
    cp_async_wait<kStages - 2>();
    finish(tile);
    __syncthreads();  // this tile is complete, and nobody reads the one before any more:
    if (tile + kStages - 1 < tiles) load(tile + kStages - 1);  // its stage is free
    cp_async_commit();
    const SharedMatrix<E> x = x_tile(tile), factor = factor_tile(tile);
#pragma unroll M::kUnroll
    for (int k = 0; k < kCols; k += M::kStep) {
      typename M::A a[kOwnRows / 16];
#pragma unroll
      for (int m = 0; m < kOwnRows / 16; ++m) a[m] = M::a_rows(x, first_row + m * 16, k, lane);
#pragma unroll
      for (int n = 0; n < kRanks / 16; ++n) {
        const typename M::B b = M::b_rows(factor, n * 16, k, lane);
#pragma unroll
        for (int m = 0; m < kOwnRows / 16; ++m) M::multiply(sums[m][n], a[m], b);
      }
    }
  }
  if (bad) trap();

  S* plane = p.planes + static_cast<int64_t>(blockIdx.y) * p.x.rows * p.factor.rank;
#pragma unroll
  for (int m = 0; m < kOwnRows / 16; ++m) {
#pragma unroll
    for (int n = 0; n < kRanks / 16; ++n) {
      const int64_t row = row0 + first_row + m * 16;
      store_block(sums[m][n], plane, p.x.rows, p.factor.rank, row, rank0 + n * 16, p.scale, lane);
    }
  }
}

template <class M, int kRanks>
cudaError_t shrink_as(const Matrix& x, const Factor& factor, const DeviceDropout& dropout, const Planes& s,
                      cudaStream_t stream) {
  using E = typename M::E;
  using S = typename M::S;
  const ShrinkGeometry g = shrink_geometry(x.rows, x.cols, factor.rank, sizeof(E));
  const FactorParams f = factor_params(factor);
  const int group = shrink_factor_group(sizeof(E), f.pool_bytes);
  const ShrinkParams<E, S> params{rows_of<const E>(x),
                                  f,
                                  dropout.seed,
                                  dropout.threshold,
                                  static_cast<S>(keep_scale(dropout)),
                                  static_cast<S*>(s.data),
                                  ceil_div(x.cols, shrink_cols(sizeof(E), kRanks)),
                                  g.columns.tiles,
                                  group};
  const size_t shared_bytes = shrink_shared(sizeof(E), kRanks, group);
  const dim3 grid(static_cast<unsigned>(g.row_tiles), static_cast<unsigned>(g.columns.count),
                  static_cast<unsigned>(g.rank_blocks));
  if constexpr (M::kWholeVariant) {
    if (params.x.whole() && f.aligned) {
      return launch("shrink", M::kName, shrink_kernel<M, kRanks, true>, grid, kThreads, shared_bytes, stream, params);
    }
  }
  return launch("shrink", M::kName, shrink_kernel<M, kRanks, false>, grid, kThreads, shared_bytes, stream, params);
}

}  // namespace

int64_t shrink_planes(const Matrix& x, const Factor& factor) {
  return shrink_geometry(x.rows, x.cols, factor.rank, size_of(x.dtype)).columns.count;
}

cudaError_t launch_shrink(const Matrix& x, const Factor& factor, const DeviceDropout& dropout, const Planes& s,
                          Float32 float32, cudaStream_t stream) {
  if (x.rows == 0 || factor.rank == 0) return cudaSuccess;
  if (s.count != shrink_planes(x, factor) || !representable(factor)) return cudaErrorInvalidValue;
  return with_arithmetic(x.dtype, float32, factor.rank, [&](auto arithmetic, auto ranks) {
    return shrink_as<decltype(arithmetic), decltype(ranks)::value>(x, factor, dropout, s, stream);
  });
}

}  // namespace mos::cuda
