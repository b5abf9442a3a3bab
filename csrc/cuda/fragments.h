// The matrix arithmetic of a warp: 16 x 16 blocks of sums, accumulated from operands in shared memory.
//
// One interface, three ways to compute it: tensor cores on 16-bit elements, tensor cores on TF32, and plain
// multiply-adds on float or double. Whatever computes it, lane i holds the same eight sums of a block (those of two
// m16n8 accumulators of mma.sync side by side): with g = i / 4 and t = i % 4,
//     sum[j][k] is row g + 8 * (k / 2), column 8 * j + 2 * t + k % 2.
// An operand is a tile in shared memory, read as it lies (`rows`: the summed index runs along a row) or transposed
// (`cols`: it runs down a column).
#pragma once

#include <type_traits>

#include "device.h"
#include "heuristics.h"

namespace mos::cuda {

template <class S>
struct Block {
  S sum[2][4];
};
template <class S>
MOS_DEVICE void clear(Block<S>& block) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
#pragma unroll
    for (int k = 0; k < 4; ++k) block.sum[j][k] = S(0);
  }
}

// Row and column of sum[j][k] in its block.
MOS_DEVICE int block_row(int lane, int k) { return lane / 4 + 8 * (k / 2); }
MOS_DEVICE int block_col(int lane, int j, int k) { return 8 * j + 2 * (lane % 4) + k % 2; }

// Elements <-> sums.
MOS_DEVICE float to_sum(float x) { return x; }
MOS_DEVICE double to_sum(double x) { return x; }
MOS_DEVICE float to_sum(bf16_t x) { return to_float(x); }
MOS_DEVICE float to_sum(f16_t x) { return to_float(x); }
template <class E, class S>
MOS_DEVICE E from_sum(S x) {
  if constexpr (sizeof(E) == 2) {
    return E{static_cast<uint16_t>(pack<E>(x, 0.f))};
  } else {
    return static_cast<E>(x);
  }
}

// Two neighbouring elements with one store; target is aligned to both.
template <class E, class S>
MOS_DEVICE void store_pair(E* target, S first, S second) {
  if constexpr (sizeof(E) == 2) {
    *reinterpret_cast<uint32_t*>(target) = pack<E>(first, second);
  } else {
    struct alignas(2 * sizeof(E)) Pair {
      E first, second;
    };
    *reinterpret_cast<Pair*>(target) = {static_cast<E>(first), static_cast<E>(second)};
  }
}

// Adds two neighbouring elements, read at once, to two sums.
template <class E, class S>
MOS_DEVICE void add_pair(const E* source, S& first, S& second) {
  if constexpr (sizeof(E) == 2) {
    const uint32_t both = *reinterpret_cast<const uint32_t*>(source);
    first += to_sum(E{static_cast<uint16_t>(both)});
    second += to_sum(E{static_cast<uint16_t>(both >> 16)});
  } else {
    first += to_sum(source[0]);
    second += to_sum(source[1]);
  }
}
// Four neighbouring elements, with one store where 16 bytes hold them; target is aligned to 16 bytes, or to all four.
template <class E, class S>
MOS_DEVICE void store_quad(E* target, S a, S b, S c, S d) {
  if constexpr (sizeof(E) == 2) {
    *reinterpret_cast<uint2*>(target) = {pack<E>(a, b), pack<E>(c, d)};
  } else if constexpr (sizeof(E) == 4) {
    store_16(target, {bit_cast<uint32_t>(a), bit_cast<uint32_t>(b), bit_cast<uint32_t>(c), bit_cast<uint32_t>(d)});
  } else {
    store_pair(target, a, b);
    store_pair(target + 2, c, d);
  }
}
// The same of the bits of four floats.
template <class E>
MOS_DEVICE void store_floats(E* target, const uint4& bits) {
  store_quad(target, bit_cast<float>(bits.x), bit_cast<float>(bits.y), bit_cast<float>(bits.z),
             bit_cast<float>(bits.w));
}

