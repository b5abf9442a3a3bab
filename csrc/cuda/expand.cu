// K2: y = scale * s F + bias, or y += scale * s F, with F read from the pool.
//
// A block owns a range of columns, whose part of F it reads once into shared memory, and a range of rows. Its threads
// add the planes of s for 64 rows together; then its warps go their own way: each multiplies its 16 rows and writes
// whole 16-byte vectors of y through its own strip of shared memory. Ranks beyond one step (64 for 16-bit elements)
// reload s and F for every tile.
//
// In groups, that range of rows is part of one group's.
//
// Traffic: y once (and read once to accumulate); F once per range of rows and the planes of s once per range of
// columns, from L2.
#include "tiles.h"

namespace mos::cuda {

namespace {

template <class E, class S>
struct ExpandParams {
  PlaneParams<S> s;
  FactorParams factor;
  S scale;
  Rows<E> y;
  const E* bias;
  bool accumulate;
  const int64_t* seed;
  uint32_t threshold;
  S* s_sum;
  int32_t column_tiles, row_tiles, row_tiles_of_part;
  GroupParams groups;
};

template <class M, int kRanks, Variant kVariant>
__global__ void __launch_bounds__(kThreads, sizeof(typename M::E) == 8 ? 2
                                            : kRanks == 64             ? 3
                                                                       : 4)
    expand_kernel(const __grid_constant__ ExpandParams<typename M::E, typename M::S> p) {
  using E = typename M::E;
  using S = typename M::S;
  using Own = Share<kWarpRows, kExpandCols / kGroup>;
  constexpr int kSize = sizeof(E), kSPitch = pitch_of(kRanks, kSize), kYPitch = pitch_of(kExpandCols, kSize);
  MOS_DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x % kWarp, first_row = threadIdx.x / kWarp * kWarpRows;
  const Own own(first_row, lane);
  const int64_t col0 = blockIdx.x * static_cast<int64_t>(p.column_tiles * kExpandCols);
  int tile0 = blockIdx.y * p.row_tiles_of_part, tile_end = min(tile0 + p.row_tiles_of_part, p.row_tiles);
  int64_t first = 0, s_end = p.s.rows;  // where tiles begin, and s ends
  const SharedMatrix<E> s{shared, kSPitch};
  const SharedMatrix<E> y{shared + kTileRows * kSPitch, kYPitch};
  uint32_t* masks = reinterpret_cast<uint32_t*>(y.data + kTileRows * kYPitch);
  S* bias = reinterpret_cast<S*>(masks + mask_bytes(kExpandCols) / 4);
  const SharedMatrix<E> factor{reinterpret_cast<unsigned char*>(bias + p.column_tiles * kExpandCols),
                               pitch_of(p.column_tiles * kExpandCols, kSize)};
  const bool accumulate = does<kVariant, kAccumulate>(p.accumulate), drops = does<kVariant, kDropout>(p.threshold != 0);
  const bool biased = does<kVariant, kBias>(p.bias != nullptr);
  const bool one_step = (kVariant & kWhole) || p.factor.rank <= kRanks;
  const DropoutRule rule(p.seed, drops ? p.threshold : 0);
  S* s_sum = blockIdx.x == 0 ? p.s_sum : nullptr;
  S scale = p.scale;
  OfRows<kVariant, Rows<E>> y_rows = p.y;
  OfRows<kVariant, FactorParams> of_rows = p.factor;
  bool few_in_order = false;
  const bool grouped = does<kVariant, kGrouped>(p.groups.ends != nullptr);
  if constexpr (kMayHaveGroups<kVariant>) {
    if (grouped) {
      const GroupRows rows = rows_of_block(p.groups, blockIdx.y, lane);
      const int count = rows.last - rows.first;
      if (count == 0 || rows.group == p.groups.count) {
        wait_for_launch_before();
        let_next_launch_start();
        if (!accumulate && !p.groups.rows) zero_rows(p.y, rows.first, count, col0, p.column_tiles * kExpandCols);
        if (s_sum) {
          s_sum += static_cast<int64_t>(rows.first) * p.s.rank;
          for (int64_t i = threadIdx.x; i < static_cast<int64_t>(count) * p.s.rank; i += kThreads) s_sum[i] = S(0);
        }
        return;
      }
      first = rows.first, s_end = rows.last;
      tile0 = 0, tile_end = (count + kTileRows - 1) / kTileRows;
      scale *= scale_of<S>(p.groups, rows);
      restrict_to(y_rows, p.groups, rows);
      restrict_to(of_rows, p.groups, rows);
      few_in_order = p.groups.invariant;
    }
  }

  const int ranks = kVariant & kGrouped ? ranks_needed<kRanks>(of_rows.rank) : kRanks;  // of a step, that exist
  const auto load_s = [&](int64_t row0, int rank0) {
    load_sums<kVariant, kTileRows, kRanks, kThreads>(s, p.s, row0, s_end, 0, rank0, scale, s_sum,
                                                     static_cast<int>(threadIdx.x));
  };

  if (biased) {
    for (int i = threadIdx.x; i < p.column_tiles * kExpandCols; i += kThreads) {
      bias[i] = col0 + i < p.y.cols ? to_sum(p.bias[col0 + i]) : S(0);
    }
  }
  if (one_step) load_factor<kVariant>(factor, of_rows, 0, ranks, col0, p.column_tiles * kExpandCols);
  wait_for_launch_before();  // F and the bias are older than that; s is its work
  let_next_launch_start();
  const int column_tiles =
      static_cast<int>(max64(1, min64(p.column_tiles, ceil_div(p.y.cols - col0, int64_t{kExpandCols}))));
  const int64_t s_rows = s_end - first;
  const bool few = (kVariant & kWhole) && p.s.count > 1 && few_sums(s_rows * p.s.rank) && !few_in_order;
  if constexpr (kVariant & kWhole) {
    if (few) {
      load_few_sums<kTileRows, kRanks>(s, p.s, first, static_cast<int>(s_rows), scale, s_sum, y.data);
      __syncthreads();  // s is complete, and so are F and the bias
    }
  }
  for (int tile = tile0; tile < tile_end; ++tile) {
    const int64_t row0 = first + int64_t{tile} * kTileRows;
    if (one_step && !few) {
      __syncthreads();  // everyone is done with s of the tile before
      load_s(row0, 0);
      __syncthreads();  // s is complete, and so are F and the bias
    }
    if (grouped && one_step && row0 + first_row >= s_end) continue;  // a warp without rows
    RowsOf<M, kRanks> a;
    if (one_step) a.load(s, first_row, lane);
#pragma unroll 1
    for (int column_tile = 0; column_tile < column_tiles; ++column_tile) {
      const int tile_col = column_tile * kExpandCols;
      Block<S> sums[kExpandCols / 16];
#pragma unroll
      for (auto& block : sums) clear(block);
      if (one_step) {
        multiply_columns<M, kRanks>(sums, a, s, factor, first_row, tile_col, lane, ranks);
      } else {
        for (int rank0 = 0; rank0 < p.factor.rank; rank0 += kRanks) {
          __syncthreads();  // everyone is done with the step before
          load_factor<kVariant>(factor, of_rows, rank0, kRanks, col0 + tile_col, kExpandCols);
          load_s(row0, rank0);
          __syncthreads();
          a.load(s, first_row, lane);
          multiply_columns<M, kRanks>(sums, a, s, factor, first_row, 0, lane, kRanks);
        }
      }

      // From here on a warp is alone with its 16 rows of the tile.
      if (accumulate) {
        fetch_share<kVariant, 4>(y, own, y_rows, row0, col0 + tile_col);
        __syncwarp();
      }
      if (drops) drop_share<kVariant, 1, /*kDrops=*/false>(y, own, rule, row0, col0 + tile_col, masks);
      write_columns(sums, y, first_row, 0, lane, accumulate, biased ? bias + tile_col : nullptr);
      __syncwarp();
      store_share<kVariant>(y_rows, row0, col0 + tile_col, y, own, drops ? masks : nullptr, accumulate);
      __syncwarp();  // y may be written again, and the warp is whole for its next ldmatrix
    }
  }
}

template <class M, int kRanks>
cudaError_t expand_as(const ConstPlanes& s, const Factor& factor, double scale, const Matrix& y,
                      const ExpandOptions& options, const Groups& groups, cudaStream_t stream) {
  using E = typename M::E;
  using S = typename M::S;
  const ExpandGeometry g = expand_geometry(s.rows, y.cols, factor.rank, sizeof(E), grouping_of(groups));
  const int64_t part = g.rows.tiles * kTileRows;
  const bool drops = options.dropout.threshold != 0;
  PlaneParams<S> planes = plane_params<S>(s);
  planes.aligned = planes.aligned && reinterpret_cast<uintptr_t>(options.s_sum) % kVector == 0;
  const ExpandParams<E, S> params{planes,
                                  factor_params(factor),
                                  static_cast<S>(scale * keep_scale(options.dropout)),
                                  rows_of<E>(y),
                                  static_cast<const E*>(options.bias),
                                  options.accumulate,
                                  options.dropout.seed,
                                  options.dropout.threshold,
                                  static_cast<S*>(options.s_sum),
                                  g.column_tiles,
                                  static_cast<int32_t>(ceil_div(s.rows, kTileRows)),
                                  static_cast<int32_t>(g.rows.tiles),
                                  group_params(groups, factor, part)};
  const int64_t row_blocks = groups ? group_blocks(s.rows, part, groups.count) : g.rows.count;
  const dim3 grid(static_cast<unsigned>(g.column_blocks), static_cast<unsigned>(row_blocks));
  const bool whole =
      M::kWholeVariant && params.y.whole() && params.factor.whole() && params.s.aligned && factor.rank <= kRanks;
  const SharedBytes shared{expand_shared(sizeof(E), kRanks, g.column_tiles),
                           expand_shared(sizeof(E), kRanks, max_expand_tiles(sizeof(E)))};
  const Variant wanted = variant_of(whole, groups, drops, options.accumulate, options.bias != nullptr);
  return with_variant<M, kExpandVariants>(wanted, [&](auto variant) {
    return launch<expand_kernel<M, kRanks, decltype(variant)::value>>("expand", M::kName, grid, kThreads, shared,
                                                                      options.early, stream, params);
  });
}

}  // namespace

int64_t expand_readers(const Matrix& y, int64_t rank, const Groups& groups) {
  return expand_geometry(places_of(y, groups), y.cols, rank, size_of(y.dtype), grouping_of(groups)).column_blocks;
}

cudaError_t launch_expand(const ConstPlanes& s, const Factor& factor, double scale, const Matrix& y,
                          const ExpandOptions& options, Float32 float32, cudaStream_t stream, const Groups& groups) {
  if (s.rows == 0) return cudaSuccess;
  if (s.rows != places_of(y, groups) || (groups && options.bias) || !representable(factor, groups)) {
    return cudaErrorInvalidValue;
  }
  return with_arithmetic(y.dtype, float32, factor.rank, [&](auto arithmetic, auto ranks) {
    return expand_as<decltype(arithmetic), decltype(ranks)::value>(s, factor, scale, y, options, groups, stream);
  });
}

}  // namespace mos::cuda
