// The inner loops of low_rank_pass, compiled once per instruction set: low_rank.cpp includes this
// file repeatedly, each time with MOS_ISA (a namespace) and MOS_VECTOR_BYTES set and a `#pragma GCC
// target` in force; MOS_DOT compiles the products of bf16 pairs in place of those of float and double, 512 with the
// instructions of AVX512-BF16 and 1 without.
// Hence no include guard.
//
// No function of another header may be *defined* here for the first time (std:: templates, say):
// the linker keeps one copy of an inline function, and it could be the AVX-512 one on a machine
// without it. Includes belong in low_rank.cpp.
//
// Every product is one loop: a *word* is broadcast and multiplied with a vector of words. A word is one element, or two
// neighbours along the summed dimension where the instruction set multiplies bf16 pairs. So both operands are laid out
// with the summed dimension in groups of kGroup, nothing is ever summed across lanes, and remainders are zeros.

namespace mos::cpu::MOS_ISA {

template <class W>
struct Vec {
  static constexpr int width = MOS_VECTOR_BYTES / sizeof(W);
  typedef W type __attribute__((vector_size(MOS_VECTOR_BYTES)));

  static inline type load(const void* p) {
    type v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
  static inline void store(void* p, type v) { __builtin_memcpy(p, &v, sizeof(v)); }
};

using F = Vec<float>;
using U = Vec<uint32_t>;

// 16 bits for each lane of a vector of floats, and the same as 32.
typedef uint16_t Halves __attribute__((vector_size(MOS_VECTOR_BYTES / 2)));
typedef float HalfFloats __attribute__((vector_size(MOS_VECTOR_BYTES / 2)));

inline U::type choose(U::type where, U::type yes, U::type no) { return (where & yes) | (~where & no); }

// `width` elements P as numbers T, which are at least as wide: numeric.h's conversions, in vectors.
template <class P, class T>
inline typename Vec<T>::type widened(const P* p) {
  if constexpr (sizeof(P) == sizeof(T)) {
    return Vec<T>::load(p);
  } else if constexpr (sizeof(P) == 4) {
    HalfFloats v;
    __builtin_memcpy(&v, p, sizeof(v));
    return __builtin_convertvector(v, typename Vec<T>::type);
  } else {
    Halves half;
    __builtin_memcpy(&half, p, sizeof(half));
    const U::type bits = __builtin_convertvector(half, U::type);
    if constexpr (std::is_same_v<P, bf16_t>) {
      return reinterpret_cast<F::type>(bits << 16);
    } else {
      typedef int32_t Int __attribute__((vector_size(MOS_VECTOR_BYTES)));
      const U::type sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7FFFu;
      const U::type subnormal =
          reinterpret_cast<U::type>(__builtin_convertvector(reinterpret_cast<Int>(magnitude), F::type) * 0x1p-24f);
      const U::type normal = (magnitude << 13) + (112u << 23), special = (magnitude << 13) | 0x7F800000u;
      const U::type finite = choose(reinterpret_cast<U::type>(magnitude < 0x400u), subnormal, normal);
      return reinterpret_cast<F::type>(choose(reinterpret_cast<U::type>(magnitude >= 0x7C00u), special, finite) | sign);
    }
  }
}

// And back, rounded to nearest even.
template <class X, class T>
inline void narrow_to(X* p, typename Vec<T>::type v) {
  if constexpr (sizeof(X) == sizeof(T)) {
    Vec<T>::store(p, v);
  } else {
    const U::type u = reinterpret_cast<U::type>(v), magnitude = u & 0x7FFFFFFFu;
    U::type bits;
    if constexpr (std::is_same_v<X, bf16_t>) {
      const U::type rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
      bits = choose(reinterpret_cast<U::type>(magnitude > 0x7F800000u), U::type{} + 0x7FC0u, rounded);
    } else {
      const U::type normal = (magnitude + 0xC8000FFFu + ((magnitude >> 13) & 1u)) >> 13;
      const U::type subnormal = reinterpret_cast<U::type>(reinterpret_cast<F::type>(magnitude) + 0.5f) - 0x3F000000u;
      bits = choose(reinterpret_cast<U::type>(magnitude < 0x38800000u), subnormal, normal);
      bits = choose(reinterpret_cast<U::type>(magnitude >= 0x477FF000u), U::type{} + 0x7C00u, bits);
      bits = choose(reinterpret_cast<U::type>(magnitude > 0x7F800000u), U::type{} + 0x7E00u, bits);
      bits |= (u >> 16) & 0x8000u;
    }
    const Halves half = __builtin_convertvector(bits, Halves);
    __builtin_memcpy(p, &half, sizeof(half));
  }
}

#ifdef MOS_DOT

// Pairs of bf16, products summed in fp32: twice the multiply-adds of an instruction, and x is never widened.
struct Arithmetic {
  using Sum = float;
  using Word = uint32_t;
  using Element = bf16_t;  // of staged activations and of packed factors
  static constexpr int kGroup = 2;
  using Sums = F::type;

#if MOS_DOT == 512
  static inline Sums multiply_add(Word a, U::type b, Sums sum) {
    return reinterpret_cast<Sums>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum),
                                                   reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a))),
                                                   reinterpret_cast<__m512bh>(b)));
  }
  // The words of 2 * width columns of rows p and q.
  static inline void interleave(const bf16_t* p, const bf16_t* q, U::type* words) {
    const __m512i a = _mm512_loadu_si512(p), b = _mm512_loadu_si512(q);
    const __m512i low = _mm512_load_si512(kInterleave.low), high = _mm512_load_si512(kInterleave.high);
    words[0] = reinterpret_cast<U::type>(_mm512_permutex2var_epi16(a, low, b));
    words[1] = reinterpret_cast<U::type>(_mm512_permutex2var_epi16(a, high, b));
  }
  static inline void add_to(bf16_t* p, Sums v) {
    typedef uint16_t Half __attribute__((vector_size(MOS_VECTOR_BYTES / 2)));
    Half bits;
    __builtin_memcpy(&bits, p, sizeof(bits));
    set(p, reinterpret_cast<Sums>(__builtin_convertvector(bits, U::type) << 16) + v);
  }
  // To nearest even; subnormal results become zero, as in oneDNN's products.
  static inline void set(bf16_t* p, Sums v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v))));
  }
