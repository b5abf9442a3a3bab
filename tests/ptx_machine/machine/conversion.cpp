// cvt and mov.
#include <bit>
#include <limits>

#include "elementwise.h"
#include "half.h"

namespace ptx {
namespace {

// Between integers: modulo the width. To floats: to nearest even.
template <class D>
struct Convert {
  template <class A>
  static D f(A a) {
    return static_cast<D>(a);
  }
};
// An 8-bit integer in a wider register, of which the rest is ignored when it is read; 0 or the sign when written.
template <class D, class Byte>
struct FromByte {
  template <class A>
  static D f(A a) {
    return static_cast<D>(static_cast<Byte>(a));
  }
};
// Toward zero, or to nearest even; what does not fit becomes the nearest that does, NaN becomes 0.
template <class D, bool nearest>
struct ToInteger {
  template <class A>
  static D f(A a) {
    const A rounded = nearest ? std::nearbyint(a) : std::trunc(a);
    if (std::isnan(a)) return 0;
    if (rounded <= static_cast<A>(std::numeric_limits<D>::min())) return std::numeric_limits<D>::min();
    if (rounded >= static_cast<A>(std::numeric_limits<D>::max())) return std::numeric_limits<D>::max();
    return static_cast<D>(rounded);
  }
};
// 10 bits of fraction, to nearest, ties away from zero.
struct ToTf32 {
  static uint32_t f(float a) {
    const uint32_t bits = std::bit_cast<uint32_t>(a);
    if (std::isnan(a)) return 0x7FFFE000u;
    return std::isinf(a) ? bits : (bits + 0x1000u) & ~0x1FFFu;
  }
};
struct FromHalf {
  static float f(uint16_t a) { return half_to_float(a); }
};
struct ToHalf {
  static uint16_t f(float a) { return float_to_half(a); }
};
struct FromBfloat {
  static float f(uint16_t a) { return bf16_to_float(a); }
};
struct ToBfloat {
  static uint16_t f(float a) { return float_to_bf16(a); }
};
// Two at once; the first operand is the upper half.
struct ToTwoHalves {
  static uint32_t f(float a, float b) { return uint32_t{float_to_half(a)} << 16 | float_to_half(b); }
};
struct ToTwoBfloats {
  static uint32_t f(float a, float b) { return uint32_t{float_to_bf16(a)} << 16 | float_to_bf16(b); }
};

Signature between_integers(const std::string& to, const std::string& from) {
  return with_integer(to, [&](auto d) {
    return with_integer(from, [&](auto a) -> Signature {
      using D = decltype(d);
      using A = decltype(a);
      return {unary<D, A, Convert<D>>, {kBits<D>}, {kBits<A>}};
    });
  });
}
template <class Byte>
Signature from_byte(const std::string& to, int width) {
  return with_integer(to, [&](auto d) -> Signature {
    using D = decltype(d);
    if (width == 16) return {unary<D, uint16_t, FromByte<D, Byte>>, {kBits<D>}, {16}};
    if (width == 32) return {unary<D, uint32_t, FromByte<D, Byte>>, {kBits<D>}, {32}};
    return {};
  });
}
template <class Byte>
Signature to_byte(const std::string& from, int width) {
  return with_integer(from, [&](auto a) -> Signature {
    using A = decltype(a);
    using Narrow = std::conditional_t<std::is_signed_v<Byte>, int16_t, uint16_t>;
    using Wide = std::conditional_t<std::is_signed_v<Byte>, int32_t, uint32_t>;
    if (width == 16) return {unary<Narrow, A, FromByte<Narrow, Byte>>, {16}, {kBits<A>}};
    if (width == 32) return {unary<Wide, A, FromByte<Wide, Byte>>, {32}, {kBits<A>}};
    return {};
  });
}
template <class F>
Signature to_float(const std::string& from) {
  return with_integer(from, [](auto a) -> Signature {
    using A = decltype(a);
    return {unary<F, A, Convert<F>>, {kBits<F>}, {kBits<A>}};
  });
}
template <class F, bool nearest>
Signature to_integer(const std::string& to) {
  return with_integer(to, [](auto d) -> Signature {
    using D = decltype(d);
    return {unary<D, F, ToInteger<D, nearest>>, {kBits<D>}, {kBits<F>}};
  });
}

template <class Whole, class Part, int parts>
void pack(Warp& warp, const Instruction& in, uint32_t lanes) {
  for_each_lane(lanes, [&](int lane) {
    Whole whole = 0;
    for (int i = 0; i < parts; ++i) {
      whole |= static_cast<Whole>(lanes_of<Part>(warp, in.operand[1 + i])[lane]) << (i * kBits<Part>);
    }
    lanes_of<Whole>(warp, in.operand[0])[lane] = whole;
  });
}
template <class Whole, class Part, int parts>
void unpack(Warp& warp, const Instruction& in, uint32_t lanes) {
  for_each_lane(lanes, [&](int lane) {
    const Whole whole = lanes_of<Whole>(warp, in.operand[parts])[lane];
    for (int i = 0; i < parts; ++i) {
      lanes_of<Part>(warp, in.operand[i])[lane] = static_cast<Part>(whole >> (i * kBits<Part>));
    }
  });
}

}  // namespace

Signature conversion(const Words& words, int target_width, int source_width) {
  if (words.size() < 3 || words.size() > 4) return {};
  const std::string &to = words[words.size() - 2], &from = words.back(), how = words.size() == 4 ? words[1] : "";
  const auto is_integer = [](const std::string& type) { return type[0] == 'u' || type[0] == 's'; };
  if (is_integer(to) && is_integer(from) && how.empty()) {
    if (from == "u8") return from_byte<uint8_t>(to, source_width);
    if (from == "s8") return from_byte<int8_t>(to, source_width);
    if (to == "u8") return to_byte<uint8_t>(from, target_width);
    if (to == "s8") return to_byte<int8_t>(from, target_width);
    return between_integers(to, from);
  }
  if (how == "rn") {
    if (to == "bf16x2" && from == "f32") return {binary<uint32_t, float, float, ToTwoBfloats>, {32}, {32, 32}};
    if (to == "f16x2" && from == "f32") return {binary<uint32_t, float, float, ToTwoHalves>, {32}, {32, 32}};
    if (to == "f16" && from == "f32") return {unary<uint16_t, float, ToHalf>, {16}, {32}};
    if (to == "bf16" && from == "f32") return {unary<uint16_t, float, ToBfloat>, {16}, {32}};
    if (to == "f32" && from == "f64") return {unary<float, double, Convert<float>>, {32}, {64}};
    if (to == "f32" && is_integer(from)) return to_float<float>(from);
    if (to == "f64" && is_integer(from)) return to_float<double>(from);
  }
  if (how == "rna" && to == "tf32" && from == "f32") return {unary<uint32_t, float, ToTf32>, {32}, {32}};
  if (how.empty()) {
    if (to == "f64" && from == "f32") return {unary<double, float, Convert<double>>, {64}, {32}};
    if (to == "f32" && from == "f16") return {unary<float, uint16_t, FromHalf>, {32}, {16}};
    if (to == "f32" && from == "bf16") return {unary<float, uint16_t, FromBfloat>, {32}, {16}};
  }
  if (is_integer(to) && (how == "rzi" || how == "rni")) {
    if (from == "f32") return how == "rni" ? to_integer<float, true>(to) : to_integer<float, false>(to);
    if (from == "f64") return how == "rni" ? to_integer<double, true>(to) : to_integer<double, false>(to);
  }
  return {};
}

Handler move_of(int bits) {
  if (bits == 16) return unary<uint16_t, uint16_t, Convert<uint16_t>>;
  if (bits == 32) return unary<uint32_t, uint32_t, Convert<uint32_t>>;
  if (bits == 64) return unary<uint64_t, uint64_t, Convert<uint64_t>>;
  return nullptr;
}
Handler pack_of(int bits, int parts) {
  if (bits == 32 && parts == 2) return pack<uint32_t, uint16_t, 2>;
  if (bits == 64 && parts == 2) return pack<uint64_t, uint32_t, 2>;
  if (bits == 64 && parts == 4) return pack<uint64_t, uint16_t, 4>;
  return nullptr;
}
Handler unpack_of(int bits, int parts) {
  if (bits == 32 && parts == 2) return unpack<uint32_t, uint16_t, 2>;
  if (bits == 64 && parts == 2) return unpack<uint64_t, uint32_t, 2>;
  if (bits == 64 && parts == 4) return unpack<uint64_t, uint16_t, 4>;
  return nullptr;
}

}  // namespace ptx
