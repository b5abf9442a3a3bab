// What each instruction does to the lanes in `m`. PTX ISA 9.0.
#include "ops.h"

#include <bit>
#include <cmath>
#include <limits>
#include <type_traits>

#include "machine.h"

namespace ptx {
namespace {

template <class T>
inline T* reg(Warp& w, uint32_t at) {
  return reinterpret_cast<T*>(w.regs + at);
}

template <class F>
inline void each(uint32_t m, const F& f) {
  if (m == kAll) {
#pragma GCC ivdep
    for (int l = 0; l < kLanes; ++l) f(l);
  } else {
    for (; m; m &= m - 1) f(std::countr_zero(m));
  }
}

template <class D, class A, class F>
void unary(Warp& w, const Ins& i, uint32_t m) {
  D* d = reg<D>(w, i.o[0]);
  const A* a = reg<A>(w, i.o[1]);
  each(m, [&](int l) { d[l] = F::f(a[l]); });
}
template <class D, class A, class B, class F>
void binary(Warp& w, const Ins& i, uint32_t m) {
  D* d = reg<D>(w, i.o[0]);
  const A* a = reg<A>(w, i.o[1]);
  const B* b = reg<B>(w, i.o[2]);
  each(m, [&](int l) { d[l] = F::f(a[l], b[l]); });
}
template <class D, class F>
void ternary(Warp& w, const Ins& i, uint32_t m) {
  D* d = reg<D>(w, i.o[0]);
  const D *a = reg<D>(w, i.o[1]), *b = reg<D>(w, i.o[2]), *c = reg<D>(w, i.o[3]);
  each(m, [&](int l) { d[l] = F::f(a[l], b[l], c[l]); });
}
template <class A, class F>
void compare(Warp& w, const Ins& i, uint32_t m) {
  const A *a = reg<A>(w, i.o[1]), *b = reg<A>(w, i.o[2]);
  uint32_t bits = 0;
  for (int l = 0; l < kLanes; ++l) bits |= static_cast<uint32_t>(F::f(a[l], b[l])) << l;
  uint32_t* d = reg<uint32_t>(w, i.o[0]);
  *d = (*d & ~m) | (bits & m);
}

template <class T>
using U = std::make_unsigned_t<T>;
// Wrapping arithmetic on integers, IEEE on floats.
#define PTX_OP2(name, ints, floats)              \
  struct name {                                  \
    template <class T>                           \
    static T f(T a, T b) {                       \
      if constexpr (std::is_floating_point_v<T>) \
        return floats;                           \
      else                                       \
        return static_cast<T>(ints);             \
    }                                            \
  }
template <class T>
inline T wrap_mul(T a, T b) {
  using W = std::conditional_t<(sizeof(T) < 4), uint32_t, U<T>>;
  return static_cast<T>(static_cast<W>(a) * static_cast<W>(b));
}
PTX_OP2(Add, U<T>(a) + U<T>(b), a + b);
PTX_OP2(Sub, U<T>(a) - U<T>(b), a - b);
PTX_OP2(Mul, wrap_mul(a, b), a* b);
PTX_OP2(Min, a < b ? a : b, std::fmin(a, b));
PTX_OP2(Max, a > b ? a : b, std::fmax(a, b));
#undef PTX_OP2
struct Div {
  template <class T>
  static T f(T a, T b) {
    if (b == 0) return static_cast<T>(-1);  // unspecified
    if constexpr (std::is_signed_v<T>) {
      if (b == T(-1)) return static_cast<T>(U<T>(0) - U<T>(a));
    }
    return a / b;
  }
};
struct MulHi {
  static uint32_t f(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }
  static int32_t f(int32_t a, int32_t b) { return static_cast<int32_t>(int64_t{a} * b >> 32); }
  static uint64_t f(uint64_t a, uint64_t b) {
    return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
  }
};
struct MulWide {
  static uint32_t f(uint16_t a, uint16_t b) { return uint32_t{a} * b; }
  static int32_t f(int16_t a, int16_t b) { return int32_t{a} * b; }
  static uint64_t f(uint32_t a, uint32_t b) { return uint64_t{a} * b; }
  static int64_t f(int32_t a, int32_t b) { return int64_t{a} * b; }
};
struct And {
  template <class T>
  static T f(T a, T b) {
    return static_cast<T>(a & b);
  }
};
struct Or {
  template <class T>
  static T f(T a, T b) {
    return static_cast<T>(a | b);
  }
};
struct Xor {
  template <class T>
  static T f(T a, T b) {
    return static_cast<T>(a ^ b);
  }
};
struct Shl {
  template <class T>
  static T f(T a, uint32_t n) {
    return n >= 8 * sizeof(T) ? T(0) : static_cast<T>(static_cast<uint64_t>(a) << n);
  }
};
struct Shr {  // amounts beyond the width are clamped to it
  template <class T>
  static T f(T a, uint32_t n) {
    constexpr uint32_t bits = 8 * sizeof(T);
    if constexpr (std::is_signed_v<T>)
      return static_cast<T>(a >> (n >= bits ? bits - 1 : n));
    else
      return n >= bits ? T(0) : static_cast<T>(a >> n);
  }
};
struct Neg {
  template <class T>
  static T f(T a) {
    if constexpr (std::is_floating_point_v<T>)
      return -a;
    else
      return static_cast<T>(U<T>(0) - U<T>(a));
  }
};
struct Not {
  template <class T>
  static T f(T a) {
    return static_cast<T>(~a);
  }
};
struct Brev {
  static uint32_t f(uint32_t a) {
    uint32_t r = 0;
    for (int i = 0; i < 32; ++i) r |= (a >> i & 1u) << (31 - i);
    return r;
  }
};
struct FindShift {  // bfind.shiftamt.u32: the shift that brings the highest one to the top
  static uint32_t f(uint32_t a) { return a ? static_cast<uint32_t>(std::countl_zero(a)) : kAll; }
};
struct Mad {
  template <class T>
  static T f(T a, T b, T c) {
    return Add::f(Mul::f(a, b), c);
  }
};
struct Fma {
  template <class T>
  static T f(T a, T b, T c) {
    return std::fma(a, b, c);
  }
};
#define PTX_COMPARE(name, op) \
  struct name {               \
    template <class T>        \
    static bool f(T a, T b) { \
      return a op b;          \
    }                         \
  }
PTX_COMPARE(Eq, ==);
PTX_COMPARE(Ne, !=);
PTX_COMPARE(Lt, <);
PTX_COMPARE(Le, <=);
PTX_COMPARE(Gt, >);
PTX_COMPARE(Ge, >=);
#undef PTX_COMPARE

// Calls f with a value of the C++ type of a PTX type; integers only (b as u).
template <class F>
Fn integer(const std::string& t, const F& f) {
  if (t == "u16" || t == "b16") return f(uint16_t{});
  if (t == "s16") return f(int16_t{});
  if (t == "u32" || t == "b32") return f(uint32_t{});
  if (t == "s32") return f(int32_t{});
  if (t == "u64" || t == "b64") return f(uint64_t{});
  if (t == "s64") return f(int64_t{});
  return nullptr;
}

float half_to_float(uint16_t h) { return static_cast<float>(std::bit_cast<_Float16>(h)); }
uint16_t float_to_half(float f) {
  if (f != f) return 0x7FFF;
  return std::bit_cast<uint16_t>(static_cast<_Float16>(f));
}
uint16_t float_to_bf16(float f) {
  if (f != f) return 0x7FFF;
  const uint32_t u = std::bit_cast<uint32_t>(f);
  return static_cast<uint16_t>((u + 0x7FFFu + (u >> 16 & 1u)) >> 16);
}
struct ToTf32 {  // nearest, ties away from zero
  static uint32_t f(float x) {
    const uint32_t u = std::bit_cast<uint32_t>(x);
    if ((u & 0x7F800000u) == 0x7F800000u) return u & 0x007FFFFFu ? 0x7FFFFFFFu & ~0x1FFFu : u;
    return (u + 0x1000u) & ~0x1FFFu;
  }
};
struct ToDouble {
  static double f(float x) { return x; }
};
struct ToFloat {
  static float f(double x) { return static_cast<float>(x); }
};
struct FromHalf {
  static float f(uint16_t x) { return half_to_float(x); }
};
template <class D>
struct Convert {
  template <class A>
  static D f(A a) {
    return static_cast<D>(a);
  }
};

// ------------------------------------------------------------------------------------------------ memory

template <bool load, Space space, class T, class R, int n>
void memory(Warp& w, const Ins& i, uint32_t m) {
  uint64_t seen[kLanes];
  int n_seen = 0;
  for (; m; m &= m - 1) {
    const int l = std::countr_zero(m);
    uint64_t address = i.vector_address64
                           ? reg<uint64_t>(w, i.o[0])[l] + i.imm
                           : static_cast<uint32_t>(reg<uint32_t>(w, i.o[0])[l] + static_cast<uint32_t>(i.imm));
    seen[n_seen++] = address;
    unsigned char* p = at<space, !load>(w, address, sizeof(T) * n, l);
    T v[n];
    if constexpr (load) {
      std::memcpy(v, p, sizeof v);
      for (int k = 0; k < n; ++k) {
        if constexpr (std::is_signed_v<T>)
          reg<R>(w, i.o[1 + k])[l] = static_cast<R>(static_cast<std::make_signed_t<R>>(v[k]));
        else
          reg<R>(w, i.o[1 + k])[l] = static_cast<R>(v[k]);
      }
    } else {
      for (int k = 0; k < n; ++k) v[k] = static_cast<T>(reg<R>(w, i.o[1 + k])[l]);
      std::memcpy(p, v, sizeof v);
    }
  }
  if (config.traffic && space == kShared) count_shared(i, seen, n_seen, sizeof(T) * n);
  if (config.traffic && space == kGlobal) count_global(i, seen, n_seen, sizeof(T) * n);
}

template <bool load, Space space, class T, class R>
Fn with_vector(int n) {
  return n == 1   ? memory<load, space, T, R, 1>
         : n == 2 ? memory<load, space, T, R, 2>
         : n == 4 ? memory<load, space, T, R, 4>
                  : nullptr;
}
template <bool load, Space space, class T>
Fn with_width(int n, int width) {
  if constexpr (sizeof(T) <= 2) {
    if (width == 16) return with_vector<load, space, T, uint16_t>(n);
  }
  if constexpr (sizeof(T) <= 4) {
    if (width == 32) return with_vector<load, space, T, uint32_t>(n);
  }
  if (width == 64) return with_vector<load, space, T, uint64_t>(n);
  return nullptr;
}
template <bool load, Space space>
Fn with_type(const std::string& t, int n, int width) {
  if (t == "u8" || t == "b8") return with_width<load, space, uint8_t>(n, width);
  if (t == "s8") return with_width<load, space, int8_t>(n, width);
  if (t == "u16" || t == "b16") return with_width<load, space, uint16_t>(n, width);
  if (t == "s16") return with_width<load, space, int16_t>(n, width);
  if (t == "u32" || t == "b32" || t == "f32") return with_width<load, space, uint32_t>(n, width);
  if (t == "s32") return with_width<load, space, int32_t>(n, width);
  if (t == "u64" || t == "b64" || t == "f64" || t == "s64") return with_width<load, space, uint64_t>(n, width);
  return nullptr;
}

void land(Warp& w, const Copy& c) {
  unsigned char* target = shared_at(w, c.target, 16);
  std::memset(target, 0, 16);
  if (c.bytes) std::memcpy(target, global_at(w, c.source, c.bytes, false, c.lane), c.bytes);
}

// ------------------------------------------------------------------------------------------------ tensor cores

// sums += A (16 x k) B (k x 8): products are exact in double and added there, rounded once.
template <int k>
void multiply(Warp& w, const Ins& i, const float (&a)[16][k], const float (&b)[k][8]) {
  for (int row = 0; row < 16; ++row) {
    double sum[8];
    const int g = row % 8, high = row / 8;
    for (int col = 0; col < 8; ++col) {
      sum[col] = reg<float>(w, i.o[10 + 2 * high + col % 2])[g * 4 + col / 2];
    }
    for (int q = 0; q < k; ++q) {
      for (int col = 0; col < 8; ++col) sum[col] += static_cast<double>(a[row][q]) * b[q][col];
    }
    for (int col = 0; col < 8; ++col) {
      reg<float>(w, i.o[2 * high + col % 2])[g * 4 + col / 2] = static_cast<float>(sum[col]);
    }
  }
}

template <class F>
void mma_16(Warp& w, const Ins& i, const F& to_float) {
  float a[16][16], b[16][8];
  for (int l = 0; l < kLanes; ++l) {
    const int g = l / 4, t = l % 4;
    for (int r = 0; r < 4; ++r) {
      const uint32_t v = reg<uint32_t>(w, i.o[4 + r])[l];
      const int row = g + r % 2 * 8, col = t * 2 + r / 2 * 8;
      a[row][col] = to_float(static_cast<uint16_t>(v));
      a[row][col + 1] = to_float(static_cast<uint16_t>(v >> 16));
    }
    for (int r = 0; r < 2; ++r) {
      const uint32_t v = reg<uint32_t>(w, i.o[8 + r])[l];
      b[t * 2 + r * 8][g] = to_float(static_cast<uint16_t>(v));
      b[t * 2 + r * 8 + 1][g] = to_float(static_cast<uint16_t>(v >> 16));
    }
  }
  multiply(w, i, a, b);
}

template <bool trans>
void load_matrix(Warp& w, const Ins& i) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t v[8][8];
    uint64_t seen[8];
    for (int row = 0; row < 8; ++row) {
      const uint32_t address = reg<uint32_t>(w, i.o[4])[matrix * 8 + row] + static_cast<uint32_t>(i.imm);
      if (address % 16) fail("misaligned row of ldmatrix");
      seen[row] = address;
      std::memcpy(v[row], shared_at(w, address, 16), 16);
      if (config.race) shared_read(w, address, 16, kAll);
    }
    if (config.traffic) count_shared(i, seen, 8, 16);
    uint32_t* d = reg<uint32_t>(w, i.o[matrix]);
    for (int l = 0; l < kLanes; ++l) {
      const int g = l / 4, t = l % 4 * 2;
      d[l] = trans ? v[t][g] | uint32_t{v[t + 1][g]} << 16 : v[g][t] | uint32_t{v[g][t + 1]} << 16;
    }
  }
}

}  // namespace