// Calls write(row, col, first, second) for each pair of neighbouring sums that this lane holds of a block.
template <class S, class F>
MOS_DEVICE void for_each_pair(const Block<S>& block, int lane, const F& write) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
#pragma unroll
    for (int k = 0; k < 4; k += 2) {
      write(block_row(lane, k), block_col(lane, j, k), block.sum[j][k], block.sum[j][k + 1]);
    }
  }
}

// A matrix of E in shared memory. Pitches: heuristics.h.
template <class E>
struct SharedMatrix {
  unsigned char* data;
  int pitch;  // bytes between rows

  MOS_DEVICE E* at(int row, int col) const {
    return reinterpret_cast<E*>(data + row * pitch + col * static_cast<int>(sizeof(E)));
  }
};

// 16-bit elements: mma.sync.m16n8k16 from ldmatrix.
template <class E_>
struct TensorCore {
  using E = E_;
  using S = float;
  static constexpr const char* kName = std::is_same_v<E, bf16_t> ? "bfloat16" : "float16";
  static constexpr int kStep = 16;   // of the summed index, per multiply
  static constexpr int kUnroll = 8;  // multiplies in a row worth their registers
  // Compile a kernel for whole vectors too: half the code. For the types that people train in.
  static constexpr bool kWholeVariant = true;
  struct A {
    uint32_t word[4];
  };
  struct B {
    uint32_t word[4];
  };

  // ldmatrix wants from lane i the address of row i % 8 of 8 x 8 matrix i / 8. The four matrices cover 16 x 16 elements
  // in one of two orders: down first, or across first.
  static MOS_DEVICE uint32_t down(const SharedMatrix<E>& m, int row, int col, int lane) {
    return shared_address(m.at(row + lane % 16, col + lane / 16 * 8));
  }
  static MOS_DEVICE uint32_t across(const SharedMatrix<E>& m, int row, int col, int lane) {
    return shared_address(m.at(row + lane % 8 + lane / 16 * 8, col + lane / 8 % 2 * 8));
  }

  static MOS_DEVICE A a_rows(const SharedMatrix<E>& m, int row, int k, int lane) {
    A a;
    ldmatrix_x4(a.word, down(m, row, k, lane));
    return a;
  }
  static MOS_DEVICE A a_cols(const SharedMatrix<E>& m, int k, int col, int lane) {
    A a;
    ldmatrix_x4_trans(a.word, across(m, k, col, lane));
    return a;
  }
  static MOS_DEVICE B b_rows(const SharedMatrix<E>& m, int row, int k, int lane) {
    B b;
    ldmatrix_x4(b.word, across(m, row, k, lane));
    return b;
  }
  static MOS_DEVICE B b_cols(const SharedMatrix<E>& m, int k, int col, int lane) {
    B b;
    ldmatrix_x4_trans(b.word, down(m, k, col, lane));
    return b;
  }
  static MOS_DEVICE void multiply(Block<S>& block, const A& a, const B& b) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint32_t half[2] = {b.word[2 * j], b.word[2 * j + 1]};
      if constexpr (std::is_same_v<E, bf16_t>) {
        mma_bf16(block.sum[j], a.word, half);
      } else {
        mma_f16(block.sum[j], a.word, half);
      }
    }
  }
};

// float elements rounded to TF32 (10 bits of fraction): mma.sync.m16n8k8. ldmatrix cannot transpose 32-bit elements, so
// fragments are gathered element by element; float32 activations are not where the time goes.
struct Tf32 {
  using E = float;
  using S = float;
  static constexpr const char* kName = "tf32";
  static constexpr int kStep = 8;
  static constexpr int kUnroll = 2;
  static constexpr bool kWholeVariant = false;
  struct A {
    uint32_t word[4];
  };
  struct B {
    uint32_t word[4];
  };