#else  // the same layouts where there is no such instruction: for tests
  static inline Sums multiply_add(Word a, U::type b, Sums sum) {
    const U::type low = b << 16, high = b & 0xFFFF0000u;
    return sum + bit_cast<float>(a & 0xFFFF0000u) * reinterpret_cast<Sums>(high) +
           bit_cast<float>(a << 16) * reinterpret_cast<Sums>(low);
  }
  static inline void interleave(const bf16_t* p, const bf16_t* q, U::type* words) {
    Word lane[2 * U::width];
    for (int i = 0; i < 2 * U::width; ++i) lane[i] = p[i].bits | static_cast<Word>(q[i].bits) << 16;
    words[0] = U::load(lane), words[1] = U::load(lane + U::width);
  }
  static inline void add_to(bf16_t* p, Sums v) { set(p, widened<bf16_t, float>(p) + v); }
  static inline void set(bf16_t* p, Sums v) { narrow_to<bf16_t, float>(p, v); }
#endif

  static inline Word join(bf16_t first, bf16_t second) { return first.bits | static_cast<Word>(second.bits) << 16; }
  static inline Word word(float first, float second) { return join(bf16_t::round(first), bf16_t::round(second)); }
};

#else

template <class T>
struct Arithmetic {
  using Sum = T;
  using Word = T;
  using Element = T;
  static constexpr int kGroup = 1;
  using Sums = typename Vec<T>::type;

  static inline Sums multiply_add(T a, Sums b, Sums sum) { return sum + a * b; }
  static inline void interleave(const T* p, const T*, Sums* words) {
    words[0] = Vec<T>::load(p), words[1] = Vec<T>::load(p + Vec<T>::width);
  }
  template <class X>
  static inline void add_to(X* p, Sums v) {
    narrow_to<X, T>(p, widened<X, T>(p) + v);
  }
  template <class X>
  static inline void set(X* p, Sums v) {
    narrow_to<X, T>(p, v);
  }
  static inline T join(T first, T) { return first; }
  static inline T word(T first, T) { return first; }
};

