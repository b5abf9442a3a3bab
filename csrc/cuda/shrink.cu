// K1: S = drop(x) F^T, with F read from the pool.
//
// A block owns 64 rows (128 where it has 64 ranks, so that F is read half as often), its ranks, and a range of columns;
// its sums stay in registers until the range is done. Tiles of x stream through shared memory, three stages deep, those
// of F two. Each warp copies, drops and multiplies its own rows of x, so only F makes the warps wait for each other:
// one barrier per tile. F arrives as the pool stores it; the thread that copied it converts it into one of two buffers,
// between its wait and the barrier.
//
// In groups, a block's rows are of one group, and it skips warps without any: of a group of one row it costs what F
// does.
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
  int64_t plane_rows;
  int64_t column_tiles, tiles_of_part;
  GroupParams groups;
};

// Where things are in shared memory.
template <class E, int kRanks>
struct ShrinkShared {
  static constexpr int kSize = sizeof(E), kRows = shrink_rows(kSize, kRanks), kCols = shrink_cols(kSize, kRanks);
  static constexpr int kPitch = pitch_of(kCols, kSize), kXBytes = kRows * kPitch, kFactorBytes = kRanks * kPitch;
  static constexpr int kFactorAt = kShrinkStages * kXBytes, kTableAt = kFactorAt + 2 * kFactorBytes;
  static constexpr int kRawAt = kTableAt + kTableEntries * 4;
  static MOS_HOST_DEVICE constexpr int raw_bytes(int pool_bytes) { return kRanks * kCols * pool_bytes; }
  static_assert(kRawAt + kRawStages * raw_bytes(4) == shrink_shared(kSize, kRanks, 4));
};

// Tiles of F on their way to a block: from the pool into stages, as it stores them, and from there, as E, to the warps.
// What a thread has copied it converts.
template <class M, int kRanks, Variant kVariant>
struct FactorStream {
  using E = typename M::E;
  using Shared = ShrinkShared<E, kRanks>;
  static constexpr int kCols = Shared::kCols, kGroups = kCols / kGroup;

  const FactorParams& f;
  const int32_t* table;  // of this block's ranks
  unsigned char* shared;
  int ranks;
  bool bad = false;

  MOS_DEVICE FactorStream(const FactorParams& factor, unsigned char* all, int rank0)
      : f(factor), shared(all), ranks(min(kRanks, factor.rank - rank0)) {
    // Looked up for every group of every tile: from shared memory it costs no trip to L2.
    const int entries = ranks * f.shards_per_vector;
    table = f.index + static_cast<int64_t>(rank0) * f.shards_per_vector;
    if ((kVariant & kWhole) || entries <= kTableEntries) {
      int32_t* copy = reinterpret_cast<int32_t*>(shared + Shared::kTableAt);
      for (int i = threadIdx.x; i < entries; i += kThreads) copy[i] = table[i];
      table = copy;
      __syncthreads();
    }
  }

  MOS_DEVICE SharedMatrix<E> tile(int number) const {
    return {shared + Shared::kFactorAt + (number & 1) * Shared::kFactorBytes, Shared::kPitch};
  }

  // Whole variants move half a group of floats, 16 bytes, at a time: kHalves of a thread's, below each other.
  static constexpr int kHalf = kGroup / 2, kRowHalves = kCols / kHalf, kHalfStep = kThreads / kRowHalves;
  static constexpr int kHalves = kRanks / kHalfStep;
  static constexpr bool kCutsRanks = (kVariant & kGrouped) != 0 && kRanks > 16;
  MOS_DEVICE int half_rank() const { return threadIdx.x / kRowHalves; }
  MOS_DEVICE int half_col() const { return threadIdx.x % kRowHalves * kHalf; }

  MOS_DEVICE unsigned char* raw(int number) const {
    return shared + Shared::kRawAt +
           (number & (kRawStages - 1)) * Shared::raw_bytes(kVariant & kWhole ? 4 : f.pool_bytes);
  }

