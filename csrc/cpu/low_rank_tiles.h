// The inner loops of low_rank_pass, compiled once per instruction set: low_rank.cpp includes this
// file repeatedly, each time with MOS_ISA (a namespace) and MOS_VECTOR_BYTES set and a `#pragma GCC
// target` in force. Hence no include guard.
//
// No function of another header may be *defined* here for the first time (std:: templates, say):
// the linker keeps one copy of an inline function, and it could be the AVX-512 one on a machine
// without it. Includes belong in low_rank.cpp.
//
// Everything works on staged tiles: fp32 (fp64 for fp64), 64-byte aligned, zero-padded to whole
// micro-tiles. Staging converts bf16/fp16, applies dropout and gathers shards, once per element;
// the micro-kernels then have no remainders.

namespace mos::cpu::MOS_ISA {

template <class T>
struct Vec {
  static constexpr int width = MOS_VECTOR_BYTES / sizeof(T);
  typedef T type __attribute__((vector_size(MOS_VECTOR_BYTES)));

  static inline type load(const T* p) { return *reinterpret_cast<const type*>(p); }
  static inline void store(T* p, type v) { *reinterpret_cast<type*>(p) = v; }
  // Lanes are added by halves: always the same order.
  static inline T sum(type v) {
    alignas(MOS_VECTOR_BYTES) T lane[width];
    store(lane, v);
    for (int half = width / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
    }
    return lane[0];
  }
};

// c[i][j] += sum_k x[i][k] * f[j][k] for a 4 x 2 block; k runs along both rows. Eight accumulators
// cover the latency of two FMA pipes (4-5 cycles x 2 per cycle); six loads feed eight FMAs, so the
// pipes and not the loads are the limit.
template <class T>
inline void dot_micro(int64_t n, const T* x, int64_t x_stride, const T* f, int64_t f_stride, T* c, int64_t c_stride) {
  using V = Vec<T>;
  typename V::type acc[4][2] = {};
  for (int64_t k = 0; k < n; k += V::width) {
    const auto f0 = V::load(f + k), f1 = V::load(f + f_stride + k);
    for (int i = 0; i < 4; ++i) {
      const auto xi = V::load(x + i * x_stride + k);
      acc[i][0] += xi * f0;
      acc[i][1] += xi * f1;
    }
  }
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 2; ++j) c[i * c_stride + j] += V::sum(acc[i][j]);
  }
}

// c[i][:] += sum_k a[i * a_row + k * a_k] * b[k][:] for 4 rows and 2 vectors of columns. The sum starts at zero and is
// added once: over 1024 rows in tiles of 16 that halves the rounding error of adding every product to c.
template <class T>
inline void broadcast_micro(int64_t n, const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t b_stride, T* c,
                            int64_t c_stride) {
  using V = Vec<T>;
  typename V::type acc[4][2] = {};
  for (int64_t k = 0; k < n; ++k) {
    const auto b0 = V::load(b + k * b_stride), b1 = V::load(b + k * b_stride + V::width);
    for (int i = 0; i < 4; ++i) {
      const T ai = a[i * a_row + k * a_k];
      acc[i][0] += ai * b0;
      acc[i][1] += ai * b1;
    }
  }
  for (int i = 0; i < 4; ++i) {
    V::store(c + i * c_stride, V::load(c + i * c_stride) + acc[i][0]);
    V::store(c + i * c_stride + V::width, V::load(c + i * c_stride + V::width) + acc[i][1]);
  }
}

// dst (tile) = m[t0 .. t0 + rows, c0 .. c0 + cols] converted, zero beyond.
template <class X, class T>
void stage_matrix(const Matrix& m, int64_t t0, int64_t rows, int64_t c0, int64_t cols, T* dst, const Tile& tile) {
  for (int64_t t = 0; t < tile.rows; ++t) {
    T* row = dst + t * tile.cols;
    int64_t c = 0;
    if (t < rows) {
      const X* src = static_cast<const X*>(m.data) + (t0 + t) * m.row_stride + c0;
      for (; c < cols; ++c) row[c] = static_cast<T>(src[c]);
    }
    for (; c < tile.cols; ++c) row[c] = T(0);
  }
}

