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
  S s_scale, out_scale, grad_scale;
  S* projected;  // planes of dS
  S* grad;       // planes of dF
  Rows<E> dx;
  bool write_dx, accumulate;
  const int64_t* seed;
  uint32_t threshold;
  int64_t row_tiles, row_tiles_of_part;
};

// Where things are in shared memory.
template <class E, int kRanks>
struct BackwardShared {
  static constexpr int kSize = sizeof(E), kCols = backward_cols(kSize), kTiles = backward_tiles(kSize, kRanks);
  static constexpr int kInPitch = pitch_of(kCols, kSize), kInBytes = kTileRows * kInPitch;
  static constexpr int kFactorPitch = pitch_of(kTiles * kCols, kSize), kSPitch = pitch_of(kRanks, kSize);
  static constexpr int kFactorAt = backward_stages(kSize) * kInBytes, kSAt = kFactorAt + kRanks * kFactorPitch;
  static constexpr int kKeepAt = kSAt + kTileRows * kSPitch, kBytes = kKeepAt + kTileRows * kCols / kGroup;
  static_assert(kBytes == backward_shared(kSize, kRanks));
};

// dx of one tile over the warp's 16 rows of it in shared memory: ds F, times scale, plus what is there.
template <class M, int kRanks, class Finish>
MOS_DEVICE void multiply_tile(const SharedMatrix<typename M::E>& tile, const SharedMatrix<typename M::E>& s,
                              const SharedMatrix<typename M::E>& factor, int first_row, int factor_col, int cols,
                              int lane, const Finish& finish) {
  // Fragments of tensor cores are small: all of the warp's s at once. Volatile loads are not hoisted by the compiler.
  constexpr bool kHoist = sizeof(typename M::E) == 2;
  typename M::A a[kHoist ? kRanks / M::kStep : 1];
  if constexpr (kHoist) {
#pragma unroll
    for (int k = 0; k < kRanks; k += M::kStep) a[k / M::kStep] = M::a_rows(s, first_row, k, lane);
  }
#pragma unroll 2
  for (int n = 0; n < cols; n += 16) {
    Block<typename M::S> sums;
    clear(sums);
#pragma unroll(kHoist ? kRanks / M::kStep : M::kUnroll)
    for (int k = 0; k < kRanks; k += M::kStep) {
      if constexpr (!kHoist) a[0] = M::a_rows(s, first_row, k, lane);
      M::multiply(sums, a[kHoist ? k / M::kStep : 0], M::b_cols(factor, k, factor_col + n, lane));
    }
    for_each_pair(sums, lane, [&](int r, int c, typename M::S first, typename M::S second) {
      finish(first_row + r, n + c, tile.at(first_row + r, n + c), first, second);
    });
  }
}

