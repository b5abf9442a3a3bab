// K2: y = scale * s F + bias, or y += scale * s F, with F read from the pool.
//
// A block owns a range of columns, whose part of F it reads once into shared memory, and a range of rows. Its threads
// add the planes of s for 64 rows together; then its warps go their own way: each multiplies its 16 rows and writes
// whole 16-byte vectors of y through its own strip of shared memory. Ranks beyond one step (64 for 16-bit elements)
// reload s and F for every tile.
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
  S keep_scale;
  S* s_sum;
  int32_t ranks, column_tiles;
  int64_t row_tiles, row_tiles_of_part;
};

constexpr int kExpandGroups = kExpandCols / kGroup;
template <class E>
constexpr int kExpandYPitch = pitch_of(kExpandCols, sizeof(E));

template <class M, bool kWhole>
__global__ void __launch_bounds__(kThreads, sizeof(typename M::E) == 8 ? 2 : 4)
    expand_kernel(const __grid_constant__ ExpandParams<typename M::E, typename M::S> p) {
  using E = typename M::E;
  using S = typename M::S;
  constexpr int kOwn = kWarpRows * kExpandGroups / kWarp, kSize = sizeof(E), kBlocks = kExpandCols / 16;
  MOS_DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x % kWarp, first_row = threadIdx.x / kWarp * kWarpRows;
  const int64_t col0 = blockIdx.x * static_cast<int64_t>(p.column_tiles * kExpandCols);
  const int64_t tile0 = blockIdx.y * p.row_tiles_of_part, tile_end = min64(tile0 + p.row_tiles_of_part, p.row_tiles);
  const int factor_pitch = pitch_of(p.column_tiles * kExpandCols, kSize), s_pitch = pitch_of(p.ranks, kSize);
  const SharedMatrix<E> factor = shared_matrix<E>(shared, factor_pitch);
  const SharedMatrix<E> s = shared_matrix<E>(shared + p.ranks * factor_pitch, s_pitch);
  const SharedMatrix<E> y = shared_matrix<E>(s.data + kTileRows * s_pitch, kExpandYPitch<E>);
  S* bias = reinterpret_cast<S*>(y.data + kTileRows * kExpandYPitch<E>);
  unsigned char* keep = reinterpret_cast<unsigned char*>(bias + p.column_tiles * kExpandCols);
  const bool one_step = p.factor.rank <= p.ranks;
  S* s_sum = blockIdx.x == 0 ? p.s_sum : nullptr;

  const auto load_s = [&](int64_t row0, int rank0) {
    load_sums<8>(s, p.s, row0, 0, kTileRows, rank0, p.ranks, p.scale, s_sum, static_cast<int>(threadIdx.x), kThreads);
  };

  if (p.bias) {
    for (int i = threadIdx.x; i < p.column_tiles * kExpandCols; i += kThreads) {
      bias[i] = col0 + i < p.y.cols ? to_sum(p.bias[col0 + i]) : S(0);
    }
  }
  if (one_step) load_factor<kWhole>(factor, p.factor, 0, p.ranks, col0, p.column_tiles * kExpandCols);
  for (int64_t tile = tile0; tile < tile_end; ++tile) {
    const int64_t row0 = tile * kTileRows;
    if (one_step) {
      __syncthreads();  // everyone is done with s of the tile before
      load_s(row0, 0);
      __syncthreads();  // s is complete, and so are F and the bias
    }
    for (int column_tile = 0; column_tile < p.column_tiles; ++column_tile) {
      const int64_t col_y = col0 + column_tile * kExpandCols;
      if (col_y >= p.y.cols && column_tile > 0) break;
      Block<S> sums[kBlocks];
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) clear(sums[n]);
      for (int rank0 = 0; rank0 < p.factor.rank; rank0 += p.ranks) {
        if (!one_step) {
          __syncthreads();  // everyone is done with the step before
          load_factor<kWhole>(factor, p.factor, rank0, p.ranks, col_y, kExpandCols);
          load_s(row0, rank0);
          __syncthreads();
        }
#pragma unroll 1
        for (int k = 0; k < p.ranks; k += M::kStep) {
          const typename M::A a = M::a_rows(s, first_row, k, lane);
#pragma unroll
          for (int n = 0; n < kBlocks; ++n) {
            M::multiply(sums[n], a, M::b_cols(factor, k, column_tile * kExpandCols + n * 16, lane));
          }
        }
      }

      // From here on a warp is alone with its 16 rows of the tile.
#pragma unroll 1
      for (int j = 0; j < kOwn; ++j) {
        const int i = j * kWarp + lane, row = first_row + i / kExpandGroups, group = i % kExpandGroups;
        const int64_t at = col_y + group * kGroup;
        if (p.accumulate && row0 + row < p.y.rows && at < p.y.cols) {
          copy_group<kWhole>(y.at(row, group * kGroup), p.y.at(row0 + row, at), p.y.aligned, p.y.cols - at);
        }
        if (p.threshold) {
          const uint32_t bits = keep_mask(p.seed, p.threshold, row0 + row, at).bits();
          keep[row * kExpandGroups + group] = static_cast<unsigned char>(bits);
        }
      }
      __syncwarp();
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
        for_each_pair(sums[n], lane, [&](int r, int c, S first, S second) {
          const int row = first_row + r, col = n * 16 + c;
          E* target = y.at(row, col);
          if (p.threshold) {
            const unsigned kept = keep[row * kExpandGroups + col / kGroup] >> col % kGroup;
            first = kept & 1 ? first * p.keep_scale : S(0);
            second = kept & 2 ? second * p.keep_scale : S(0);
          }
          if (p.bias) {
            first += bias[column_tile * kExpandCols + col];
            second += bias[column_tile * kExpandCols + col + 1];
          }
          if (p.accumulate) {
            first += to_sum(target[0]);
            second += to_sum(target[1]);
          }
          store_pair(target, first, second);
        });
      }
      __syncwarp();
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        const int i = j * kWarp + lane, row = first_row + i / kExpandGroups, col = i % kExpandGroups * kGroup;
        const int64_t at = col_y + col;
        if (row0 + row < p.y.rows && at < p.y.cols) {
          copy_group<kWhole>(p.y.at(row0 + row, at), y.at(row, col), p.y.aligned, p.y.cols - at);
        }
      }
    }
  }
}

