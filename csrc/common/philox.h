// Philox4x32 with 7 rounds: the counter-based generator behind dropout.
//
// Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), table 2: 7 rounds pass
// BigCrush. One call gives 128 bits, eight dropout decisions of 16 bits each: element (row, col)
// owns bits [16 * (col % 8), +16) of the block with counter (col / 8, row_lo, row_hi, 0) and key =
// seed. The decision depends on the position alone, never on tiling or threads, so forward and
// backward, CPU and CUDA and mos_ext/reference.py all agree.
#pragma once

#include "numeric.h"

namespace mos {

constexpr int kPhiloxRounds = 7;
constexpr int kDropoutGroup = 8;  // elements decided by one Philox block

struct PhiloxBlock {
  uint32_t word[4];
};

constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;

// All 64 bits of a product of 32-bit words. Left to itself nvcc 13 multiplies in 64 bits and adds the zero of the upper
// word, an instruction for each of the 14 products of a block.
MOS_HOST_DEVICE uint64_t multiply_wide(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return static_cast<uint64_t>(a) * b;
#endif
}

MOS_HOST_DEVICE void philox_round(uint32_t k0, uint32_t k1, uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3) {
  const uint64_t p0 = multiply_wide(c0, 0xD2511F53u), p1 = multiply_wide(c2, 0xCD9E8D57u);
  const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0, n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
  c1 = static_cast<uint32_t>(p1), c3 = static_cast<uint32_t>(p0), c0 = n0, c2 = n2;
}

MOS_HOST_DEVICE PhiloxBlock philox(uint64_t seed, uint32_t column_group, uint64_t row) {
  uint32_t c0 = column_group, c1 = static_cast<uint32_t>(row), c2 = static_cast<uint32_t>(row >> 32), c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    philox_round(k0, k1, c0, c1, c2, c3);
    k0 += kPhiloxWeyl0, k1 += kPhiloxWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

// The 16 bits of element `lane` (0..7) of a block.
MOS_HOST_DEVICE uint32_t dropout_bits(const PhiloxBlock& block, int lane) {
  return (block.word[lane >> 1] >> (16 * (lane & 1))) & 0xFFFFu;
}

}  // namespace mos