// ------------------------------------------------------------------------------------------------ handlers

void warp_sync(Warp& w, const Ins&, uint32_t) { ++w.epoch; }

void ballot(Warp& w, const Ins& i, uint32_t m) {
  for (int l = 0; l < kLanes; ++l) {
    if (reg<uint32_t>(w, i.o[2])[l] != kAll) fail("vote without all lanes");
  }
  const uint32_t bits = *reg<uint32_t>(w, i.o[1]) & m;
  for (int l = 0; l < kLanes; ++l) reg<uint32_t>(w, i.o[0])[l] = bits;
}

// The destinations of mma are o[0..3], then come a, b and c: handlers see o[0..3], o[4..7], o[8..9], o[10..13].
void mma_bf16(Warp& w, const Ins& i, uint32_t) {
  mma_16(w, i, [](uint16_t h) { return std::bit_cast<float>(uint32_t{h} << 16); });
}
void mma_f16(Warp& w, const Ins& i, uint32_t) { mma_16(w, i, half_to_float); }
void mma_tf32(Warp& w, const Ins& i, uint32_t) {
  float a[16][8], b[8][8];
  const auto value = [&](uint32_t at, int l) {
    const uint32_t v = reg<uint32_t>(w, at)[l];
    if (v & 0x1FFFu) fail("an operand of mma.tf32 was not rounded");
    return std::bit_cast<float>(v);
  };
  for (int l = 0; l < kLanes; ++l) {
    const int g = l / 4, t = l % 4;
    for (int r = 0; r < 4; ++r) a[g + r % 2 * 8][t + r / 2 * 4] = value(i.o[4 + r], l);
    for (int r = 0; r < 2; ++r) b[t + r * 4][g] = value(i.o[8 + r], l);
  }
  multiply(w, i, a, b);
}
void ldmatrix(Warp& w, const Ins& i, uint32_t) { load_matrix<false>(w, i); }
void ldmatrix_trans(Warp& w, const Ins& i, uint32_t) { load_matrix<true>(w, i); }