  MOS_DEVICE void load(int number, int64_t col0) {
    if constexpr (kVariant & kWhole) {
      const uint32_t target = shared_address(raw(number)) + threadIdx.x * kVector;
      const uint32_t col = static_cast<uint32_t>(col0) + half_col(), part = divide(col, f.by_shard_size);
      const float* source = static_cast<const float*>(f.pool) + (col - part * f.shard_size);
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        if (kCutsRanks && h * kHalfStep >= ranks) break;  // nobody wants their sums
        const int rank = half_rank() + h * kHalfStep;
        const bool inside = rank < ranks && col < static_cast<uint32_t>(f.cols);
        const uint32_t shard = static_cast<uint32_t>(table[inside ? rank * f.shards_per_vector + part : 0]);
        bad = bad || shard >= f.shards;
        cp_async_16(target + h * kThreads * kVector, source + uint64_t{shard} * static_cast<uint32_t>(f.pool_stride),
                    inside && shard < f.shards ? kVector : 0);
      }
    } else {
      for (int i = threadIdx.x; i < kRanks * kGroups; i += kThreads) {
        const int rank = i / kGroups, col = i % kGroups * kGroup;
        unsigned char* target = raw(number) + i * kGroup * f.pool_bytes;
        const bool inside = rank < ranks && col0 + col < f.cols;
        const char* pool = static_cast<const char*>(f.pool);
        if (f.aligned) {
          const int64_t offset = inside ? pool_offset(f, table, rank, col0 + col, bad) : 0;
          for (int v = 0; v < kGroup * f.pool_bytes; v += kVector) {
            cp_async_16(shared_address(target) + v, pool + offset * f.pool_bytes + v, inside ? kVector : 0);
          }
        } else if (f.pool_bytes == 4) {
          load_factor_elements(reinterpret_cast<float*>(target), f, table, rank, col0 + col, inside, bad);
        } else {
          load_factor_elements(reinterpret_cast<E*>(target), f, table, rank, col0 + col, inside, bad);
        }
      }
    }
  }

  MOS_DEVICE void convert(int number) const {
    const SharedMatrix<E> target = tile(number);
    if constexpr (kVariant & kWhole) {
      const unsigned char* source = raw(number) + threadIdx.x * kVector;
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        if (kCutsRanks && h * kHalfStep >= ranks) break;
        store_floats(target.at(half_rank() + h * kHalfStep, half_col()), load_16(source + h * kThreads * kVector));
      }
    } else {
      for (int i = threadIdx.x; i < kRanks * kGroups; i += kThreads) {
        RawGroup<E> group;
        load_raw(group, raw(number) + i * kGroup * f.pool_bytes, f.pool_bytes);
        store_raw(target.at(i / kGroups, i % kGroups * kGroup), group, f.pool_bytes);
      }
    }
  }
};

template <class M, int kRanks, Variant kVariant>
__global__ void __launch_bounds__(kThreads, kRanks == 64 ? 3 : 4)
    shrink_kernel(const __grid_constant__ ShrinkParams<typename M::E, typename M::S> p) {
  using E = typename M::E;
  using S = typename M::S;
  using Shared = ShrinkShared<E, kRanks>;
  constexpr int kRows = Shared::kRows, kCols = Shared::kCols, kStages = kShrinkStages, kOwnRows = kRows / kWarps;
  using Own = Share<kOwnRows, kCols / kGroup>;
  MOS_DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x % kWarp, first_row = threadIdx.x / kWarp * kOwnRows;
  const Own own(first_row, lane);
  const int rank0 = blockIdx.z * kRanks;
  const int64_t tile0 = blockIdx.y * p.tiles_of_part;
  int64_t row0 = blockIdx.x * static_cast<int64_t>(kRows);
  int tiles = static_cast<int>(min64(p.tiles_of_part, p.column_tiles - tile0));
  OfRows<kVariant, Rows<const E>> x_rows = p.x;
  OfRows<kVariant, FactorParams> of_rows = p.factor;
  bool active = true;  // this warp has rows
  if constexpr (kMayHaveGroups<kVariant>) {
    if (does<kVariant, kGrouped>(p.groups.ends != nullptr)) {
      const GroupRows rows = rows_of_block(p.groups, blockIdx.x, lane);
      if (rows.first == rows.last) return;
      row0 = rows.first;
      active = row0 + first_row < rows.last;
      restrict_to(x_rows, p.groups, rows);
      restrict_to(of_rows, p.groups, rows);
      if (rank0 >= of_rows.rank) tiles = 0;
    }
  }
  [[maybe_unused]] int32_t row[Own::kOwn];
  if constexpr (kVariant & kMapped) {
    const int place = static_cast<int>(row0) + own.row;
    find_rows<Own::kOwn, Own::kStep>(row, x_rows, place, static_cast<int>(x_rows.rows) - place);
  }
  const DropoutRule rule(p.seed, does<kVariant, kDropout>(p.threshold != 0) ? p.threshold : 0);
  let_next_launch_start();
  FactorStream<M, kRanks, kVariant> factor(of_rows, shared, rank0);

  const auto x_tile = [&](int tile) {
    return SharedMatrix<E>{shared + tile % kStages * Shared::kXBytes, Shared::kPitch};
  };
  const auto load = [&](int tile) {
    const int64_t col0 = (tile0 + tile) * kCols;
    if constexpr (kVariant & kMapped) {
      if (active) load_rows(x_tile(tile), own, x_rows, row, col0);
    } else {
      if (active) load_share<kVariant>(x_tile(tile), own, x_rows, row0, col0);
    }
    factor.load(tile, col0);
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
    const SharedMatrix<E> x = x_tile(tile), f = factor.tile(tile);
    if (does<kVariant, kDropout>(p.threshold != 0) && active) {
      drop_share<kVariant, 4>(x, own, rule, row0, (tile0 + tile) * kCols, nullptr);
    }
    factor.convert(tile);
    __syncthreads();  // this tile is complete, and nobody reads the one before any more:
    if (tile + kStages - 1 < tiles) load(tile + kStages - 1);  // its stage is free
    cp_async_commit();
    if (!active) continue;
#pragma unroll M::kUnroll
    for (int k = 0; k < kCols; k += M::kStep) {
      typename M::A a[kOwnRows / 16];
#pragma unroll
      for (int m = 0; m < kOwnRows / 16; ++m) a[m] = M::a_rows(x, first_row + m * 16, k, lane);
#pragma unroll
      for (int n = 0; n < kRanks / 16; ++n) {
        if ((kVariant & kGrouped) && n > 0 && n * 16 >= factor.ranks) break;
        const typename M::B b = M::b_rows(f, n * 16, k, lane);
#pragma unroll
        for (int m = 0; m < kOwnRows / 16; ++m) M::multiply(sums[m][n], a[m], b);
      }
    }
  }
  if (factor.bad) trap();

  S* plane = p.planes + static_cast<int64_t>(blockIdx.y) * p.plane_rows * p.factor.rank;
#pragma unroll
  for (int m = 0; m < kOwnRows / 16; ++m) {
    const int64_t row = row0 + first_row + m * 16;
    store_blocks<kVariant>(sums[m], plane, x_rows.rows, p.factor.rank, row, rank0, p.scale, lane, x_rows.rows,
                           of_rows.rank);
  }
}