template <class M>
cudaError_t expand_as(const ConstPlanes& s, const Factor& factor, double scale, const Matrix& y,
                      const ExpandOptions& options, cudaStream_t stream) {
  using E = typename M::E;
  using S = typename M::S;
  const ExpandGeometry g = expand_geometry(y.rows, y.cols, factor.rank, sizeof(E));
  const ExpandParams<E, S> params{plane_params<S>(s),
                                  factor_params(factor),
                                  static_cast<S>(scale),
                                  rows_of<E>(y),
                                  static_cast<const E*>(options.bias),
                                  options.accumulate,
                                  options.dropout.seed,
                                  options.dropout.threshold,
                                  static_cast<S>(keep_scale(options.dropout)),
                                  static_cast<S*>(options.s_sum),
                                  g.ranks,
                                  g.column_tiles,
                                  ceil_div(y.rows, kTileRows),
                                  g.rows.tiles};
  const size_t shared_bytes = expand_shared(sizeof(E), g.ranks, g.column_tiles);
  const dim3 grid(static_cast<unsigned>(g.column_blocks), static_cast<unsigned>(g.rows.count));
  if constexpr (M::kWholeVariant) {
    if (params.y.whole() && params.factor.aligned) {
      return launch("expand", M::kName, expand_kernel<M, true>, grid, kThreads, shared_bytes, stream, params);
    }
  }
  return launch("expand", M::kName, expand_kernel<M, false>, grid, kThreads, shared_bytes, stream, params);
}

}  // namespace

int64_t expand_readers(const Matrix& y, int64_t rank) {
  return expand_geometry(y.rows, y.cols, rank, size_of(y.dtype)).column_blocks;
}

cudaError_t launch_expand(const ConstPlanes& s, const Factor& factor, double scale, const Matrix& y,
                          const ExpandOptions& options, Float32 float32, cudaStream_t stream) {
  if (y.rows == 0) return cudaSuccess;
  if (!representable(factor)) return cudaErrorInvalidValue;
  return with_arithmetic(y.dtype, float32, factor.rank, [&](auto arithmetic, auto) {
    return expand_as<decltype(arithmetic)>(s, factor, scale, y, options, stream);
  });
}

}  // namespace mos::cuda