void cp_async(Warp& w, const Ins& i, uint32_t m) {
  if (config.traffic) {
    uint64_t sources[kLanes], targets[kLanes];
    int n = 0, reads = 0;
    for (int l = 0; l < kLanes; ++l) {
      if (!(m >> l & 1u)) continue;
      targets[n++] = reg<uint32_t>(w, i.o[0])[l] + static_cast<uint32_t>(i.imm);
      if (reg<uint32_t>(w, i.o[2])[l]) sources[reads++] = reg<uint64_t>(w, i.o[1])[l];
    }
    count_shared(i, targets, n, 16);
    count_global(i, sources, reads, 16);
  }
  for (; m; m &= m - 1) {
    const int l = std::countr_zero(m);
    const Copy c{l, w.groups[l], reg<uint32_t>(w, i.o[0])[l] + static_cast<uint32_t>(i.imm),
                 reg<uint64_t>(w, i.o[1])[l], reg<uint32_t>(w, i.o[2])[l]};
    if (c.bytes > 16) fail("cp.async of more than 16 bytes");
    if (c.target % 16 || c.source % 16) fail("misaligned cp.async");
    unsigned char* target = shared_at(w, c.target, 16);
    if (c.bytes) global_at(w, c.source, c.bytes, false, l);
    if (config.race) {
      shared_write(w, c.target, 16, l);
      for (int k = 0; k < 16; ++k)
        w.block->shadow[c.target - kSharedBase + k].pending = static_cast<int16_t>(w.number * kLanes + l);
    }
    if (config.late)
      std::memset(target, 0xFF, 16);
    else
      land(w, c);
    w.copies.push_back(c);
  }
}
void cp_async_commit(Warp& w, const Ins&, uint32_t m) {
  for (; m; m &= m - 1) ++w.groups[std::countr_zero(m)];
}
void cp_async_wait(Warp& w, const Ins& i, uint32_t m) {
  size_t kept = 0;
  for (const Copy& c : w.copies) {
    if (m >> c.lane & 1u && static_cast<int64_t>(c.group) + i.imm < static_cast<int64_t>(w.groups[c.lane])) {
      if (config.late) land(w, c);
      if (config.race) {
        for (int k = 0; k < 16; ++k) w.block->shadow[c.target - kSharedBase + k].pending = -1;
        shared_write(w, c.target, 16, c.lane);
      }
    } else {
      w.copies[kept++] = c;
    }
  }
  w.copies.resize(kept);
}