// dst (tile) = columns c0 .. c0 + cols of the factor, zero beyond: the gather.
template <class P, class T>
void stage_factor(const Factor& f, int64_t c0, int64_t cols, T* dst, const Tile& tile) {
  const P* pool = static_cast<const P*>(f.pool);
  for (int64_t j = 0; j < tile.rows; ++j) {
    T* row = dst + j * tile.cols;
    int64_t c = 0;
    if (j < f.rank) {
      const int32_t* shard = f.index + j * f.shards_per_vector + c0 / f.shard_size;
      for (int64_t offset = c0 % f.shard_size; c < cols; ++shard, offset = 0) {
        const int64_t run = min64(cols - c, f.shard_size - offset);
        const P* src = pool + *shard * f.pool_stride + offset;
        for (int64_t k = 0; k < run; ++k) row[c + k] = static_cast<T>(src[k]);
        c += run;
      }
    }
    for (; c < tile.cols; ++c) row[c] = T(0);
  }
}

// mask (tile) = all ones where kept, 0 where dropped. Tiles start at a multiple of kDropoutGroup columns.
template <class U>
void stage_mask(const Dropout& d, int64_t t0, int64_t c0, U* mask, const Tile& tile) {
  for (int64_t t = 0; t < tile.rows; ++t) {
    for (int64_t c = 0; c < tile.cols; c += kDropoutGroup) {
      const PhiloxBlock block =
          philox(d.seed, static_cast<uint32_t>((c0 + c) / kDropoutGroup), static_cast<uint64_t>(t0 + t));
      for (int i = 0; i < kDropoutGroup; ++i) {
        mask[t * tile.cols + c + i] = dropout_bits(block, i) >= d.threshold ? ~U(0) : U(0);
      }
    }
  }
}

// x = keep * x where kept, 0 where dropped. By bits: a dropped element is zero whatever it was, and inf * 0 would be
// NaN.
template <class T, class U>
void apply_mask(const U* mask, T keep, const Tile& tile, T* x) {
  for (int64_t i = 0; i < tile.rows * tile.cols; ++i) x[i] = keep * bit_cast<T>(bit_cast<U>(x[i]) & mask[i]);
}

template <class X, class T>
void store_tile(const T* src, const Tile& tile, int64_t rows, int64_t cols, const Matrix& m, int64_t t0, int64_t c0,
                bool accumulate) {
  for (int64_t t = 0; t < rows; ++t) {
    const T* row = src + t * tile.cols;
    X* dst = static_cast<X*>(m.data) + (t0 + t) * m.row_stride + c0;
    if (accumulate) {
      for (int64_t c = 0; c < cols; ++c) dst[c] = round_to<X>(static_cast<T>(dst[c]) + row[c]);
    } else {
      for (int64_t c = 0; c < cols; ++c) dst[c] = round_to<X>(row[c]);
    }
  }
}