#endif

// ------------------------------------------------------------------------------------------------ products

constexpr int64_t kLine = 64;  // bytes

// A line of activations that is needed a thousand cycles from now, into L2: as rows are often a power of two apart,
// they would push each other out of L1. Prefetching hardware does not follow rows of a tile. (A pass over x from
// memory, in float32 at T = 2048, d = 1024, took 2442 us, and 874 with this and with `expand` going along rows.)
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// Unaligned: rows of bf16 may start at any element.
template <class W, class E>
inline W word_at(const E* p) {
  W w;
  __builtin_memcpy(&w, p, sizeof(w));
  return w;
}

// sums (rows, rank_padded) += x F^T for R rows of x and V vectors of ranks. Eight to sixteen accumulators cover the
// latency of the multiply-adds (4 to 6 cycles, one or two a cycle); x is read as broadcasts.
template <class A, int R, int V>
inline void project(int64_t words, const typename A::Element* x, int64_t x_stride, const typename A::Word* f,
                    int64_t f_stride, typename A::Sum* sums, int64_t sums_stride) {
  using L = Vec<typename A::Word>;
  using S = Vec<typename A::Sum>;
  typename A::Sums acc[R][V] = {};
  for (int64_t k = 0; k < words; ++k) {
    if (k % (kLine / static_cast<int64_t>(sizeof(typename A::Word))) == 0) {  // the next R rows
      MOS_UNROLL
      for (int i = 0; i < R; ++i) prefetch(x + (i + R) * x_stride + k * A::kGroup);
    }
    typename L::type b[V];
    MOS_UNROLL
    for (int v = 0; v < V; ++v) b[v] = L::load(f + k * f_stride + v * L::width);
    MOS_UNROLL
    for (int i = 0; i < R; ++i) {
      const auto a = word_at<typename A::Word>(x + i * x_stride + k * A::kGroup);
      MOS_UNROLL
      for (int v = 0; v < V; ++v) acc[i][v] = A::multiply_add(a, b[v], acc[i][v]);
    }
  }
  MOS_UNROLL
  for (int i = 0; i < R; ++i) {
    MOS_UNROLL
    for (int v = 0; v < V; ++v) {
      auto* sum = sums + i * sums_stride + v * L::width;
      S::store(sum, S::load(sum) + acc[i][v]);
    }
  }
}

// grad (R ranks, two vectors of columns from c on) (+)= s^T x over `rows` rows. The sum starts at zero and is added
// once, which over many tiles rounds less than adding every product to grad. `ahead` is what x of the next call will
// be.
template <class A, int R>
inline void outer(int64_t rows, const typename A::Word* s, int64_t s_stride, const typename A::Element* x,
                  int64_t x_stride, const typename A::Element* ahead, typename A::Sum* const* grad, int64_t c,
                  bool accumulate) {
  using S = Vec<typename A::Sum>;
  typename A::Sums acc[R][2] = {};
  typename Vec<typename A::Word>::type b[2];
  alignas(MOS_VECTOR_BYTES) static const typename A::Element zeros[2 * S::width] = {};
  for (int64_t t = 0; t < rows; t += A::kGroup, s += s_stride) {
    const auto* row = x + t * x_stride;
    for (int i = 0; i < A::kGroup; ++i) {
      const auto* next = ahead + (t + i) * x_stride;
      prefetch(next);
      if (2 * S::width * sizeof(*next) > kLine) prefetch(next + S::width);
    }
    A::interleave(row, t + A::kGroup <= rows ? row + x_stride : zeros, b);
    MOS_UNROLL
    for (int i = 0; i < R; ++i) {
      MOS_UNROLL
      for (int v = 0; v < 2; ++v) acc[i][v] = A::multiply_add(s[i], b[v], acc[i][v]);
    }
  }
  MOS_UNROLL
  for (int i = 0; i < R; ++i) {
    MOS_UNROLL
    for (int v = 0; v < 2; ++v) {
      auto* g = grad[i] + c + v * S::width;
      S::store(g, accumulate ? S::load(g) + acc[i][v] : acc[i][v]);
    }
  }
}