void mov_pred(Warp& w, const Ins& i, uint32_t m) {
  uint32_t* d = reg<uint32_t>(w, i.o[0]);
  *d = (*d & ~m) | (*reg<uint32_t>(w, i.o[1]) & m);
}
void not_pred(Warp& w, const Ins& i, uint32_t m) {
  uint32_t* d = reg<uint32_t>(w, i.o[0]);
  *d = (*d & ~m) | (~*reg<uint32_t>(w, i.o[1]) & m);
}
#define PTX_PRED(name, op)                                                            \
  void name(Warp& w, const Ins& i, uint32_t m) {                                      \
    uint32_t* d = reg<uint32_t>(w, i.o[0]);                                           \
    *d = (*d & ~m) | ((*reg<uint32_t>(w, i.o[1]) op * reg<uint32_t>(w, i.o[2])) & m); \
  }
PTX_PRED(and_pred, &)
PTX_PRED(or_pred, |)
PTX_PRED(xor_pred, ^)
#undef PTX_PRED

void cvta_to_global(Warp& w, const Ins& i, uint32_t m) { unary<uint64_t, uint64_t, Convert<uint64_t>>(w, i, m); }
void cvta_shared(Warp& w, const Ins& i, uint32_t m) {
  uint64_t* d = reg<uint64_t>(w, i.o[0]);
  const uint64_t* a = reg<uint64_t>(w, i.o[1]);
  each(m, [&](int l) { d[l] = a[l] + kSharedWindow; });
}
void cvt_bf16x2(Warp& w, const Ins& i, uint32_t m) {
  uint32_t* d = reg<uint32_t>(w, i.o[0]);
  const float *a = reg<float>(w, i.o[1]), *b = reg<float>(w, i.o[2]);
  each(m, [&](int l) { d[l] = uint32_t{float_to_bf16(a[l])} << 16 | float_to_bf16(b[l]); });
}
void cvt_f16x2(Warp& w, const Ins& i, uint32_t m) {
  uint32_t* d = reg<uint32_t>(w, i.o[0]);
  const float *a = reg<float>(w, i.o[1]), *b = reg<float>(w, i.o[2]);
  each(m, [&](int l) { d[l] = uint32_t{float_to_half(a[l])} << 16 | float_to_half(b[l]); });
}
void bfi32(Warp& w, const Ins& i, uint32_t m) {
  uint32_t* d = reg<uint32_t>(w, i.o[0]);
  const uint32_t *a = reg<uint32_t>(w, i.o[1]), *b = reg<uint32_t>(w, i.o[2]), *c = reg<uint32_t>(w, i.o[3]),
                 *e = reg<uint32_t>(w, i.o[4]);
  each(m, [&](int l) {
    const uint32_t at = c[l] & 0xFF, bits = e[l] & 0xFF;
    uint32_t field = 0;
    for (uint32_t k = at; k < 32 && k < at + bits; ++k) field |= 1u << k;
    d[l] = at < 32 ? (b[l] & ~field) | (a[l] << at & field) : b[l];
  });
}

