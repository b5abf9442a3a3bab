// K3 and K4: the two passes of the backward, each reading its activations once.
//
//     dy pass: dS = scale * dy F^T   and dF = scale * S^T dy
//     x pass:  dx (+)= drop'(dS F)   and dF = dS^T drop(x)
//
// The gradient of a factor sums over rows, the other product over columns or ranks, so a block owns a rectangle: a
// range of rows, walked in tiles of 64, and as many columns as it can keep the gradient of in registers. dF is written
// once per range of rows, dS once per range of columns, both as planes that their reader adds in order.
//
// Within a tile each warp owns 16 rows: it copies them, drops from them, multiplies them with F, and, in the x pass,
// writes dx over them in shared memory and from there in whole vectors. Only the gradient crosses rows. It is divided
// by columns: each warp takes a quarter, over all 64 rows.
//
// In groups, a block's rows are part of one group's. The first part of a group writes its gradient where it belongs,
// zeros where there are no rows; a further part a plane, which launch_sum adds to it. What the rows of a tile cross is
// cut off in steps of 16 where they end.
//
// Traffic: activations once (dx once more); F once per block and S once per range of columns, from L2; planes of dF
// and dS.
#include "tiles.h"

namespace mos::cuda {

namespace {

template <class E, class S>
struct BackwardParams {
  Rows<const E> in;  // dy, or x
  PlaneParams<S> s;  // S, or dS
  FactorParams factor;
  S s_scale, out_scale;
  S* projected;  // planes of dS
  S* grad;       // planes of dF
  Rows<E> dx;
  bool write_dx, accumulate;
  const int64_t* seed;
  uint32_t threshold;
  int32_t column_tiles;  // of a block
  int32_t row_tiles, row_tiles_of_part;
  GroupParams groups;
  S* grads;  // of all groups
};

// Where things are in shared memory.
template <class E, int kRanks>
struct BackwardShared {
  static constexpr int kSize = sizeof(E), kCols = backward_cols(kSize), kTiles = backward_tiles(kSize, kRanks);
  static constexpr int kInPitch = pitch_of(kCols, kSize), kInBytes = kTileRows * kInPitch;
  static constexpr int kFactorPitch = pitch_of(kTiles * kCols, kSize), kSPitch = pitch_of(kRanks, kSize);
  static constexpr int kFactorAt = backward_stages(kSize) * kInBytes, kSAt = kFactorAt + kRanks * kFactorPitch;
  static constexpr int kMasksAt = kSAt + kTileRows * kSPitch, kBytes = kMasksAt + mask_bytes(kCols);
  static_assert(kBytes == backward_shared(kSize, kRanks));
};

template <class M, int kRanks, bool kXPass, Variant kVariant>
__global__ void __launch_bounds__(kThreads, kRanks == 64 ? 2 : 3)
    backward_kernel(const __grid_constant__ BackwardParams<typename M::E, typename M::S> p) {
  using E = typename M::E;
  using S = typename M::S;
  using Shared = BackwardShared<E, kRanks>;
  constexpr int kCols = Shared::kCols, kTiles = Shared::kTiles;
  constexpr int kStages = backward_stages(sizeof(E)), kAhead = kStages - 1, kRankBlocks = kRanks / 16;
  constexpr int kWarpCols = kCols / kWarps, kGradBlocks = kWarpCols / 16;
  using Own = Share<kWarpRows, kCols / kGroup>;
  MOS_DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, first_row = warp * kWarpRows;
  const Own own(first_row, lane);
  const int64_t col0 = blockIdx.x * (static_cast<int64_t>(p.column_tiles) * kCols);
  int tile0 = blockIdx.y * p.row_tiles_of_part, tile_end = min(tile0 + p.row_tiles_of_part, p.row_tiles);
  int64_t first = 0, end = p.s.rows;  // where tiles begin, and where rows end
  const int rank0 = blockIdx.z * kRanks;
  const SharedMatrix<E> factor{shared + Shared::kFactorAt, Shared::kFactorPitch};
  const SharedMatrix<E> s{shared + Shared::kSAt, Shared::kSPitch};
  uint32_t* masks = reinterpret_cast<uint32_t*>(shared + Shared::kMasksAt);
  const bool write_dx = kXPass && ((kVariant & kWhole) || p.write_dx);
  const bool drops = kXPass && does<kVariant, kDropout>(p.threshold != 0);
  const bool accumulate = does<kVariant, kAccumulate>(p.accumulate);

  const bool grouped = does<kVariant, kGrouped>(p.groups.ends != nullptr);
  S s_scale = p.s_scale, out_scale = p.out_scale;
  OfRows<kVariant, Rows<const E>> in = p.in;
  OfRows<kVariant, Rows<E>> dx = p.dx;
  OfRows<kVariant, FactorParams> of_rows = p.factor;
  int32_t group = 0, further = -1;  // whose gradient this is the first part of, or the plane of a further one
  // In the dy pass, everything may be the work of the launch before, which need not be ours. In the x pass only dS is,
  // and what is in dx already is as old as x.
  if (!kXPass) wait_for_launch_before();
  if constexpr (kMayHaveGroups<kVariant>) {
    if (grouped) {
      const GroupRows rows = rows_of_block(p.groups, blockIdx.y, lane);
      const bool nobody = rows.group == p.groups.count;
      if (nobody || (rows.first == rows.last && rows.part > 0)) {
        if (kXPass) wait_for_launch_before();
        let_next_launch_start();
        if (write_dx && !accumulate && !p.groups.rows && nobody) {
          zero_rows(p.dx, rows.first, rows.last - rows.first, col0, p.column_tiles * kCols);
        }
        return;
      }
      first = rows.first, end = rows.last;
      tile0 = 0, tile_end = static_cast<int>((end - first + kTileRows - 1) / kTileRows);
      if (!kXPass) s_scale = out_scale = s_scale * scale_of<S>(p.groups, rows);
      restrict_to(in, p.groups, rows);
      restrict_to(dx, p.groups, rows);
      restrict_to(of_rows, p.groups, rows);
      group = rows.group;
      if (rows.part > 0) {
        further = static_cast<int>(divide(static_cast<uint32_t>(rows.begin), p.groups.by_part)) + rows.part - 1;
      }
    }
  }
  const int ranks =
      kVariant & kGrouped ? ranks_needed<kRanks>(of_rows.rank - rank0) : kRanks;  // of a block, that exist
  const auto row_of = [&](int tile) { return first + int64_t{tile} * kTileRows; };
  const auto has_rows = [&](int tile) { return !grouped || row_of(tile) + first_row < end; };  // this warp

  // Tiles are visited row by row; loads run kAhead tiles ahead.
  int row_ahead = tile0, tile_ahead = 0;
  const auto load_next = [&](int stage) {
    if (row_ahead < tile_end && has_rows(row_ahead)) {
      const SharedMatrix<E> tile{shared + stage * Shared::kInBytes, Shared::kInPitch};
      load_share<kVariant>(tile, own, in, row_of(row_ahead), col0 + tile_ahead * kCols);
    }
    cp_async_commit();
    if (++tile_ahead == p.column_tiles) tile_ahead = 0, ++row_ahead;
  };

  Block<S> grad[kTiles][kRankBlocks][kGradBlocks];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int m = 0; m < kRankBlocks; ++m) {
#pragma unroll
      for (int n = 0; n < kGradBlocks; ++n) clear(grad[t][m][n]);
    }
  }

#pragma unroll
  for (int stage = 0; stage < kAhead; ++stage) load_next(stage);
  if (!grouped || tile_end > 0) load_factor<kVariant>(factor, of_rows, rank0, ranks, col0, p.column_tiles * kCols);
  if (kXPass) wait_for_launch_before();
  let_next_launch_start();
  const DropoutRule rule(p.seed, drops ? p.threshold : 0);
  int stage = 0;
  for (int row_tile = tile0; row_tile < tile_end; ++row_tile) {
    const int64_t row0 = row_of(row_tile);
    const bool active = has_rows(row_tile);
    __syncthreads();  // nobody needs s of the tile before any more
    if (active) {
      load_sums<kVariant, kWarpRows, kRanks, kWarp>(s, p.s, row0, end, first_row, rank0, s_scale,
                                                    static_cast<S*>(nullptr), lane);
    }
    Block<S> projected[kXPass ? 1 : kRankBlocks];
    if constexpr (!kXPass) {
#pragma unroll
      for (auto& block : projected) clear(block);
    }

#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      if (t >= p.column_tiles) break;
      const SharedMatrix<E> tile{shared + stage * Shared::kInBytes, Shared::kInPitch};
      const int64_t tile_col = col0 + t * kCols;
      cp_async_wait<kAhead - 1>();
      if (drops && active) drop_share<kVariant, kRanks == 64 ? 2 : 4>(tile, own, rule, row0, tile_col, masks);
      __syncthreads();  // the tile and s are complete, and the stage of the tile before is free
      load_next(stage == 0 ? kStages - 1 : stage - 1);

      if constexpr (!kXPass) {
        if (active) {
#pragma unroll M::kUnroll
          for (int k = 0; k < kCols; k += M::kStep) {
            const typename M::A a = M::a_rows(tile, first_row, k, lane);
#pragma unroll
            for (int n = 0; n < kRankBlocks; ++n) {
              if (n > 0 && n * 16 >= ranks) break;
              M::multiply(projected[n], a, M::b_rows(factor, n * 16, t * kCols + k, lane));
            }
          }
        }
      }
#pragma unroll(kRanks == 64 ? 2 : M::kUnroll)
      for (int k = 0; k < kTileRows; k += M::kStep) {
        if (grouped && row0 + k / kWarpRows * kWarpRows >= end) break;  // that warp has no rows
        typename M::B b[kGradBlocks];
#pragma unroll
        for (int n = 0; n < kGradBlocks; ++n) b[n] = M::b_cols(tile, k, warp * kWarpCols + n * 16, lane);
#pragma unroll
        for (int m = 0; m < kRankBlocks; ++m) {
          if (m > 0 && m * 16 >= ranks) break;
          const typename M::A a = M::a_cols(s, k, m * 16, lane);
#pragma unroll
          for (int n = 0; n < kGradBlocks; ++n) M::multiply(grad[t][m][n], a, b[n]);
        }
      }

      if (write_dx) __syncthreads();  // nobody reads x of this tile any more: each warp writes dx over its rows
      if (write_dx && active) {
        if (accumulate) {
          fetch_share<kVariant, kRanks == 64 ? 2 : 4>(tile, own, dx, row0, tile_col);
          __syncwarp();
        }
        RowsOf<M, kRanks> a;
        a.load(s, first_row, lane);
        // Blocks of 16 columns. More, or more unrolled, and registers spill.
        constexpr int kAtOnce = 2;
#pragma unroll(sizeof(E) == 2 && kRanks == 16 ? 2 : 1)
        for (int col = 0; col < kCols; col += 16 * kAtOnce) {
          Block<S> sums[kAtOnce];
#pragma unroll
          for (auto& block : sums) clear(block);
          multiply_columns<M, kRanks>(sums, a, s, factor, first_row, t * kCols + col, lane, ranks);
          write_columns<kAtOnce, E, S>(sums, tile, first_row, col, lane, accumulate, nullptr);
        }
        __syncwarp();
        store_share<kVariant>(dx, row0, tile_col, tile, own, drops ? masks : nullptr, accumulate);
        __syncwarp();
      }
      stage = stage == kStages - 1 ? 0 : stage + 1;
    }

