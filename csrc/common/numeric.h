// Element types on the host, their accumulation type, and the runtime -> constexpr switch over
// them.
#pragma once

#include <cstdint>
#include <cstring>

#include "params.h"

// For what kernels use on the device too.
#if defined(__CUDACC__)
#define MOS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MOS_HOST_DEVICE inline
#endif

namespace mos {

template <class To, class From>
MOS_HOST_DEVICE To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To out;
  memcpy(&out, &value, sizeof(out));
  return out;
}

// bfloat16: the upper half of a float. Round to nearest even; NaN stays NaN.
struct bf16_t {
  uint16_t bits;
  inline operator float() const { return bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
  static inline bf16_t round(float value) {
    const uint32_t u = bit_cast<uint32_t>(value);
    const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
    return {static_cast<uint16_t>((u & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded)};
  }
};

// IEEE half, branch-free so that the compiler vectorises it without F16C.
struct f16_t {
  uint16_t bits;
  inline operator float() const {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16,
                   magnitude = static_cast<uint32_t>(bits & 0x7FFFu);
    // Subnormal halves through an integer: as float bit patterns they would be subnormal too, and flushed to zero by
    // some.
    const uint32_t subnormal = bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
    const uint32_t normal = (magnitude << 13) + (112u << 23);
    const uint32_t finite = magnitude < 0x400u ? subnormal : normal;
    return bit_cast<float>((magnitude >= 0x7C00u ? 0x7F800000u | (magnitude << 13) : finite) | sign);
  }
  static inline f16_t round(float value) {
    const uint32_t u = bit_cast<uint32_t>(value), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7FFFFFFFu;
    // Normal range: add the rounding bias and shift the exponent bias (112 << 23) away.
    const uint32_t normal = (magnitude + 0xC8000FFFu + ((magnitude >> 13) & 1u)) >> 13;
    // Below 2^-14: adding 0.5 aligns the significand to the subnormal grid, rounding to nearest
    // even in hardware.
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3F000000u;
    uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x477FF000u ? 0x7C00u : half;  // 65520 and above round to infinity
    half = magnitude > 0x7F800000u ? 0x7E00u : half;
    return {static_cast<uint16_t>(half | sign)};
  }
};

// What sums of T are kept in: float, and double for double.
template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
using accumulate_t = typename Accumulate<T>::type;

template <class T, class A>
inline T round_to(A value) {
  if constexpr (sizeof(T) == 2) {
    return T::round(static_cast<float>(value));
  } else {
    return static_cast<T>(value);
  }
}

template <class T>
struct Tag {
  using type = T;
};

// Calls f(Tag<T>{}) with the T of dtype.
template <class F>
inline void dispatch_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32:
      return f(Tag<float>{});
    case DType::f64:
      return f(Tag<double>{});
    case DType::bf16:
      return f(Tag<bf16_t>{});
    case DType::f16:
      return f(Tag<f16_t>{});
  }
}

MOS_HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
MOS_HOST_DEVICE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
MOS_HOST_DEVICE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
MOS_HOST_DEVICE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace mos