template <class T>
void selp(Warp& w, const Ins& i, uint32_t m) {
  T* d = reg<T>(w, i.o[0]);
  const T *a = reg<T>(w, i.o[1]), *b = reg<T>(w, i.o[2]);
  const uint32_t p = *reg<uint32_t>(w, i.o[3]);
  each(m, [&](int l) { d[l] = p >> l & 1u ? a[l] : b[l]; });
}
template void selp<uint16_t>(Warp&, const Ins&, uint32_t);
template void selp<uint32_t>(Warp&, const Ins&, uint32_t);
template void selp<uint64_t>(Warp&, const Ins&, uint32_t);
template <class T>
void mov(Warp& w, const Ins& i, uint32_t m) {
  unary<T, T, Convert<T>>(w, i, m);
}
template void mov<uint16_t>(Warp&, const Ins&, uint32_t);
template void mov<uint32_t>(Warp&, const Ins&, uint32_t);
template void mov<uint64_t>(Warp&, const Ins&, uint32_t);
template <class W, class N>
void pack2(Warp& w, const Ins& i, uint32_t m) {
  each(m, [&](int l) {
    reg<W>(w, i.o[0])[l] = static_cast<W>(reg<N>(w, i.o[1])[l]) | static_cast<W>(reg<N>(w, i.o[2])[l])
                                                                      << (8 * sizeof(N));
  });
}
template <class W, class N>
void unpack2(Warp& w, const Ins& i, uint32_t m) {
  each(m, [&](int l) {
    const W v = reg<W>(w, i.o[2])[l];
    reg<N>(w, i.o[0])[l] = static_cast<N>(v);
    reg<N>(w, i.o[1])[l] = static_cast<N>(v >> (8 * sizeof(N)));
  });
}
template void pack2<uint32_t, uint16_t>(Warp&, const Ins&, uint32_t);
template void pack2<uint64_t, uint32_t>(Warp&, const Ins&, uint32_t);
template void unpack2<uint32_t, uint16_t>(Warp&, const Ins&, uint32_t);
template void unpack2<uint64_t, uint32_t>(Warp&, const Ins&, uint32_t);