    if constexpr (!kXPass) {
      S* plane = p.projected + static_cast<int64_t>(blockIdx.x) * p.s.rows * p.factor.rank;
      store_blocks<kVariant>(projected, plane, end, p.factor.rank, row0 + first_row, rank0, out_scale, lane, end,
                             of_rows.rank);
    }
  }

  S* plane = grouped && further < 0 ? p.grads : p.grad;
  plane += (!grouped ? static_cast<int64_t>(blockIdx.y) : further < 0 ? group : further) * p.factor.rank * p.in.cols;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    if (t >= p.column_tiles) break;
#pragma unroll
    for (int m = 0; m < kRankBlocks; ++m) {
      const int64_t col = col0 + t * kCols + warp * kWarpCols;
      store_blocks<kVariant>(grad[t][m], plane, p.factor.rank, p.in.cols, rank0 + m * 16, col, S(1), lane, of_rows.rank,
                             p.in.cols);
    }
  }
}

// Rows of a block, at least a tile.
int64_t part_of(const BackwardGeometry& g) { return max64(1, g.rows.tiles) * kTileRows; }

template <class M, int kRanks, bool kXPass, const auto& kVariants>
cudaError_t backward_as(const Matrix& in, const ConstPlanes& s, const Factor& factor, double scale,
                        const DeviceDropout& dropout, const Planes* projected, const Matrix* dx, bool accumulate,
                        const Planes& grad, bool early, const Groups& groups, void* grads, cudaStream_t stream) {
  using E = typename M::E;
  using S = typename M::S;
  const BackwardGeometry g = backward_geometry(s.rows, in.cols, factor.rank, sizeof(E), grouping_of(groups));
  const int64_t part = part_of(g);
  const BackwardParams<E, S> params{
      rows_of<const E>(in), plane_params<S>(s), factor_params(factor),
      // Of kept elements, in the x pass: both its products are of s.
      static_cast<S>(kXPass ? keep_scale(dropout) : scale), static_cast<S>(scale),
      projected ? static_cast<S*>(projected->data) : nullptr, static_cast<S*>(grad.data),
      dx ? rows_of<E>(*dx) : Rows<E>{}, dx != nullptr, accumulate, dropout.seed, dropout.threshold, g.column_tiles,
      static_cast<int32_t>(ceil_div(s.rows, kTileRows)), static_cast<int32_t>(g.rows.tiles),
      group_params(groups, factor, part), static_cast<S*>(grads)};
  const int64_t row_blocks = groups ? group_blocks(s.rows, part, groups.count) : g.rows.count;
  if (row_blocks == 0) return cudaSuccess;  // no groups and no rows
  const dim3 grid(static_cast<unsigned>(g.column_blocks), static_cast<unsigned>(row_blocks),
                  static_cast<unsigned>(g.rank_blocks));
  constexpr int kBytes = BackwardShared<E, kRanks>::kBytes;
  const bool whole = M::kWholeVariant && params.in.whole() && params.factor.whole() && params.s.aligned &&
                     (!kXPass || (dx && params.dx.whole()));
  const Variant wanted = variant_of(whole, groups, dropout.threshold != 0, accumulate);
  return with_variant<M, kVariants>(wanted, [&](auto variant) {
    return launch<backward_kernel<M, kRanks, kXPass, decltype(variant)::value>>(
        kXPass ? "shrink_backward" : "expand_backward", M::kName, grid, kThreads, SharedBytes{kBytes, kBytes}, early,
        stream, params);
  });
}