// out (R rows, two vectors of columns) (+)= mask * (s F), rounded once.
template <class A, int R, class X>
inline void expand(int64_t words, const typename A::Word* s, int64_t s_stride, const typename A::Word* panel, X* out,
                   int64_t out_stride, const uint16_t* mask, int64_t mask_stride, bool accumulate) {
  using L = Vec<typename A::Word>;
  typename A::Sums acc[R][2] = {};
  for (int64_t k = 0; k < words; ++k) {
    const auto b0 = L::load(panel + 2 * k * L::width), b1 = L::load(panel + (2 * k + 1) * L::width);
    MOS_UNROLL
    for (int i = 0; i < R; ++i) {
      const auto a = s[i * s_stride + k];
      acc[i][0] = A::multiply_add(a, b0, acc[i][0]);
      acc[i][1] = A::multiply_add(a, b1, acc[i][1]);
    }
  }
  MOS_UNROLL
  for (int i = 0; i < R; ++i) {
    MOS_UNROLL
    for (int v = 0; v < 2; ++v) {
      if (mask) {
        using B = bits_t<typename A::Sum>;
        typename A::Sum lane[L::width];
        Vec<typename A::Sum>::store(lane, acc[i][v]);
        const uint16_t* m = mask + i * mask_stride + v * L::width;
        for (int k = 0; k < L::width; ++k) {
          lane[k] = bit_cast<typename A::Sum>(bit_cast<B>(lane[k]) & static_cast<B>(static_cast<int16_t>(m[k])));
        }
        acc[i][v] = Vec<typename A::Sum>::load(lane);
      }
      X* p = out + i * out_stride + v * L::width;
      if (accumulate) prefetch(p + R * out_stride);  // the next R rows
      if (accumulate) {
        A::add_to(p, acc[i][v]);
      } else {
        A::set(p, acc[i][v]);
      }
    }
  }
}

// f(Count<kMost>), a power of two, then half of it, ... 1: `n` cut into pieces whose size the compiler knows. f gets
// the size and the start.
template <int N>
struct Count {
  static constexpr int value = N;
};
template <int kMost = 8, class Function>
inline void in_pieces(int64_t n, const Function& f, int64_t i = 0) {
  for (; i + kMost <= n; i += kMost) f(Count<kMost>(), i);
  if constexpr (kMost > 1) in_pieces<kMost / 2>(n, f, i);
}

// ------------------------------------------------------------------------------------------------ operands

// dst (rank, stride) = columns c0 .. c0 + cols of the factor as elements E, zero beyond: the gather.
template <class P, class T, class E>
void stage_factor(const Factor& f, int64_t c0, int64_t cols, E* dst, int64_t stride) {
  const P* pool = static_cast<const P*>(f.pool);
  const auto start = [&](int64_t j) {
    return pool + f.index[j * f.shards_per_vector + c0 / f.shard_size] * f.pool_stride + c0 % f.shard_size;
  };
  for (int64_t j = 0; j < f.rank; ++j) {
    // Shards lie anywhere, mostly not in a cache: the next row's is on its way while this one is converted.
    if (j + 1 < f.rank) {
      const char* next = reinterpret_cast<const char*>(start(j + 1));
      const int64_t bytes = min64(cols, f.shard_size - c0 % f.shard_size) * static_cast<int64_t>(sizeof(P));
      for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(next + b);
    }
    E* row = dst + j * stride;
    int64_t c = 0;
    const int32_t* shard = f.index + j * f.shards_per_vector + c0 / f.shard_size;
    for (int64_t offset = c0 % f.shard_size; c < cols; ++shard, offset = 0) {
      const int64_t run = min64(cols - c, f.shard_size - offset);
      const P* src = pool + *shard * f.pool_stride + offset;
      for (int64_t k = 0; k < run; ++k) row[c + k] = round_to<E>(static_cast<T>(src[k]));
      c += run;
    }
    for (; c < stride; ++c) row[c] = E{};
  }
}