// ------------------------------------------------------------------------------------------------ by name

Fn setp_of(const std::string& c, const std::string& type) {
  const bool is_signed = type[0] == 's', is_bits = type[0] == 'b';
  return integer(type, [&](auto v) -> Fn {
    using T = decltype(v);
    if (c == "eq") return compare<T, Eq>;
    if (c == "ne") return compare<T, Ne>;
    if (is_bits) return nullptr;
    if (c == "lt") return compare<T, Lt>;
    if (c == "le") return compare<T, Le>;
    if (c == "gt") return compare<T, Gt>;
    if (c == "ge") return compare<T, Ge>;
    if (!is_signed && c == "lo") return compare<T, Lt>;
    if (!is_signed && c == "hs") return compare<T, Ge>;
    return nullptr;
  });
}

Fn cvt_of(const std::string& mode, const std::string& to, const std::string& from) {
  if (to == "f64" && from == "f32" && mode.empty()) return unary<double, float, ToDouble>;
  if (to == "f32" && from == "f64" && mode == "rn") return unary<float, double, ToFloat>;
  if (to == "f32" && from == "f16" && mode.empty()) return unary<float, uint16_t, FromHalf>;
  if (to == "tf32" && from == "f32" && mode == "rna") return unary<uint32_t, float, ToTf32>;
  if (!mode.empty() || to[0] == 'b' || from[0] == 'b') return nullptr;
  return integer(to, [&](auto d) -> Fn {
    return integer(from, [&](auto a) -> Fn { return unary<decltype(d), decltype(a), Convert<decltype(d)>>; });
  });
}