bool fits(const Matrix& in, const ConstPlanes& s, const Factor& factor, const Planes* projected, const Planes& grad,
          const Groups& groups) {
  const BackwardPlanes planes = backward_planes(in, factor.rank, groups);
  return grad.count == planes.factor_grad && (!projected || projected->count == planes.projected) &&
         s.rows == places_of(in, groups) && representable(factor, groups);
}

}  // namespace

BackwardPlanes backward_planes(const Matrix& activations, int64_t rank, const Groups& groups) {
  const int64_t rows = places_of(activations, groups);
  const BackwardGeometry g =
      backward_geometry(rows, activations.cols, rank, size_of(activations.dtype), grouping_of(groups));
  return {g.column_blocks, groups ? g.rows.count - 1 : g.rows.count, part_of(g)};
}

cudaError_t launch_expand_backward(const Matrix& dy, const ConstPlanes& s, const Factor& factor, double scale,
                                   const Planes& ds, const Planes& factor_grad, Float32 float32, cudaStream_t stream,
                                   const Groups& groups, void* grads) {
  if (factor.rank == 0) return cudaSuccess;
  if (!fits(dy, s, factor, &ds, factor_grad, groups)) return cudaErrorInvalidValue;
  return with_arithmetic(dy.dtype, float32, factor.rank, [&](auto arithmetic, auto ranks) {
    // It waits before it reads anything, so it may follow whatever comes before.
    return backward_as<decltype(arithmetic), decltype(ranks)::value, false, kDyPassVariants>(
        dy, s, factor, scale, {nullptr, 0}, &ds, nullptr, false, factor_grad, /*early=*/true, groups, grads, stream);
  });
}