// a and b exchange their halves of lanes 2 kHalf: one step of a transposition.
template <int kHalf, class V, int... kLane>
inline void exchange(V& a, V& b, Lanes<kLane...>) {
  constexpr int n = sizeof...(kLane);
  const V low = MOS_SHUFFLE(V, a, b, (kLane & kHalf ? n + kLane - kHalf : kLane)...);
  b = MOS_SHUFFLE(V, a, b, (kLane & kHalf ? n + kLane : kLane + kHalf)...);
  a = low;
}

template <int kHalf, class V, int n>
inline void transpose(V (&v)[n]) {
  if constexpr (kHalf < n) {
    MOS_UNROLL
    for (int i = 0; i < n; ++i) {
      if (!(i & kHalf)) exchange<kHalf>(v[i], v[i + kHalf], FirstLanes<n>());
    }
    transpose<2 * kHalf>(v);
  }
}

// kColTile columns of the factor from c0 on, packed as `project` wants them, (columns / kGroup, rank_padded) words, and
// as `expand` does, panels of two vectors of columns, (rank / kGroup, 2 * width) words each; either may be null.
template <class A>
void pack_factor_as(const Factor& f, int64_t c0, int64_t cols, void* by_column, void* by_rank) {
  using W = typename A::Word;
  using E = typename A::Element;
  constexpr int n = Vec<W>::width;
  constexpr int64_t stride = kColTile + 32, panel = 2 * n;  // off the power of two: columns are read too
  const int64_t rank_padded = round_up(f.rank, n), groups = ceil_div(f.rank, A::kGroup);
  AlignedBuffer memory(static_cast<size_t>((f.rank + 1) * stride) * sizeof(E));
  E* rows = memory.as<E>();
  dispatch_dtype(f.dtype, [&](auto tag) {
    stage_factor<typename decltype(tag)::type, typename A::Sum>(f, c0, cols, rows, stride);
  });
  E* beyond = rows + f.rank * stride;
  for (int64_t c = 0; c < stride; ++c) beyond[c] = E{};
  if (W* dst = static_cast<W*>(by_column)) {
    // In squares: word by word, this took a third of a pass over one row of 1024 columns (7.9 us, and 5.5 so).
    for (int64_t c = 0; c < cols; c += n * A::kGroup, dst += n * rank_padded) {
      for (int64_t j = 0; j < rank_padded; j += n) {
        typename Vec<W>::type square[n];
        MOS_UNROLL
        for (int i = 0; i < n; ++i) square[i] = Vec<W>::load(j + i < f.rank ? rows + (j + i) * stride + c : beyond);
        transpose<1>(square);
        MOS_UNROLL
        for (int i = 0; i < n; ++i) Vec<W>::store(dst + i * rank_padded + j, square[i]);
      }
    }
  }
  if (W* dst = static_cast<W*>(by_rank)) {
    for (int64_t c = 0; c < cols; c += panel) {
      for (int64_t j = 0; j < groups; ++j, dst += panel) {
        const E* first = rows + j * A::kGroup * stride + c;
        const E* second = j * A::kGroup + 1 < f.rank ? first + stride : beyond + c;
        for (int64_t i = 0; i < panel; ++i) dst[i] = A::join(first[i], second[i]);
      }
    }
  }
}

// mask (rows, stride) = all ones where kept, 0 where dropped; c0 is a multiple of kDropoutGroup, stride of
// kMaskColumns. Sixteen Philox blocks at once, their four words in loops that the compiler turns into vectors.
inline void stage_mask(const Dropout& d, int64_t t0, int64_t rows, int64_t c0, int64_t stride, uint16_t* mask) {
  constexpr int kBlocks = kMaskColumns / kDropoutGroup;
  const uint16_t last_dropped = static_cast<uint16_t>(d.threshold - 1);
  for (int64_t t = 0; t < rows; ++t) {
    const uint64_t row = static_cast<uint64_t>(t0 + t);
    for (int64_t c = 0; c < stride; c += kMaskColumns) {
      uint32_t w0[kBlocks], w1[kBlocks], w2[kBlocks], w3[kBlocks];
      for (int i = 0; i < kBlocks; ++i) {
        w0[i] = static_cast<uint32_t>((c0 + c) / kDropoutGroup) + i;
        w1[i] = static_cast<uint32_t>(row), w2[i] = static_cast<uint32_t>(row >> 32), w3[i] = 0;
      }
      uint32_t k0 = static_cast<uint32_t>(d.seed), k1 = static_cast<uint32_t>(d.seed >> 32);
      for (int round = 0; round < kPhiloxRounds; ++round) {
        for (int i = 0; i < kBlocks; ++i) philox_round(k0, k1, w0[i], w1[i], w2[i], w3[i]);
        k0 += kPhiloxWeyl0, k1 += kPhiloxWeyl1;
      }
      uint32_t words[4 * kBlocks];
      for (int i = 0; i < kBlocks; ++i) {
        words[4 * i] = w0[i], words[4 * i + 1] = w1[i], words[4 * i + 2] = w2[i], words[4 * i + 3] = w3[i];
      }
      uint16_t bits[kMaskColumns];
      for (int i = 0; i < kMaskColumns; ++i) bits[i] = static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)));
      for (int i = 0; i < kMaskColumns; ++i) {
        mask[t * stride + c + i] = static_cast<uint16_t>(bits[i] > last_dropped ? 0xFFFF : 0);
      }
    }
  }
}

