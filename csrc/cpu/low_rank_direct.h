// Products of few rows against a factor that is read where it lies: nothing is gathered, converted or laid out ahead.
// Compiled once per instruction set, at the end of low_rank_tiles.h, whose rules hold here too.
//
// Vectors lie along columns. A sum over columns is kept in lanes, which are added up at the end of a tile; a sum over
// ranks is one lane's. Every sum has one order, whichever rows and ranks share its registers, so a row's result has the
// same bits alone and among others.

namespace mos::cpu::MOS_ISA {

// Sums in registers: half of the 32 that there are, or half of 16.
#if MOS_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int kSumsHeld = 16;
#else
constexpr int kSumsHeld = 8;
#endif
constexpr int kRowsHeld = 4;

// The sum of all lanes.
template <int kHalf, class V, int... kLane>
inline auto sum_of_lanes(V v, Lanes<kLane...> lanes) {
  v += MOS_SHUFFLE(V, v, v, (kLane ^ kHalf)...);
  if constexpr (kHalf > 1) {
    return sum_of_lanes<kHalf / 2>(v, lanes);
  } else {
    return v[0];
  }
}

// The columns of a factor from c0 to c1, shard by shard. A run of a shard's columns is whole vectors and then, where
// columns are left, its `last` vector, which begins earlier: shards have at least a vector's columns (`kLeast`), so
// memory need not be asked for beyond them.
struct Run {
  int64_t shard, offset, columns;

