// low_rank_pass: how a pass is cut into blocks, who owns which sum, and which instruction set runs.
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "../common/numeric.h"
#include "../common/philox.h"
#include "kernels.h"

namespace mos::cpu {

namespace {

// A staged tile of 16 x 256 floats is 16 KiB: with a rank-16 factor tile (16 KiB) it fills a 32 KiB
// L1.
constexpr int64_t kRowTile = 16, kColTile = 256;
// Tiles are padded to whole micro-tiles: 4 rows, two AVX-512 vectors of columns; the rank plays
// either role.
constexpr int64_t kRowMultiple = 4, kColMultiple = 32, kRankMultiple = 4;
// Rows of a block. A block that sums over rows (factor_grad) keeps rank * cols floats of its own, so it takes many, and
// there are at most kMaxRowBlocks of them however long T is.
constexpr int64_t kBlockRows = 128, kBlockRowsSummed = 1024, kMaxRowBlocks = 16;
// At most this many blocks side by side when each needs its own (T, r) sums.
constexpr int64_t kMaxSplits = 8;
// Enough for two tasks a thread on 16 threads; a function of the shape alone, never of the threads there are.
constexpr int64_t kWantedBlocks = 32;

// Size of a staged tile, padding included.
struct Tile {
  int64_t rows, cols;
};

struct Block {
  int64_t t0, t1, c0, c1;
};

// Unsigned integers as wide as T.
template <class T>
struct Bits;
template <>
struct Bits<float> {
  using type = uint32_t;
};
template <>
struct Bits<double> {
  using type = uint64_t;
};
template <class T>
using bits_t = typename Bits<T>::type;

template <class T>
struct Scratch {
  T *in, *factor, *s, *projected, *out;
  bits_t<T>* mask;
};

// 64-byte aligned memory, released at the end of the scope.
class AlignedBuffer {
 public:
  explicit AlignedBuffer(size_t bytes) : data_(std::aligned_alloc(64, (bytes + 127) / 64 * 64)) {
    if (!data_) throw std::bad_alloc();
  }
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;
  ~AlignedBuffer() { std::free(data_); }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_;
};

}  // namespace
}  // namespace mos::cpu

#define MOS_ISA baseline
#define MOS_VECTOR_BYTES 16
#include "low_rank_tiles.h"
#undef MOS_ISA
#undef MOS_VECTOR_BYTES

#if defined(__x86_64__)
#define MOS_HAS_X86 1

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define MOS_ISA avx2
#ifdef MOS_EXT_TEST_WIDE  // tests run the 64-byte tiles of AVX-512 on machines that only have AVX2
#define MOS_VECTOR_BYTES 64
#else
#define MOS_VECTOR_BYTES 32
#endif
#include "low_rank_tiles.h"
#undef MOS_ISA
#undef MOS_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,prefer-vector-width=512")
#endif
#define MOS_ISA avx512
#define MOS_VECTOR_BYTES 64
#include "low_rank_tiles.h"
#undef MOS_ISA
#undef MOS_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace mos::cpu {

namespace {

template <class T>
using RunBlock = void (*)(const LowRankPass&, const Block&, const Scratch<T>&, T*, T*, int64_t);

struct InstructionSet {
  const char* name;
  RunBlock<float> f32;
  RunBlock<double> f64;