// The block (rows [t0, t1), columns [c0, c1)) of a pass. `projected` (t1 - t0, rank) and `grad` (rank_padded,
// grad_stride, pointing at column c0) are this block's own sums, zeroed by the caller; either may be null.
template <class T>
void run_block(const LowRankPass& p, const Block& b, const Scratch<T>& scratch, T* projected, T* grad,
               int64_t grad_stride) {
  const int64_t rank = p.factor.rank, rank_padded = round_up(rank, kRankMultiple);
  const DType dtype = p.activations().dtype;
  const bool dropout = p.dropout.active();
  const T keep = static_cast<T>(p.dropout.keep_scale());

  for (int64_t c0 = b.c0; c0 < b.c1; c0 += kColTile) {
    // Whole micro-tiles only: a narrow matrix must not pay for kColTile columns, nor a single row
    // for kRowTile.
    const int64_t cols = min64(kColTile, b.c1 - c0), cols_padded = round_up(cols, kColMultiple);
    if (projected || p.out) {
      dispatch_dtype(p.factor.dtype, [&](auto tag) {
        stage_factor<typename decltype(tag)::type>(p.factor, c0, cols, scratch.factor, Tile{rank_padded, cols_padded});
      });
    }
    for (int64_t t0 = b.t0; t0 < b.t1; t0 += kRowTile) {
      const int64_t rows = min64(kRowTile, b.t1 - t0);
      const Tile tile{round_up(rows, kRowMultiple), cols_padded};
      if (dropout) stage_mask(p.dropout, t0, c0, scratch.mask, tile);
      if (p.in) {
        dispatch_dtype(dtype, [&](auto tag) {
          stage_matrix<typename decltype(tag)::type>(*p.in, t0, rows, c0, cols, scratch.in, tile);
        });
        if (dropout) apply_mask(scratch.mask, keep, tile, scratch.in);
      }
      if (p.s) {
        const T* s = static_cast<const T*>(p.s) + t0 * rank;
        const T scale = static_cast<T>(p.scale);
        for (int64_t t = 0; t < tile.rows; ++t) {
          for (int64_t j = 0; j < rank_padded; ++j) {
            scratch.s[t * rank_padded + j] = t < rows && j < rank ? scale * s[t * rank + j] : T(0);
          }
        }
      }
      if (projected) {
        for (int64_t i = 0; i < tile.rows * rank_padded; ++i) scratch.projected[i] = T(0);
        for (int64_t t = 0; t < tile.rows; t += 4) {
          for (int64_t j = 0; j < rank_padded; j += 2) {
            dot_micro<T>(tile.cols, scratch.in + t * tile.cols, tile.cols, scratch.factor + j * tile.cols, tile.cols,
                         scratch.projected + t * rank_padded + j, rank_padded);
          }
        }
        T* sums = projected + (t0 - b.t0) * rank;
        for (int64_t t = 0; t < rows; ++t) {
          for (int64_t j = 0; j < rank; ++j) sums[t * rank + j] += scratch.projected[t * rank_padded + j];
        }
      }
      if (grad) {
        for (int64_t c = 0; c < tile.cols; c += 2 * Vec<T>::width) {
          for (int64_t j = 0; j < rank_padded; j += 4) {
            broadcast_micro<T>(tile.rows, scratch.s + j, 1, rank_padded, scratch.in + c, tile.cols,
                               grad + j * grad_stride + (c0 - b.c0) + c, grad_stride);
          }
        }
      }
      if (p.out) {
        for (int64_t i = 0; i < tile.rows * tile.cols; ++i) scratch.out[i] = T(0);
        for (int64_t c = 0; c < tile.cols; c += 2 * Vec<T>::width) {
          for (int64_t t = 0; t < tile.rows; t += 4) {
            broadcast_micro<T>(rank, scratch.s + t * rank_padded, rank_padded, 1, scratch.factor + c, tile.cols,
                               scratch.out + t * tile.cols + c, tile.cols);
          }
        }
        if (dropout) apply_mask(scratch.mask, keep, tile, scratch.out);
        dispatch_dtype(dtype, [&](auto tag) {
          store_tile<typename decltype(tag)::type>(scratch.out, tile, rows, cols, *p.out, t0, c0, p.accumulate);
        });
      }
    }
  }
}

inline void run_block_f32(const LowRankPass& p, const Block& b, const Scratch<float>& scratch, float* projected,
                          float* grad, int64_t grad_stride) {
  run_block<float>(p, b, scratch, projected, grad, grad_stride);
}

inline void run_block_f64(const LowRankPass& p, const Block& b, const Scratch<double>& scratch, double* projected,
                          double* grad, int64_t grad_stride) {
  run_block<double>(p, b, scratch, projected, grad, grad_stride);
}

}  // namespace mos::cpu::MOS_ISA