  Run(const Factor& f, int64_t c0, int64_t c1)
      : shard(c0 / f.shard_size), offset(c0 % f.shard_size), columns(min64(c1 - c0, f.shard_size - offset)) {}
  // To the next, which begins at column c.
  void advance(const Factor& f, int64_t c, int64_t c1) { ++shard, offset = 0, columns = min64(c1 - c, f.shard_size); }
  int64_t whole(int64_t width) const { return columns / width * width; }
  // Where the last vector begins, counted from the run's first column.
  int64_t last(int64_t width) const { return max64(0, offset + columns - width) - offset; }
};

template <class P>
inline const P* shard_row(const Factor& f, int64_t j, const Run& run) {
  return static_cast<const P*>(f.pool) + f.index[j * f.shards_per_vector + run.shard] * f.pool_stride + run.offset;
}

// Columns [c0, c1) of a row of x as `dots` reads them: numbers T, and zeros where a last vector repeats columns or goes
// beyond its run. (An infinity of the factor times such a zero is a NaN where it would have been an infinity.)
template <class X, class T>
inline void stage_runs(const Factor& f, const X* x, int64_t c0, int64_t c1, T* dst) {
  constexpr int64_t n = Vec<T>::width;
  int64_t c = c0;
  for (Run run(f, c0, c1); c < c1; run.advance(f, c, c1)) {
    const int64_t whole = run.whole(n), last = run.last(n);
    for (int64_t k = 0; k < whole; k += n, dst += n) Vec<T>::store(dst, widened<X, T>(x + c + k));
    if (whole < run.columns) {
      for (int64_t i = 0; i < n; ++i) dst[i] = T(0);
      for (int64_t k = whole; k < run.columns; ++k) dst[k - last] = static_cast<T>(x[c + k]);
      dst += n;
    }
    c += run.columns;
  }
}

// sums (R, J) += x F^T for R rows of x and J ranks from j on, over columns [c0, c1).
template <class P, class T, int R, int J>
inline void dots(const Factor& f, int64_t c0, int64_t c1, int64_t j, const T* x, const int64_t* x_rows, T* sums,
                 int64_t sums_stride) {
  using V = Vec<T>;
  typename V::type acc[R][J] = {};
  int64_t c = c0;
  for (Run run(f, c0, c1); c < c1; run.advance(f, c, c1)) {
    const P* row[J];
    MOS_UNROLL
    for (int i = 0; i < J; ++i) row[i] = shard_row<P>(f, j + i, run);
    const int64_t whole = run.whole(V::width);
    for (int64_t k = 0; k < run.columns; k += V::width, x += V::width) {
      const int64_t from = k < whole ? k : run.last(V::width);
      typename V::type b[J];
      MOS_UNROLL
      for (int i = 0; i < J; ++i) b[i] = widened<P, T>(row[i] + from);
      MOS_UNROLL
      for (int t = 0; t < R; ++t) {
        const typename V::type a = V::load(x + x_rows[t]);
        MOS_UNROLL
        for (int i = 0; i < J; ++i) acc[t][i] += a * b[i];
      }
    }
    c += run.columns;
  }
  MOS_UNROLL
  for (int t = 0; t < R; ++t) {
    MOS_UNROLL
    for (int i = 0; i < J; ++i) {
      sums[t * sums_stride + i] += sum_of_lanes<V::width / 2>(acc[t][i], FirstLanes<V::width>());
    }
  }
}

// y (R rows, V vectors of columns; of one vector, lanes [first, end)) (+)= scale * s F. `y` is where each row has the
// first of the columns, `row` the address of rank 0's there if its shard were the pool's first.
template <class P, class T, class X, int R, int V>
inline void combine(const Factor& f, const P* row, const int32_t* index, T scale, const T* s, int64_t s_stride,
                    X* const* y, int64_t c, bool accumulate, int64_t first = 0, int64_t end = 0) {
  using L = Vec<T>;
  constexpr int n = L::width;
  typename L::type acc[R][V] = {};
  for (int64_t j = 0; j < f.rank; ++j) {
    const P* p = row + index[j * f.shards_per_vector] * f.pool_stride;
    typename L::type b[V];
    MOS_UNROLL
    for (int v = 0; v < V; ++v) b[v] = widened<P, T>(p + v * n);
    MOS_UNROLL
    for (int t = 0; t < R; ++t) {
      const T a = scale * s[t * s_stride + j];
      MOS_UNROLL
      for (int v = 0; v < V; ++v) acc[t][v] += a * b[v];
    }
  }
  MOS_UNROLL
  for (int t = 0; t < R; ++t) {
    MOS_UNROLL
    for (int v = 0; v < V; ++v) {
      X* to = y[t] + c + v * n;
      X lane[n] = {};
      const bool part = V == 1 && end != 0;
      if (part) {
        for (int64_t i = first; i < end; ++i) lane[i] = to[i];
      }
      X* at = part ? lane : to;
      // (Scaled here, the product and the addition would be fused in some of the variants and not in others.)
      narrow_to<X, T>(at, accumulate ? widened<X, T>(at) + acc[t][v] : acc[t][v]);
      if (part) {
        for (int64_t i = first; i < end; ++i) to[i] = lane[i];
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------ one block

// Pools that are read directly: float, or of the activations' type.
template <class X, class Function>
inline void with_pool_type(DType pool, const Function& function) {
  if (pool == DType::f32) return function(Tag<float>());
  if constexpr (!std::is_same_v<X, float>) function(Tag<X>());
}

// sums (rows, ranks of the factor), zeroed by the caller, += x F^T over rows [t0, t1) and columns [c0, c1), at most
// kDirectCols.
template <class T, class X>
void project_direct_over(const LowRankPass& p, const Block& b, T* sums) {
  constexpr int64_t n = Vec<T>::width;
  const Factor& f = p.factor;
  const RowsOf lies(p.groups, *p.in, b.t0);
  const X* column = static_cast<const X*>(p.in->data) + b.c0;
  const bool as_it_lies = sizeof(X) == sizeof(T) && f.shard_size % n == 0;
  // A run has a last vector, and is, but for the first and the last, at least a vector long.
  alignas(MOS_VECTOR_BYTES) T staged[kRowsHeld][2 * kDirectCols + 2 * n];
  in_pieces<kRowsHeld>(b.t1 - b.t0, [&](auto rows, int64_t t) {
    constexpr int R = decltype(rows)::value;
    const T* x = reinterpret_cast<const T*>(column);
    int64_t x_rows[R];
    for (int i = 0; i < R; ++i) x_rows[i] = lies[t + i];
    if (!as_it_lies) {
      for (int i = 0; i < R; ++i) {
        stage_runs<X, T>(f, column + x_rows[i] - b.c0, b.c0, b.c1, staged[i]);
        x_rows[i] = staged[i] - staged[0];
      }
      x = staged[0];
    }
    with_pool_type<X>(f.dtype, [&](auto tag) {
      in_pieces<(kSumsHeld / R < 8 ? kSumsHeld / R : 8)>(f.rank, [&](auto ranks, int64_t j) {
        dots<typename decltype(tag)::type, T, R, decltype(ranks)::value>(f, b.c0, b.c1, j, x, x_rows,
                                                                         sums + t * b.sum_stride + j, b.sum_stride);
      });
    });
  });
}

// out (+)= scale * s F over rows [t0, t1) and columns [c0, c1).
template <class T, class X>
void expand_direct_over(const LowRankPass& p, const Block& b) {
  constexpr int64_t n = Vec<T>::width;
  const Factor& f = p.factor;
  const RowsOf lies(p.groups, *p.out, b.t0);
  const T scale = static_cast<T>(p.scale);
  with_pool_type<X>(f.dtype, [&](auto tag) {
    using P = typename decltype(tag)::type;
    int64_t c = b.c0;
    for (Run run(f, b.c0, b.c1); c < b.c1; run.advance(f, c, b.c1)) {
      const int32_t* index = f.index + run.shard;
      const P* row = static_cast<const P*>(f.pool) + run.offset;
      in_pieces<kRowsHeld>(b.t1 - b.t0, [&](auto rows, int64_t t) {
        constexpr int R = decltype(rows)::value;
        const T* s = static_cast<const T*>(p.s) + (b.t0 + t) * b.sum_stride;
        X* y[R];
        for (int i = 0; i < R; ++i) y[i] = static_cast<X*>(p.out->data) + lies[t + i] + c;
        in_pieces<(kSumsHeld / R < 8 ? kSumsHeld / R : 8)>(run.columns / n, [&](auto vectors, int64_t v) {
          combine<P, T, X, R, decltype(vectors)::value>(f, row + v * n, index, scale, s, b.sum_stride, y, v * n,
                                                        p.accumulate);
        });
        const int64_t whole = run.whole(n), last = run.last(n);
        if (whole < run.columns) {
          combine<P, T, X, R, 1>(f, row + last, index, scale, s, b.sum_stride, y, last, p.accumulate, whole - last,
                                 run.columns - last);
        }
      });
      c += run.columns;
    }
  });
}

inline void project_direct_float(const LowRankPass& p, const Block& b, void* sums) {
  dispatch_dtype(p.in->dtype, [&](auto tag) {
    using X = typename decltype(tag)::type;
    if constexpr (sizeof(X) <= sizeof(float)) project_direct_over<float, X>(p, b, static_cast<float*>(sums));
  });
}
inline void project_direct_double(const LowRankPass& p, const Block& b, void* sums) {
  project_direct_over<double, double>(p, b, static_cast<double*>(sums));
}
inline void expand_direct_float(const LowRankPass& p, const Block& b) {
  dispatch_dtype(p.out->dtype, [&](auto tag) {
    using X = typename decltype(tag)::type;
    if constexpr (sizeof(X) <= sizeof(float)) expand_direct_over<float, X>(p, b);
  });
}
inline void expand_direct_double(const LowRankPass& p, const Block& b) { expand_direct_over<double, double>(p, b); }
constexpr Direct kDirectFloat = {project_direct_float, expand_direct_float, Vec<float>::width};
constexpr Direct kDirectDouble = {project_direct_double, expand_direct_double, Vec<double>::width};

}  // namespace mos::cpu::MOS_ISA