  RunBlock<float> run(float) const { return f32; }
  RunBlock<double> run(double) const { return f64; }
};

constexpr InstructionSet kInstructionSets[] = {
#ifdef MOS_HAS_X86
    {"avx512", avx512::run_block_f32, avx512::run_block_f64},
    {"avx2", avx2::run_block_f32, avx2::run_block_f64},
#endif
    {"baseline", baseline::run_block_f32, baseline::run_block_f64},
};

bool runs_here(const char* name) {
#ifdef MOS_HAS_X86
  if (!std::strcmp(name, "avx512")) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
  if (!std::strcmp(name, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return !std::strcmp(name, "baseline");
}

// The best set that runs here, but none better than MOS_EXT_CPU_ISA names (for tests and comparisons). Decided once.
const InstructionSet& chosen() {
  static const InstructionSet* const set = [] {
    const char* limit = std::getenv("MOS_EXT_CPU_ISA");
    bool allowed = true;
    for (const InstructionSet& candidate : kInstructionSets) {
      if (limit && !std::strcmp(limit, candidate.name)) allowed = false;
    }
    allowed = !(limit && !allowed);  // a name that is no instruction set limits nothing
    for (const InstructionSet& candidate : kInstructionSets) {
      allowed = allowed || !std::strcmp(limit, candidate.name);
      if (allowed && runs_here(candidate.name)) return &candidate;
    }
    return &kInstructionSets[sizeof(kInstructionSets) / sizeof(kInstructionSets[0]) - 1];
  }();
  return *set;
}

template <class T>
void low_rank_pass_as(const LowRankPass& p, const ParallelFor& parallel) {
  const RunBlock<T> run_block = chosen().run(T());
  const int64_t total_rows = p.activations().rows, total_cols = p.factor.cols();
  const int64_t rank = p.factor.rank, rank_padded = round_up(rank, kRankMultiple);

  // The grid depends on the shape alone, so the sums do too: bitwise equal runs, whatever the
  // number of threads.
  const int64_t block_rows = p.factor_grad ? max64(kBlockRowsSummed, ceil_div(total_rows, kMaxRowBlocks)) : kBlockRows;
  const int64_t row_blocks = ceil_div(total_rows, block_rows);
  int64_t splits = ceil_div(kWantedBlocks, max64(1, row_blocks));
  if (p.projected) splits = min64(splits, kMaxSplits);
  splits = max64(1, min64(splits, ceil_div(total_cols, kColTile)));
  const int64_t block_cols = round_up(ceil_div(total_cols, splits), kColTile);
  splits = total_cols ? ceil_div(total_cols, block_cols) : 0;

  // Own sums of each block, added up in a fixed order below. One split sums in the result itself.
  T* result = static_cast<T*>(p.projected);
  const int64_t plane_size = total_rows * rank;
  const bool own_planes = p.projected && splits != 1;
  AlignedBuffer planes(own_planes ? static_cast<size_t>(splits * plane_size) * sizeof(T) : 0);
  T* plane = own_planes ? planes.as<T>() : result;
  const int64_t grad_stride = splits * block_cols, grad_size = rank_padded * grad_stride;
  AlignedBuffer grads(p.factor_grad ? static_cast<size_t>(row_blocks * grad_size) * sizeof(T) : 0);

  parallel(row_blocks * splits, [&](int64_t i) {
    const int64_t row_block = i / splits, split = i % splits;
    const Block block{row_block * block_rows, min64(total_rows, (row_block + 1) * block_rows), split * block_cols,
                      min64(total_cols, (split + 1) * block_cols)};
    const int64_t tile = kRowTile * kColTile, factor_tile = rank_padded * kColTile, sums = kRowTile * rank_padded;
    AlignedBuffer memory(static_cast<size_t>(3 * tile + factor_tile + 2 * sums) * sizeof(T));
    T* base = memory.as<T>();
    Scratch<T> scratch;
    scratch.in = base;
    scratch.out = scratch.in + tile;
    scratch.factor = scratch.out + tile;
    scratch.s = scratch.factor + factor_tile;
    scratch.projected = scratch.s + sums;
    scratch.mask = reinterpret_cast<bits_t<T>*>(scratch.projected + sums);
    T *projected = nullptr, *grad = nullptr;
    if (p.projected) {
      projected = plane + split * plane_size + block.t0 * rank;
      std::memset(projected, 0, static_cast<size_t>((block.t1 - block.t0) * rank) * sizeof(T));
    }
    if (p.factor_grad) {
      grad = grads.as<T>() + row_block * grad_size + block.c0;
      for (int64_t j = 0; j < rank_padded; ++j) {
        std::memset(grad + j * grad_stride, 0, static_cast<size_t>(block_cols) * sizeof(T));
      }
    }
    run_block(p, block, scratch, projected, grad, grad_stride);
  });

  if (p.projected) {
    parallel(row_blocks, [&](int64_t row_block) {
      for (int64_t i = row_block * block_rows * rank; i < min64(total_rows, (row_block + 1) * block_rows) * rank; ++i) {
        T sum = T(0);
        for (int64_t split = 0; split < splits; ++split) sum += plane[split * plane_size + i];
        result[i] = static_cast<T>(p.scale) * sum;
      }
    });
  }
  if (p.factor_grad) {
    T* out = static_cast<T*>(p.factor_grad);
    parallel(rank, [&](int64_t j) {
      T* row = out + j * total_cols;
      std::memset(row, 0, static_cast<size_t>(total_cols) * sizeof(T));
      for (int64_t row_block = 0; row_block < row_blocks; ++row_block) {
        const T* part = grads.as<T>() + row_block * grad_size + j * grad_stride;
        for (int64_t c = 0; c < total_cols; ++c) row[c] += part[c];
      }
    });
  }
}

}  // namespace

void low_rank_pass(const LowRankPass& pass, const ParallelFor& parallel) {
  if (pass.activations().dtype == DType::f64) {
    low_rank_pass_as<double>(pass, parallel);
  } else {
    low_rank_pass_as<float>(pass, parallel);
  }
}

const char* instruction_set() { return chosen().name; }

}  // namespace mos::cpu