template <class M, int kRanks, bool kXPass, bool kWhole>
__global__ void __launch_bounds__(kThreads, kRanks == 64 ? 2 : 3)
    backward_kernel(const __grid_constant__ BackwardParams<typename M::E, typename M::S> p) {
  using E = typename M::E;
  using S = typename M::S;
  using Shared = BackwardShared<E, kRanks>;
  constexpr int kCols = Shared::kCols, kTiles = Shared::kTiles, kGroups = kCols / kGroup;
  constexpr int kStages = backward_stages(sizeof(E)), kAhead = kStages - 1;
  constexpr int kOwn = kWarpRows * kGroups / kWarp, kRankBlocks = kRanks / 16;
  constexpr int kWarpCols = kCols / kWarps, kGradBlocks = kWarpCols / 16;
  MOS_DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, first_row = warp * kWarpRows;
  const int64_t col0 = blockIdx.x * static_cast<int64_t>(kTiles * kCols);
  const int64_t tile0 = blockIdx.y * p.row_tiles_of_part, tile_end = min64(tile0 + p.row_tiles_of_part, p.row_tiles);
  const int rank0 = blockIdx.z * kRanks;
  const SharedMatrix<E> factor = shared_matrix<E>(shared + Shared::kFactorAt, Shared::kFactorPitch);
  const SharedMatrix<E> s = shared_matrix<E>(shared + Shared::kSAt, Shared::kSPitch);
  unsigned char* keep = shared + Shared::kKeepAt;

  const auto load = [&](int stage, int64_t row_tile, int column_tile) {
    const SharedMatrix<E> tile = shared_matrix<E>(shared + stage * Shared::kInBytes, Shared::kInPitch);
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int i = j * kWarp + lane, row = first_row + i / kGroups, col = i % kGroups * kGroup;
      load_group<kWhole>(tile.at(row, col), p.in, row_tile * kTileRows + row, col0 + column_tile * kCols + col);
    }
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

  // Tiles are visited row by row; `load` runs kAhead tiles ahead.
#pragma unroll
  for (int t = 0; t < kAhead; ++t) {
    if (tile0 + t / kTiles < tile_end) load(t, tile0 + t / kTiles, t % kTiles);
    cp_async_commit();
  }
  load_factor<kWhole>(factor, p.factor, rank0, kRanks, col0, kTiles * kCols);
  int stage = 0;
  for (int64_t row_tile = tile0; row_tile < tile_end; ++row_tile) {
    const int64_t row0 = row_tile * kTileRows;
    __syncthreads();  // nobody needs s of the tile before any more
    load_sums<4>(s, p.s, row0, first_row, kWarpRows, rank0, kRanks, p.s_scale, static_cast<S*>(nullptr), lane, kWarp);
    Block<S> projected[kXPass ? 1 : kRankBlocks];
    if constexpr (!kXPass) {
#pragma unroll
      for (int n = 0; n < kRankBlocks; ++n) clear(projected[n]);
    }

#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const SharedMatrix<E> tile = shared_matrix<E>(shared + stage * Shared::kInBytes, Shared::kInPitch);
      const int64_t tile_col = col0 + t * kCols;
      cp_async_wait<kAhead - 1>();
      if (kXPass && p.threshold) {
#pragma unroll 1
        for (int j = 0; j < kOwn; ++j) {
          const int i = j * kWarp + lane, row = first_row + i / kGroups, group = i % kGroups;
          const KeepMask mask = keep_mask(p.seed, p.threshold, row0 + row, tile_col + group * kGroup);
          drop_group(tile.at(row, group * kGroup), mask);
          keep[row * kGroups + group] = static_cast<unsigned char>(mask.bits());
        }
      }
      __syncthreads();  // the tile and s are complete, and the stage of the tile before is free
      {
        const int64_t row_ahead = row_tile + (t + kAhead) / kTiles;
        const int stage_ahead = stage == 0 ? kStages - 1 : stage - 1;
        if (row_ahead < tile_end) load(stage_ahead, row_ahead, (t + kAhead) % kTiles);
        cp_async_commit();
      }

      if constexpr (!kXPass) {
#pragma unroll M::kUnroll
        for (int k = 0; k < kCols; k += M::kStep) {
          const typename M::A a = M::a_rows(tile, first_row, k, lane);
#pragma unroll
          for (int n = 0; n < kRankBlocks; ++n) {
            M::multiply(projected[n], a, M::b_rows(factor, n * 16, t * kCols + k, lane));
          }
        }
      }
#pragma unroll M::kUnroll
      for (int k = 0; k < kTileRows; k += M::kStep) {
        typename M::B b[kGradBlocks];
#pragma unroll
        for (int n = 0; n < kGradBlocks; ++n) b[n] = M::b_cols(tile, k, warp * kWarpCols + n * 16, lane);
#pragma unroll
        for (int m = 0; m < kRankBlocks; ++m) {
          const typename M::A a = M::a_cols(s, k, m * 16, lane);
#pragma unroll
          for (int n = 0; n < kGradBlocks; ++n) M::multiply(grad[t][m][n], a, b[n]);
        }
      }

      if (kXPass && p.write_dx) {
        __syncthreads();  // nobody reads x of this tile any more: each warp writes dx over its rows
        if (p.accumulate) {
#pragma unroll 1
          for (int j = 0; j < kOwn; ++j) {
            const int i = j * kWarp + lane, row = first_row + i / kGroups, col = i % kGroups * kGroup;
            const int64_t at = tile_col + col;
            if (row0 + row < p.dx.rows && at < p.dx.cols) {
              copy_group<kWhole>(tile.at(row, col), p.dx.at(row0 + row, at), p.dx.aligned, p.dx.cols - at);
            }
          }
          __syncwarp();
        }
        const auto finish = [&](int row, int col, E* target, S first, S second) {
          first *= p.out_scale;
          second *= p.out_scale;
          if (p.threshold) {
            const unsigned kept = keep[row * kGroups + col / kGroup] >> col % kGroup;
            first = kept & 1 ? first : S(0);
            second = kept & 2 ? second : S(0);
          }
          if (p.accumulate) {
            first += to_sum(target[0]);
            second += to_sum(target[1]);
          }
          store_pair(target, first, second);
        };
        multiply_tile<M, kRanks>(tile, s, factor, first_row, t * kCols, kCols, lane, finish);
        __syncwarp();
#pragma unroll 4
        for (int j = 0; j < kOwn; ++j) {
          const int i = j * kWarp + lane, row = first_row + i / kGroups, col = i % kGroups * kGroup;
          const int64_t at = tile_col + col;
          if (row0 + row < p.dx.rows && at < p.dx.cols) {
            copy_group<kWhole>(p.dx.at(row0 + row, at), tile.at(row, col), p.dx.aligned, p.dx.cols - at);
          }
        }
      }
      stage = stage == kStages - 1 ? 0 : stage + 1;
    }

    if constexpr (!kXPass) {
      S* plane = p.projected + static_cast<int64_t>(blockIdx.x) * p.in.rows * p.factor.rank;
#pragma unroll
      for (int n = 0; n < kRankBlocks; ++n) {
        const int rank = rank0 + n * 16;
        store_block(projected[n], plane, p.in.rows, p.factor.rank, row0 + first_row, rank, p.out_scale, lane);
      }
    }
  }

  S* plane = p.grad + static_cast<int64_t>(blockIdx.y) * p.factor.rank * p.in.cols;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int m = 0; m < kRankBlocks; ++m) {
#pragma unroll
      for (int n = 0; n < kGradBlocks; ++n) {
        const int64_t col = col0 + t * kCols + warp * kWarpCols + n * 16;
        store_block(grad[t][m][n], plane, p.factor.rank, p.in.cols, rank0 + m * 16, col, p.grad_scale, lane);
      }
    }
  }
}