Fn unary_of(const std::string& op, const std::string& type) {
  if (op == "neg" && type[0] == 's')
    return integer(type, [](auto v) -> Fn { return unary<decltype(v), decltype(v), Neg>; });
  if (op == "neg" && type == "f32") return unary<float, float, Neg>;
  if (op == "neg" && type == "f64") return unary<double, double, Neg>;
  if (op == "not" && type[0] == 'b')
    return integer(type, [](auto v) -> Fn { return unary<decltype(v), decltype(v), Not>; });
  if (op == "brev" && type == "b32") return unary<uint32_t, uint32_t, Brev>;
  if (op == "bfind.shiftamt" && type == "u32") return unary<uint32_t, uint32_t, FindShift>;
  return nullptr;
}

Fn binary_of(const std::string& op, const std::string& type) {
  const char t = type[0];
  const auto same = [&](auto f) -> Fn {
    return integer(type, [&](auto v) -> Fn { return binary<decltype(v), decltype(v), decltype(v), decltype(f)>; });
  };
  if (t == 'f') {
    const auto real = [&](auto f) -> Fn {
      using F = decltype(f);
      return type == "f32"   ? binary<float, float, float, F>
             : type == "f64" ? binary<double, double, double, F>
                             : nullptr;
    };
    if (op == "add" || op == "add.rn") return real(Add{});
    if (op == "sub" || op == "sub.rn") return real(Sub{});
    if (op == "mul" || op == "mul.rn") return real(Mul{});
    return nullptr;
  }
  if (t == 'u' || t == 's') {
    if (op == "add") return same(Add{});
    if (op == "sub") return same(Sub{});
    if (op == "mul.lo") return same(Mul{});
    if (op == "min") return same(Min{});
    if (op == "max") return same(Max{});
    if (op == "div") return same(Div{});
    if (op == "shr") return integer(type, [](auto v) -> Fn { return binary<decltype(v), decltype(v), uint32_t, Shr>; });
    if (op == "mul.hi") {
      return type == "u32"   ? binary<uint32_t, uint32_t, uint32_t, MulHi>
             : type == "s32" ? binary<int32_t, int32_t, int32_t, MulHi>
             : type == "u64" ? binary<uint64_t, uint64_t, uint64_t, MulHi>
                             : nullptr;
    }
    if (op == "mul.wide") {
      return type == "u32"   ? binary<uint64_t, uint32_t, uint32_t, MulWide>
             : type == "s32" ? binary<int64_t, int32_t, int32_t, MulWide>
             : type == "u16" ? binary<uint32_t, uint16_t, uint16_t, MulWide>
             : type == "s16" ? binary<int32_t, int16_t, int16_t, MulWide>
                             : nullptr;
    }
    return nullptr;
  }
  if (op == "and") return same(And{});
  if (op == "or") return same(Or{});
  if (op == "xor") return same(Xor{});
  if (op == "shl") return integer(type, [](auto v) -> Fn { return binary<decltype(v), decltype(v), uint32_t, Shl>; });
  if (op == "shr") return integer(type, [](auto v) -> Fn { return binary<decltype(v), decltype(v), uint32_t, Shr>; });
  return nullptr;
}

Fn ternary_of(const std::string& op, const std::string& type) {
  if (op == "mad.lo" && (type[0] == 's' || type[0] == 'u')) {
    return integer(type, [](auto v) -> Fn { return ternary<decltype(v), Mad>; });
  }
  if (op == "fma.rn" && type == "f32") return ternary<float, Fma>;
  if (op == "fma.rn" && type == "f64") return ternary<double, Fma>;
  return nullptr;
}

Fn memory_of(bool load, const std::string& space, const std::string& type, int n, int width) {
  if (space == "global")
    return load ? with_type<true, kGlobal>(type, n, width) : with_type<false, kGlobal>(type, n, width);
  if (space == "shared")
    return load ? with_type<true, kShared>(type, n, width) : with_type<false, kShared>(type, n, width);
  if (space == "param") return load ? with_type<true, kParam>(type, n, width) : nullptr;
  return load ? with_type<true, kGeneric>(type, n, width) : with_type<false, kGeneric>(type, n, width);
}

}  // namespace ptx