  static MOS_DEVICE A a_rows(const SharedMatrix<E>& m, int row, int k, int lane) {
    A a;
#pragma unroll
    for (int i = 0; i < 4; ++i) a.word[i] = round_to_tf32(*m.at(row + lane / 4 + i % 2 * 8, k + lane % 4 + i / 2 * 4));
    return a;
  }
  static MOS_DEVICE A a_cols(const SharedMatrix<E>& m, int k, int col, int lane) {
    A a;
#pragma unroll
    for (int i = 0; i < 4; ++i) a.word[i] = round_to_tf32(*m.at(k + lane % 4 + i / 2 * 4, col + lane / 4 + i % 2 * 8));
    return a;
  }
  static MOS_DEVICE B b_rows(const SharedMatrix<E>& m, int row, int k, int lane) {
    B b;
#pragma unroll
    for (int i = 0; i < 4; ++i) b.word[i] = round_to_tf32(*m.at(row + lane / 4 + i / 2 * 8, k + lane % 4 + i % 2 * 4));
    return b;
  }
  static MOS_DEVICE B b_cols(const SharedMatrix<E>& m, int k, int col, int lane) {
    B b;
#pragma unroll
    for (int i = 0; i < 4; ++i) b.word[i] = round_to_tf32(*m.at(k + lane % 4 + i % 2 * 4, col + lane / 4 + i / 2 * 8));
    return b;
  }
  static MOS_DEVICE void multiply(Block<S>& block, const A& a, const B& b) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint32_t half[2] = {b.word[2 * j], b.word[2 * j + 1]};
      mma_tf32(block.sum[j], a.word, half);
    }
  }
};

// float and double, exactly: each lane multiplies the two rows and four columns that its sums need.
template <class T>
struct MultiplyAdd {
  using E = T;
  using S = T;
  static constexpr const char* kName = sizeof(T) == 4 ? "float32" : "float64";
  static constexpr int kStep = 4;
  static constexpr int kUnroll = 1;
  static constexpr bool kWholeVariant = false;
  struct A {
    T value[2][kStep];
  };
  struct B {
    T value[4][kStep];
  };

  static MOS_DEVICE A a_rows(const SharedMatrix<E>& m, int row, int k, int lane) {
    A a;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int q = 0; q < kStep; ++q) a.value[i][q] = *m.at(row + block_row(lane, 2 * i), k + q);
    }
    return a;
  }
  static MOS_DEVICE A a_cols(const SharedMatrix<E>& m, int k, int col, int lane) {
    A a;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int q = 0; q < kStep; ++q) a.value[i][q] = *m.at(k + q, col + block_row(lane, 2 * i));
    }
    return a;
  }
  static MOS_DEVICE B b_rows(const SharedMatrix<E>& m, int row, int k, int lane) {
    B b;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int q = 0; q < kStep; ++q) b.value[i][q] = *m.at(row + block_col(lane, i / 2, i), k + q);
    }
    return b;
  }
  static MOS_DEVICE B b_cols(const SharedMatrix<E>& m, int k, int col, int lane) {
    B b;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int q = 0; q < kStep; ++q) b.value[i][q] = *m.at(k + q, col + block_col(lane, i / 2, i));
    }
    return b;
  }
  static MOS_DEVICE void multiply(Block<S>& block, const A& a, const B& b) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int q = 0; q < kStep; ++q) block.sum[j][k] += a.value[k / 2][q] * b.value[2 * j + k % 2][q];
      }
    }
  }
};

// Calls f(arithmetic, std::integral_constant<int, ranks of a block>) for a dtype and a rank.
template <class F>
cudaError_t with_arithmetic(DType dtype, Float32 float32, int64_t rank, const F& f) {
  const auto sized = [&](auto arithmetic) {
    constexpr int size = sizeof(typename decltype(arithmetic)::E);
    constexpr std::integral_constant<int, narrow_ranks(size)> narrow;
    constexpr std::integral_constant<int, wide_ranks(size)> wide;
    if constexpr (narrow() == wide()) {
      return f(arithmetic, wide);
    } else {
      return rank <= narrow() ? f(arithmetic, narrow) : f(arithmetic, wide);
    }
  };
  switch (dtype) {
    case DType::bf16:
      return sized(TensorCore<bf16_t>{});
    case DType::f16:
      return sized(TensorCore<f16_t>{});
    case DType::f32:
      return float32 == Float32::tf32 ? sized(Tf32{}) : sized(MultiplyAdd<float>{});
    case DType::f64:
      return sized(MultiplyAdd<double>{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace mos::cuda