template <class M, int kRanks>
cudaError_t shrink_as(const Matrix& x, const Factor& factor, const DeviceDropout& dropout, const Planes& s,
                      const Groups& groups, cudaStream_t stream) {
  using E = typename M::E;
  using S = typename M::S;
  constexpr int kRows = shrink_rows(sizeof(E), kRanks);
  const ShrinkGeometry g = shrink_geometry(s.rows, x.cols, factor.rank, sizeof(E), grouping_of(groups));
  const FactorParams f = factor_params(factor);
  const ShrinkParams<E, S> params{rows_of<const E>(x),
                                  f,
                                  dropout.seed,
                                  dropout.threshold,
                                  static_cast<S>(keep_scale(dropout)),
                                  static_cast<S*>(s.data),
                                  s.rows,
                                  ceil_div(x.cols, shrink_cols(sizeof(E), kRanks)),
                                  g.columns.tiles,
                                  group_params(groups, factor, kRows)};
  const int64_t row_blocks = groups ? group_blocks(s.rows, kRows, groups.count) : g.row_tiles;
  const dim3 grid(static_cast<unsigned>(row_blocks), static_cast<unsigned>(g.columns.count),
                  static_cast<unsigned>(g.rank_blocks));
  const SharedBytes shared{shrink_shared(sizeof(E), kRanks, f.pool_bytes),
                           shrink_shared(sizeof(E), kRanks, max_pool_bytes(sizeof(E)))};
  const bool whole =
      M::kWholeVariant && params.x.whole() && f.whole() && min64(kRanks, f.rank) * f.shards_per_vector <= kTableEntries;
  return with_variant<M, kShrinkVariants>(variant_of(whole, groups, dropout.threshold != 0), [&](auto variant) {
    return launch<shrink_kernel<M, kRanks, decltype(variant)::value>>("shrink", M::kName, grid, kThreads, shared,
                                                                      /*early=*/false, stream, params);
  });
}

}  // namespace

int64_t shrink_planes(const Matrix& x, const Factor& factor, const Groups& groups) {
  const ShrinkGeometry g =
      shrink_geometry(places_of(x, groups), x.cols, factor.rank, size_of(x.dtype), grouping_of(groups));
  return g.columns.count;
}

cudaError_t launch_shrink(const Matrix& x, const Factor& factor, const DeviceDropout& dropout, const Planes& s,
                          Float32 float32, cudaStream_t stream, const Groups& groups) {
  if (s.rows == 0 || factor.rank == 0) return cudaSuccess;
  if (s.count != shrink_planes(x, factor, groups) || s.rows != places_of(x, groups) || !representable(factor, groups)) {
    return cudaErrorInvalidValue;
  }
  return with_arithmetic(x.dtype, float32, factor.rank, [&](auto arithmetic, auto ranks) {
    return shrink_as<decltype(arithmetic), decltype(ranks)::value>(x, factor, dropout, s, groups, stream);
  });
}

}  // namespace mos::cuda
