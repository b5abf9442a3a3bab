// 16-bit floats, to nearest, ties to even. NaN becomes 0x7FFF, as the hardware has it.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

namespace ptx {

inline float bf16_to_float(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }
inline uint16_t float_to_bf16(float value) {
  if (std::isnan(value)) return 0x7FFF;
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

// Of all 65536.
std::vector<float> make_half_table();
inline const std::vector<float> half_table = make_half_table();
inline float half_to_float(uint16_t bits) { return half_table[bits]; }
inline uint16_t float_to_half(float value) {
  if (std::isnan(value)) return 0x7FFF;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.f) return sign | 0x7C00;
  int exponent;
  std::frexp(magnitude, &exponent);
  // In units of the last place, whose exponent is no smaller than a subnormal's.
  const int unit = magnitude == 0.f || exponent - 11 < -24 ? -24 : exponent - 11;
  const uint32_t units = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, -unit)));
  // 1024 units of a normal number are its hidden bit, which counts up the exponent's field.
  return static_cast<uint16_t>(sign | ((static_cast<uint32_t>(unit + 24) << 10) + units));
}

}  // namespace ptx