// Where a tile's rows lie in a matrix: one after the other, or as groups have them.
struct RowsOf {
  const int32_t* order;  // of the tile, or null
  int64_t first, stride;

  RowsOf(const Groups& groups, const Matrix& matrix, int64_t t0)
      : order(groups.rows ? groups.rows + t0 : nullptr), first(t0), stride(matrix.row_stride) {}
  int64_t operator[](int64_t t) const { return (order ? order[t] : first + t) * stride; }
};

// dst (rows, stride) = elements converted, dropped ones zero (by bits: inf * 0 would be NaN), zero beyond cols.
// `column` is row 0 at the tile's first column.
template <class E, class X>
void stage_rows(const X* column, const RowsOf& lies, int64_t rows, int64_t cols, const uint16_t* mask, E* dst,
                int64_t stride) {
  for (int64_t t = 0; t < rows; ++t, dst += stride) {
    const X* src = column + lies[t];
    if constexpr (sizeof(E) == sizeof(X)) {
      __builtin_memcpy(dst, src, static_cast<size_t>(cols) * sizeof(E));
    } else {
      constexpr int64_t n = Vec<E>::width;
      int64_t c = 0;
      for (; c + n <= cols; c += n) Vec<E>::store(dst + c, widened<X, E>(src + c));
      for (; c < cols; ++c) dst[c] = static_cast<E>(src[c]);
    }
    for (int64_t c = cols; c < stride; ++c) dst[c] = E{};
    if (!mask) continue;
    if constexpr (sizeof(E) == 2) {
      for (int64_t c = 0; c < cols; ++c) dst[c].bits &= mask[c];
    } else {
      using B = bits_t<E>;
      for (int64_t c = 0; c < cols; ++c) {
        dst[c] = bit_cast<E>(bit_cast<B>(dst[c]) & static_cast<B>(static_cast<int16_t>(mask[c])));
      }
    }
    mask += stride;
  }
}

// ------------------------------------------------------------------------------------------------ one block

