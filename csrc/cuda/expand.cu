// K2: y = scale * s F + bias, or y += scale * s F, with F read from the pool.
//
// A block owns a range of columns, whose part of F it reads once into shared memory, and a range of rows. Its warps
// then go their own way: each sums the planes of s for its 16 rows, multiplies, and writes whole 16-byte vectors of y
// through its own strip of shared memory. Ranks beyond one step (64 for 16-bit elements) reload s and F for every tile.
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

template <class M>
__global__ void __launch_bounds__(kThreads, sizeof(typename M::E) == 8 ? 3 : 4)
    expand_kernel(const __grid_constant__ ExpandParams<typename M::E, typename M::S> p) {
  using E = typename M::E;
  using S = typename M::S;
  constexpr int kOwn = kWarpRows * kExpandGroups / kWarp, kSize = sizeof(E);
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

  if (p.bias) {
    for (int i = threadIdx.x; i < p.column_tiles * kExpandCols; i += kThreads) {
      bias[i] = col0 + i < p.y.cols ? to_sum(p.bias[col0 + i]) : S(0);
    }
  }
  if (one_step) load_factor(factor, p.factor, 0, p.ranks, col0, p.column_tiles * kExpandCols);
  __syncthreads();
  for (int64_t tile = tile0; tile < tile_end; ++tile) {
    const int64_t row0 = tile * kTileRows;
    if (one_step) {
      load_sums(s, p.s, row0, p.y.rows, 0, p.ranks, p.scale, s_sum, first_row, lane);
      __syncwarp();
    }
    for (int column_tile = 0; column_tile < p.column_tiles; ++column_tile) {
      const int64_t col_y = col0 + column_tile * kExpandCols;
      if (col_y >= p.y.cols) break;
      Block<S> sums[kExpandCols / 16];
#pragma unroll
      for (int n = 0; n < kExpandCols / 16; ++n) clear(sums[n]);
      for (int rank0 = 0; rank0 < p.factor.rank; rank0 += p.ranks) {
        if (!one_step) {
          __syncthreads();  // everyone is done with the step before
          load_factor(factor, p.factor, rank0, p.ranks, col_y, kExpandCols);
          load_sums(s, p.s, row0, p.y.rows, rank0, p.ranks, p.scale, s_sum, first_row, lane);
          __syncthreads();
        }
#pragma unroll 1
        for (int k = 0; k < p.ranks; k += M::kStep) {
          const typename M::A a = M::a_rows(s, first_row, k, lane);
#pragma unroll
          for (int n = 0; n < kExpandCols / 16; ++n) {
            M::multiply(sums[n], a, M::b_cols(factor, k, column_tile * kExpandCols + n * 16, lane));
          }
        }
      }

      // From here on a warp is alone with its 16 rows of the tile.
#pragma unroll 1
      for (int j = 0; j < kOwn; ++j) {
        const int i = j * kWarp + lane, row = first_row + i / kExpandGroups, group = i % kExpandGroups;
        if (p.accumulate && row0 + row < p.y.rows && col_y + group * kGroup < p.y.cols) {
          read_group(y.at(row, group * kGroup), p.y, row0 + row, col_y + group * kGroup);
        }
        if (p.threshold) {
          keep[row * kExpandGroups + group] = static_cast<unsigned char>(
              keep_bits(static_cast<uint64_t>(*p.seed), p.threshold, row0 + row, col_y + group * kGroup));
        }
      }
      __syncwarp();
#pragma unroll
      for (int n = 0; n < kExpandCols / 16; ++n) {
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
#pragma unroll 1
      for (int j = 0; j < kOwn; ++j) {
        const int i = j * kWarp + lane, row = first_row + i / kExpandGroups, col = i % kExpandGroups * kGroup;
        if (row0 + row < p.y.rows && col_y + col < p.y.cols) store_group(p.y, row0 + row, col_y + col, y.at(row, col));
      }
      __syncwarp();  // the strip is free again
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
  return launch("expand", M::kName, expand_kernel<M>, grid, kThreads, shared_bytes, stream, params);
}

}  // namespace

int64_t expand_readers(const Matrix& y, int64_t rank) {
  return expand_geometry(y.rows, y.cols, rank, size_of(y.dtype)).column_blocks;
}

cudaError_t launch_expand(const ConstPlanes& s, const Factor& factor, double scale, const Matrix& y,
                          const ExpandOptions& options, Float32 float32, cudaStream_t stream) {
  if (y.rows == 0 || y.cols == 0) return cudaSuccess;
  return with_arithmetic(y.dtype, float32, factor.rank, [&](auto arithmetic, auto) {
    return expand_as<decltype(arithmetic)>(s, factor, scale, y, options, stream);
  });
}

}  // namespace mos::cuda
