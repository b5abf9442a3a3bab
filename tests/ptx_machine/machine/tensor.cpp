// mma and ldmatrix. Lane i holds, with g = i / 4 and t = i % 4, what the instruction set's figures say.
#include <bit>
#include <cstring>

#include "half.h"
#include "handlers.h"
#include "memory.h"

namespace ptx {
namespace {

// Where the registers of D, A, B and C are among the operands.
constexpr int kD = 0, kA = 4, kB = 8, kC = 10;

// D = A (16 x k) B (k x 8) + C. Products are exact in double; they are added there, to C, and rounded once.
template <int k>
void multiply(Warp& warp, const Instruction& in, const float (&a)[16][k], const float (&b)[k][8]) {
  for (int row = 0; row < 16; ++row) {
    const int g = row % 8, upper = 2 * (row / 8);
    double sums[8];
    for (int col = 0; col < 8; ++col) {
      sums[col] = lanes_of<float>(warp, in.operand[kC + upper + col % 2])[g * 4 + col / 2];
    }
    for (int q = 0; q < k; ++q) {
      for (int col = 0; col < 8; ++col) sums[col] += static_cast<double>(a[row][q]) * static_cast<double>(b[q][col]);
    }
    for (int col = 0; col < 8; ++col) {
      lanes_of<float>(warp, in.operand[kD + upper + col % 2])[g * 4 + col / 2] = static_cast<float>(sums[col]);
    }
  }
}

template <float (*to_float)(uint16_t)>
void mma_16(Warp& warp, const Instruction& in, uint32_t) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r) {
      const uint32_t two = lanes_of<uint32_t>(warp, in.operand[kA + r])[lane];
      const int row = g + r % 2 * 8, col = t * 2 + r / 2 * 8;
      a[row][col] = to_float(static_cast<uint16_t>(two));
      a[row][col + 1] = to_float(static_cast<uint16_t>(two >> 16));
    }
    for (int r = 0; r < 2; ++r) {
      const uint32_t two = lanes_of<uint32_t>(warp, in.operand[kB + r])[lane];
      b[t * 2 + r * 8][g] = to_float(static_cast<uint16_t>(two));
      b[t * 2 + r * 8 + 1][g] = to_float(static_cast<uint16_t>(two >> 16));
    }
  }
  multiply(warp, in, a, b);
}

void mma_tf32(Warp& warp, const Instruction& in, uint32_t) {
  float a[16][8], b[8][8];
  const auto value = [&](int operand, int lane) {
    const uint32_t bits = lanes_of<uint32_t>(warp, in.operand[operand])[lane];
    // The hardware ignores the bits below; what they were meant to do it does not say.
    if (bits & 0x1FFFu) fail("an operand of mma.tf32 that was not rounded");
    return std::bit_cast<float>(bits);
  };
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r) a[g + r % 2 * 8][t + r / 2 * 4] = value(kA + r, lane);
    for (int r = 0; r < 2; ++r) b[t + r * 4][g] = value(kB + r, lane);
  }
  multiply(warp, in, a, b);
}

// Lane i brings the address of row i % 8 of matrix i / 8, and receives two elements of each matrix.
template <int matrices, bool transposed>
void load_matrices(Warp& warp, const Instruction& in, uint32_t) {
  uint32_t loaded[matrices][kLanes];
  for (int matrix = 0; matrix < matrices; ++matrix) {
    uint16_t v[8][8];
    uint64_t addresses[8];
    for (int row = 0; row < 8; ++row) {
      const uint32_t address =
          lanes_of<uint32_t>(warp, in.operand[matrices])[matrix * 8 + row] + static_cast<uint32_t>(in.immediate);
      require_aligned(address, 16);
      addresses[row] = address;
      std::memcpy(v[row], shared_bytes(warp, address, 16), 16);
      if (config.race) note_shared_read(warp, address - kSharedBase, 16, kAllLanes);
    }
    if (config.traffic) count_shared(in, addresses, 8, 16);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int g = lane / 4, t = lane % 4 * 2;
      loaded[matrix][lane] = transposed ? v[t][g] | uint32_t{v[t + 1][g]} << 16 : v[g][t] | uint32_t{v[g][t + 1]} << 16;
    }
  }
  // Only now: a target may be the address's register.
  for (int matrix = 0; matrix < matrices; ++matrix) {
    std::memcpy(lanes_of<uint32_t>(warp, in.operand[matrix]), loaded[matrix], sizeof loaded[matrix]);
  }
}

}  // namespace

Handler mma_of(const std::string& name) {
  if (name == "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32") return mma_16<bf16_to_float>;
  if (name == "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32") return mma_16<half_to_float>;
  if (name == "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32") return mma_tf32;
  return nullptr;
}

Handler ldmatrix_of(int matrices, bool transposed) {
  if (matrices == 1) return transposed ? load_matrices<1, true> : load_matrices<1, false>;
  if (matrices == 2) return transposed ? load_matrices<2, true> : load_matrices<2, false>;
  if (matrices == 4) return transposed ? load_matrices<4, true> : load_matrices<4, false>;
  return nullptr;
}

}  // namespace ptx