int64_t shrink_backward_readers(const Matrix& x, int64_t rank, const Groups& groups) {
  return backward_planes(x, rank, groups).projected;
}

int64_t shrink_backward_fused_rank(DType dtype) { return wide_ranks(size_of(dtype)); }

cudaError_t launch_shrink_backward(const Matrix& x, const ConstPlanes& ds, const Factor& factor,
                                   const DeviceDropout& dropout, const Matrix& dx, bool accumulate,
                                   const Planes& factor_grad, bool early, Float32 float32, cudaStream_t stream,
                                   const Groups& groups, void* grads) {
  if (x.cols == 0) return cudaSuccess;
  if (!fits(x, ds, factor, nullptr, factor_grad, groups)) return cudaErrorInvalidValue;
  const bool fused = factor.rank > 0 && factor.rank <= shrink_backward_fused_rank(x.dtype);
  const cudaError_t error =
      factor.rank == 0 ? cudaSuccess : with_arithmetic(x.dtype, float32, factor.rank, [&](auto arithmetic, auto ranks) {
        return backward_as<decltype(arithmetic), decltype(ranks)::value, true, kXPassVariants>(
            x, ds, factor, 1.0, dropout, nullptr, fused ? &dx : nullptr, accumulate, factor_grad, early, groups, grads,
            stream);
      });
  if (error != cudaSuccess || fused) return error;
  ExpandOptions options;
  options.accumulate = accumulate;
  options.dropout = dropout;
  Groups unscaled = groups;  // dS is scaled already
  unscaled.scales = nullptr;
  return launch_expand(ds, factor, 1.0, dx, options, float32, stream, unscaled);
}

}  // namespace mos::cuda