// Rows [t0, t1), columns [c0, c1) of a pass over activations of type X. `projected` (t1 - t0, rank_padded), zeroed by
// the caller, and `grad` (rank, grad_stride), pointing at column 0, are this block's own sums; either may be null.
// Where the pass scatters, grad is (num_shards, shard_size). c0 is a multiple of kColTile. The pass' factor, scale and
// rank are those of the block's group; `sum_stride` columns stand in a row of its s.
template <class A, class X>
void run_block_over(const LowRankPass& p, const Block& b, const PackedFactor& packed, void* projected_sums,
                    void* grad_sums, int64_t grad_stride) {
  using T = typename A::Sum;
  using W = typename A::Word;
  using E = typename A::Element;
  constexpr int64_t panel = 2 * Vec<W>::width;
  constexpr bool same_type = sizeof(X) == sizeof(E);
  const int64_t rank = p.factor.rank, rank_padded = round_up(rank, Vec<T>::width), groups = ceil_div(rank, A::kGroup);
  const int64_t stride = round_up(min64(kColTile, b.c1 - b.c0), kMaskColumns);
  const bool dropout = p.dropout.active();
  const T scale = static_cast<T>(p.scale * p.dropout.keep_scale());
  T *projected = static_cast<T*>(projected_sums), *grad = static_cast<T*>(grad_sums);

  const int64_t tile = kRowTile * stride;
  AlignedBuffer memory(static_cast<size_t>(tile) * (sizeof(E) + sizeof(X) + sizeof(uint16_t)) +
                       static_cast<size_t>(2 * kRowTile * round_up(rank_padded, 16)) * sizeof(W) +
                       static_cast<size_t>(round_up(rank, 8)) * sizeof(T*));
  T** grad_rows = memory.as<T*>();
  E* staged_in = reinterpret_cast<E*>(grad_rows + round_up(rank, 8));
  W* s_by_row = reinterpret_cast<W*>(staged_in + tile);
  W* s_by_pair = s_by_row + kRowTile * round_up(rank_padded, 16);
  X* staged_out = reinterpret_cast<X*>(s_by_pair + kRowTile * round_up(rank_padded, 16));
  uint16_t* mask = reinterpret_cast<uint16_t*>(staged_out + tile);

  for (int64_t c0 = b.c0; c0 < b.c1; c0 += kColTile) {
    const int64_t cols = min64(kColTile, b.c1 - c0);
    const W* by_column = static_cast<const W*>(packed.by_column) + c0 / A::kGroup * rank_padded;
    const W* by_rank = static_cast<const W*>(packed.by_rank) + c0 * groups;
    const bool whole = cols % panel == 0;  // else the last vector would reach beyond the row
    for (int64_t t0 = b.t0; t0 < b.t1; t0 += kRowTile) {
      const int64_t rows = min64(kRowTile, b.t1 - t0);
      if (dropout) stage_mask(p.dropout, t0, rows, c0, stride, mask);
      const E* in = nullptr;
      int64_t in_stride = 0;
      if (p.in) {
        const X* column = static_cast<const X*>(p.in->data) + c0;
        const RowsOf lies(p.groups, *p.in, t0);
        if (same_type && whole && !dropout && !lies.order) {
          in = reinterpret_cast<const E*>(column + lies[0]), in_stride = p.in->row_stride;
        } else {
          stage_rows(column, lies, rows, cols, dropout ? mask : nullptr, staged_in, stride);
          in = staged_in, in_stride = stride;
        }
      }
      if (projected) {
        const int64_t words = ceil_div(cols, A::kGroup);
        for (int64_t j = 0; j < rank_padded; j += Vec<T>::width) {
          in_pieces(rows, [&](auto count, int64_t t) {
            project<A, decltype(count)::value, 1>(words, in + t * in_stride, in_stride, by_column + j, rank_padded,
                                                  projected + (t0 - b.t0 + t) * rank_padded + j, rank_padded);
          });
        }
      }
      const T* s = p.s ? static_cast<const T*>(p.s) + t0 * b.sum_stride : nullptr;
      if (grad) {
        for (int64_t t = 0; t < rows; t += A::kGroup) {
          const T* row = s + t * b.sum_stride;
          W* dst = s_by_pair + t / A::kGroup * rank_padded;
          if (t + 1 < rows) {
            for (int64_t j = 0; j < rank; ++j) dst[j] = A::word(scale * row[j], scale * row[j + b.sum_stride]);
          } else {
            for (int64_t j = 0; j < rank; ++j) dst[j] = A::word(scale * row[j], T(0));
          }
        }
        for (int64_t c = 0; c < cols; c += panel) {
          // Where column 0 of the tile would be if the row went on as it does at c.
          if (p.scatter && (c == 0 || (c0 + c) % p.factor.shard_size == 0)) {
            const int64_t shard = (c0 + c) / p.factor.shard_size, start = shard * p.factor.shard_size - c0;
            const int32_t* index = p.factor.index + shard;
            for (int64_t j = 0; j < rank; ++j) {
              grad_rows[j] = grad + index[j * p.factor.shards_per_vector] * p.factor.shard_size - start;
            }
          } else if (c == 0) {
            for (int64_t j = 0; j < rank; ++j) grad_rows[j] = grad + j * grad_stride + c0;
          }
          in_pieces(rank, [&](auto count, int64_t j) {
            outer<A, decltype(count)::value>(rows, s_by_pair + j, rank_padded, in + c, in_stride,
                                             c + panel < cols ? in + c + panel : in + kRowTile * in_stride,
                                             grad_rows + j, c, b.accumulate || t0 > b.t0);
          });
        }
      }
      if (p.out) {
        for (int64_t t = 0; t < rows; ++t) {
          for (int64_t j = 0; j < groups; ++j) {
            const int64_t i = t * b.sum_stride + j * A::kGroup;
            s_by_row[t * groups + j] = A::word(scale * s[i], j * A::kGroup + 1 < rank ? scale * s[i + 1] : T(0));
          }
        }
        X* column = static_cast<X*>(p.out->data) + c0;
        const RowsOf lies(p.groups, *p.out, t0);
        const bool direct = whole && !lies.order;
        X* out = direct ? column + lies[0] : staged_out;
        const int64_t out_stride = direct ? p.out->row_stride : stride;
        if (!direct && p.accumulate) {
          for (int64_t t = 0; t < rows; ++t) {
            __builtin_memcpy(out + t * stride, column + lies[t], static_cast<size_t>(cols) * sizeof(X));
          }
        }
        in_pieces(rows, [&](auto count, int64_t t) {
          for (int64_t c = 0; c < cols; c += panel) {
            expand<A, decltype(count)::value>(groups, s_by_row + t * groups, groups, by_rank + c * groups,
                                              out + t * out_stride + c, out_stride,
                                              dropout ? mask + t * stride + c : nullptr, stride, p.accumulate);
          }
        });
        if (!direct) {
          for (int64_t t = 0; t < rows; ++t) {
            __builtin_memcpy(column + lies[t], out + t * stride, static_cast<size_t>(cols) * sizeof(X));
          }
        }
      }
    }
  }
}