template <class M, int kRanks, bool kXPass>
cudaError_t backward_as(const Matrix& in, const ConstPlanes& s, const Factor& factor, double scale,
                        const DeviceDropout& dropout, const Planes* projected, const Matrix* dx, bool accumulate,
                        const Planes& grad, cudaStream_t stream) {
  using E = typename M::E;
  using S = typename M::S;
  const BackwardGeometry g = backward_geometry(in.rows, in.cols, factor.rank, sizeof(E));
  const S kept = static_cast<S>(keep_scale(dropout));
  const BackwardParams<E, S> params{rows_of<const E>(in),
                                    plane_params<S>(s),
                                    factor_params(factor),
                                    static_cast<S>(kXPass ? 1.0 : scale),
                                    kXPass ? kept : static_cast<S>(scale),
                                    kXPass ? kept : S(1),
                                    projected ? static_cast<S*>(projected->data) : nullptr,
                                    static_cast<S*>(grad.data),
                                    dx ? rows_of<E>(*dx) : Rows<E>{},
                                    dx != nullptr,
                                    accumulate,
                                    dropout.seed,
                                    dropout.threshold,
                                    ceil_div(in.rows, kTileRows),
                                    g.rows.tiles};
  const dim3 grid(static_cast<unsigned>(g.column_blocks), static_cast<unsigned>(g.rows.count),
                  static_cast<unsigned>(g.rank_blocks));
  const char* name = kXPass ? "shrink_backward" : "expand_backward";
  constexpr size_t kBytes = BackwardShared<E, kRanks>::kBytes;
  if constexpr (M::kWholeVariant) {
    if (params.in.whole() && params.factor.aligned && (!dx || params.dx.aligned)) {
      return launch(name, M::kName, backward_kernel<M, kRanks, kXPass, true>, grid, kThreads, kBytes, stream, params);
    }
  }
  return launch(name, M::kName, backward_kernel<M, kRanks, kXPass, false>, grid, kThreads, kBytes, stream, params);
}

bool wanted(const Matrix& in, const Factor& factor, const Planes* projected, const Planes& grad) {
  const BackwardPlanes planes = backward_planes(in, factor.rank);
  return grad.count == planes.factor_grad && (!projected || projected->count == planes.projected);
}

}  // namespace

BackwardPlanes backward_planes(const Matrix& activations, int64_t rank) {
  const BackwardGeometry g = backward_geometry(activations.rows, activations.cols, rank, size_of(activations.dtype));
  return {g.column_blocks, g.rows.count};
}

cudaError_t launch_expand_backward(const Matrix& dy, const ConstPlanes& s, const Factor& factor, double scale,
                                   const Planes& ds, const Planes& factor_grad, Float32 float32, cudaStream_t stream) {
  if (factor.rank == 0) return cudaSuccess;
  if (!wanted(dy, factor, &ds, factor_grad) || !representable(factor)) return cudaErrorInvalidValue;
  return with_arithmetic(dy.dtype, float32, factor.rank, [&](auto arithmetic, auto ranks) {
    return backward_as<decltype(arithmetic), decltype(ranks)::value, false>(dy, s, factor, scale, {nullptr, 0}, &ds,
                                                                            nullptr, false, factor_grad, stream);
  });
}

int64_t shrink_backward_readers(const Matrix& x, int64_t rank) {
  return backward_geometry(x.rows, x.cols, rank, size_of(x.dtype)).column_blocks;
}

int64_t shrink_backward_fused_rank(DType dtype) { return wide_ranks(size_of(dtype)); }

cudaError_t launch_shrink_backward(const Matrix& x, const ConstPlanes& ds, const Factor& factor,
                                   const DeviceDropout& dropout, const Matrix& dx, bool accumulate,
                                   const Planes& factor_grad, Float32 float32, cudaStream_t stream) {
  if (x.cols == 0) return cudaSuccess;
  if (!wanted(x, factor, nullptr, factor_grad) || !representable(factor)) return cudaErrorInvalidValue;
  const bool fused = factor.rank > 0 && factor.rank <= shrink_backward_fused_rank(x.dtype);
  const cudaError_t error =
      factor.rank == 0 ? cudaSuccess : with_arithmetic(x.dtype, float32, factor.rank, [&](auto arithmetic, auto ranks) {
        return backward_as<decltype(arithmetic), decltype(ranks)::value, true>(
            x, ds, factor, 1.0, dropout, nullptr, fused ? &dx : nullptr, accumulate, factor_grad, stream);
      });
  if (error != cudaSuccess || fused) return error;
  ExpandOptions options;
  options.accumulate = accumulate;
  options.dropout = dropout;
  return launch_expand(ds, factor, 1.0, dx, options, float32, stream);
}

}  // namespace mos::cuda
