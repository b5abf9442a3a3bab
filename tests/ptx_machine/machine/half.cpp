#include "half.h"

namespace ptx {

std::vector<float> make_half_table() {
  std::vector<float> values(1 << 16);
  for (uint32_t i = 0; i < values.size(); ++i) {
    const uint32_t exponent = i >> 10 & 31, fraction = i & 1023;
    const float units = static_cast<float>(exponent ? 1024 + fraction : fraction);
    const float finite = std::ldexp(units, exponent ? static_cast<int>(exponent) - 25 : -24);
    const float magnitude = exponent < 31 ? finite : fraction ? NAN : INFINITY;
    values[i] = i >> 15 ? -magnitude : magnitude;
  }
  return values;
}

}  // namespace ptx