// Up to so many rows that share a factor packing does not pay (csrc/README.md has the times).
#ifdef MOS_DOT

constexpr int64_t kFewRows = 16;
inline void pack_factor(const Factor& f, int64_t c0, int64_t cols, void* by_column, void* by_rank) {
  pack_factor_as<Arithmetic>(f, c0, cols, by_column, by_rank);
}
inline void run_block(const LowRankPass& p, const Block& b, const PackedFactor& packed, void* projected, void* grad,
                      int64_t grad_stride) {
  run_block_over<Arithmetic, bf16_t>(p, b, packed, projected, grad, grad_stride);
}
constexpr Kernels kDot = {pack_factor, run_block, Vec<float>::width, Arithmetic::kGroup, sizeof(float), kFewRows};

#else

constexpr int64_t kFewRows = MOS_VECTOR_BYTES == 64 ? 64 : 16;
template <class T>
void pack_factor(const Factor& f, int64_t c0, int64_t cols, void* by_column, void* by_rank) {
  pack_factor_as<Arithmetic<T> >(f, c0, cols, by_column, by_rank);
}
inline void run_block_float(const LowRankPass& p, const Block& b, const PackedFactor& packed, void* projected,
                            void* grad, int64_t grad_stride) {
  dispatch_dtype(p.activations().dtype, [&](auto tag) {
    using X = typename decltype(tag)::type;
    if constexpr (sizeof(X) <= sizeof(float)) {
      run_block_over<Arithmetic<float>, X>(p, b, packed, projected, grad, grad_stride);
    }
  });
}
inline void run_block_double(const LowRankPass& p, const Block& b, const PackedFactor& packed, void* projected,
                             void* grad, int64_t grad_stride) {
  run_block_over<Arithmetic<double>, double>(p, b, packed, projected, grad, grad_stride);
}
constexpr Kernels kFloat = {pack_factor<float>, run_block_float, Vec<float>::width, 1, sizeof(float), kFewRows};
constexpr Kernels kDouble = {pack_factor<double>, run_block_double, Vec<double>::width, 1, sizeof(double), kFewRows};

#endif

}  // namespace mos::cpu::MOS_ISA

#ifndef MOS_DOT
#include "low_rank_direct.h"
#endif
