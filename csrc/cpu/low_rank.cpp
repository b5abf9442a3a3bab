// low_rank_pass: how a pass is cut into blocks, who owns which sum, and which instruction set runs.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <type_traits>
#include <vector>

#include "../common/numeric.h"
#include "../common/philox.h"
#include "kernels.h"

namespace mos::cpu {

namespace {

// Tiles of activations: 64 rows of 512 columns are 64 KiB in bf16, 128 KiB in fp32, and with the factor's tile and the
// sums of its gradient (32 KiB each at rank 16) stay in an L2 cache of 512 KiB while all products of a pass use them.
constexpr int64_t kRowTile = 64, kColTile = 512;
// Two of the widest vectors of floats: what the inner loops take at once is this or a divisor of it.
constexpr int64_t kPanelMultiple = 32;
// Columns whose dropout decisions are drawn at once.
constexpr int64_t kMaskColumns = 128;
// Rows of a block. A block that sums over rows (factor_grad) keeps rank * cols floats of its own, so it takes many, and
// there are at most kMaxRowBlocks of them however long T is.
constexpr int64_t kBlockRows = 128, kBlockRowsSummed = 512, kMaxRowBlocks = 16;
// Rows of a block that go through all its columns before the next ones do, so that the (rows, rank) sums of `projected`
// that it holds do not grow with T: 128 KiB at rank 16. A multiple of kRowTile: no sum is cut elsewhere for it. (512
// rows take up to 1.4 times as long at rank 64, d = 4096, where the factor's gradient is fetched into L2 per chunk.)
constexpr int64_t kChunkRows = 2048;
// At most this many blocks side by side when each needs its own (T, r) sums.
constexpr int64_t kMaxSplits = 8;
// Enough for 16 threads; a function of the shape alone, never of the threads there are.
constexpr int64_t kWantedBlocks = 16;
// Columns whose sums a direct product keeps in lanes, and rows of its blocks, which take the factor's columns from L2.
constexpr int64_t kDirectCols = 1024, kDirectRows = 64;
// Passes of up to this many multiply-adds run on the thread that asks, since waking others takes longer: two threads
// against one, over a row of 1024 columns, took 14 and 11 us. Laying out a factor counts as so many rows.
constexpr int64_t kSmallPass = 1 << 20, kPackRows = 16;
// The same of direct products, where reading a factor counts as so many rows: shrink and expand of one row of 4096
// columns at rank 16 (0.26 M each) took 13 us with two threads and 7 with one, of 16 rows (1.2 M) 36 and 27, of 4 rows
// at rank 64 (1.8 M) 27 and 32, of 16 rows with a factor each (4.2 M) 65 and 89.
constexpr int64_t kSmallDirectPass = 3 << 19, kReadRows = 3;

struct Block {
  int64_t t0, t1, c0, c1;
  int64_t sum_stride;  // elements between rows of s
  bool accumulate;     // the block's factor gradient goes onto that of rows before t0
};

// A factor gathered, converted and laid out for the inner loops: all its columns, once per pass.
struct PackedFactor {
  void *by_column, *by_rank;
};

// The inner loops of one arithmetic on one instruction set. `word_bytes` is the size of a word and of a sum; a word
// holds `group` elements.
struct Kernels {
  void (*pack_factor)(const Factor&, int64_t c0, int64_t cols, void* by_column, void* by_rank);
  void (*run_block)(const LowRankPass&, const Block&, const PackedFactor&, void* projected, void* grad,
                    int64_t grad_stride);
  int64_t width;  // sums in a vector
  int64_t group;
  size_t word_bytes;
  int64_t few_rows;  // that share a factor: up to so many are multiplied directly
};

// The products of few rows, whose factor is read where it lies (low_rank_direct.h), on one instruction set.
struct Direct {
  // sums (rows, sum_stride) += of a block of at most kDirectCols columns
  void (*project)(const LowRankPass&, const Block&, void* sums);
  void (*expand)(const LowRankPass&, const Block&);
  int64_t least_shard;  // columns: a vector
};

// Lane i of two interleaved rows of 32 elements is element order[i] of both: a0 b0 a1 b1 ...
struct InterleaveOrder {
  alignas(64) uint16_t low[32], high[32];
  constexpr InterleaveOrder() : low(), high() {
    for (int i = 0; i < 32; ++i) low[i] = static_cast<uint16_t>(i / 2 + i % 2 * 32), high[i] = low[i] + 16;
  }
};
constexpr InterleaveOrder kInterleave;

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

// The lanes of a vector as a type: 0, 1, ...
template <int... kLane>
struct Lanes {};
template <int n, int... kLane>
struct CountLanes : CountLanes<n - 1, n - 1, kLane...> {};
template <int... kLane>
struct CountLanes<0, kLane...> {
  using type = Lanes<kLane...>;
};
template <int n>
using FirstLanes = typename CountLanes<n>::type;

// 64-byte aligned memory, released at the end of the scope.
class AlignedBuffer {
 public:
  explicit AlignedBuffer(size_t bytes) : data_(bytes ? std::aligned_alloc(64, (bytes + 127) / 64 * 64) : nullptr) {
    if (bytes && !data_) throw std::bad_alloc();
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

// Loops over accumulators: unrolled early, or GCC keeps the array of them in memory and stores every sum (half the
// speed).
#define MOS_UNROLL _Pragma("GCC unroll 16")

// Lanes of the vectors a and b of type V, by constant positions in both.
#if defined(__clang__)
#define MOS_SHUFFLE(V, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MOS_SHUFFLE(V, a, b, ...) __builtin_shuffle(a, b, decltype(a == b){__VA_ARGS__})
#endif

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
#ifdef MOS_EXT_TEST_WIDE
#define MOS_ISA avx2_pairs
#define MOS_DOT 1
#include "low_rank_tiles.h"
#undef MOS_DOT
#undef MOS_ISA
#endif
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
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,prefer-vector-width=512")
#endif
#define MOS_ISA avx512_bf16
#define MOS_DOT 512
#include "low_rank_tiles.h"
#undef MOS_DOT
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

struct InstructionSet {
  const char* name;
  const Kernels *f32, *f64, *bf16;
  const Direct *direct, *direct_f64;

  const Kernels& kernels(DType activations) const {
    return *(activations == DType::f64 ? f64 : activations == DType::bf16 ? bf16 : f32);
  }
  const Direct& directly(DType activations) const { return *(activations == DType::f64 ? direct_f64 : direct); }
};

constexpr InstructionSet kInstructionSets[] = {
#ifdef MOS_HAS_X86
    {"avx512_bf16", &avx512::kFloat, &avx512::kDouble, &avx512_bf16::kDot, &avx512::kDirectFloat,
     &avx512::kDirectDouble},
    {"avx512", &avx512::kFloat, &avx512::kDouble, &avx512::kFloat, &avx512::kDirectFloat, &avx512::kDirectDouble},
#ifdef MOS_EXT_TEST_WIDE
    {"avx2", &avx2::kFloat, &avx2::kDouble, &avx2_pairs::kDot, &avx2::kDirectFloat, &avx2::kDirectDouble},
#else
    {"avx2", &avx2::kFloat, &avx2::kDouble, &avx2::kFloat, &avx2::kDirectFloat, &avx2::kDirectDouble},
#endif
#endif
    {"baseline", &baseline::kFloat, &baseline::kDouble, &baseline::kFloat, &baseline::kDirectFloat,
     &baseline::kDirectDouble},
};

bool runs_here(const char* name) {
#ifdef MOS_HAS_X86
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!std::strcmp(name, "avx512_bf16")) return avx512 && __builtin_cpu_supports("avx512bf16");
  if (!std::strcmp(name, "avx512")) return avx512;
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

// How often each shard is in the factor.
std::vector<int32_t> uses_of_shards(const Factor& factor) {
  std::vector<int32_t> uses(static_cast<size_t>(factor.num_shards));
  for (int64_t q = 0; q < factor.rank * factor.shards_per_vector; ++q) ++uses[static_cast<size_t>(factor.index[q])];
  return uses;
}

// Rows that share a factor, one group's or all there are, and the blocks they are cut into. The grid depends on shapes
// alone (and on ends), so the sums do too: bitwise equal runs, whatever the number of threads.
template <class T>
struct Share {
  LowRankPass pass;  // with the factor, the scale and the gradient of the group
  int64_t t0, t1;
  int64_t block_rows, row_blocks;
  int64_t rank_padded, words;  // of a column of the packed factor, of a row
  char* packed = nullptr;      // by all blocks together; null where the one block of rows packs its own columns
  T* grads = nullptr;          // of all row blocks, of `grad_size` elements each
  bool own_grads = false;      // to be added up, or the result itself
  int64_t grad_stride = 0, grad_size = 0;

  Share(const LowRankPass& p, int64_t first, int64_t end, const Kernels& kernels)
      : pass(p),
        t0(first),
        t1(end),
        block_rows(p.factor_grad ? max64(kBlockRowsSummed, ceil_div(end - first, kMaxRowBlocks)) : kBlockRows),
        row_blocks(ceil_div(end - first, block_rows)),
        rank_padded(round_up(p.factor.rank, kernels.width)),
        words(ceil_div(p.factor.rank, kernels.group)) {}
};

template <class T>
T* gradient_of(const LowRankPass& p, int64_t group) {
  return p.factor_grad ? static_cast<T*>(p.factor_grad) + group * p.factor.rank * p.factor.cols() : nullptr;
}

template <class T>
std::vector<Share<T>> shares_of(const LowRankPass& p, const Kernels& kernels) {
  std::vector<Share<T>> shares;
  const Groups& groups = p.groups;
  if (!groups) {
    shares.emplace_back(p, 0, p.places(), kernels);
    return shares;
  }
  shares.reserve(static_cast<size_t>(min64(groups.count, p.places())));
  for (int64_t g = 0; g < groups.count; ++g) {
    const int64_t begin = groups.begin(g), end = groups.end(g);
    if (begin >= end) continue;
    LowRankPass own = p;
    own.factor.index += g * p.factor.rank * p.factor.shards_per_vector;
    if (groups.ranks) own.factor.rank = max64(0, min64(p.factor.rank, groups.ranks[g]));
    if (groups.scales) own.scale *= static_cast<double>(groups.scales[g]);
    own.factor_grad = gradient_of<T>(p, g);
    if (own.factor.rank > 0) shares.emplace_back(own, begin, end, kernels);
  }
  return shares;
}

// Zeros wherever no share writes: sums of rows that belong to nobody or beyond a rank, gradients of groups without rows
// or beyond a rank, rows of `out` that belong to nobody.
template <class T>
void clear_around(const LowRankPass& p, const std::vector<Share<T>>& shares, const ParallelFor& parallel) {
  const int64_t rank = p.factor.rank, cols = p.factor.cols();
  if (p.projected) std::memset(p.projected, 0, static_cast<size_t>(p.places() * rank) * sizeof(T));
  if (p.factor_grad) {
    std::vector<int64_t> ranks(static_cast<size_t>(p.groups.count));
    for (const Share<T>& share : shares) {
      const T* grad = static_cast<const T*>(share.pass.factor_grad);
      ranks[static_cast<size_t>((grad - gradient_of<T>(p, 0)) / max64(1, rank * cols))] = share.pass.factor.rank;
    }
    parallel(p.groups.count, [&](int64_t g) {
      const int64_t used = ranks[static_cast<size_t>(g)];
      std::memset(gradient_of<T>(p, g) + used * cols, 0, static_cast<size_t>((rank - used) * cols) * sizeof(T));
    });
  }
  if (!p.out || p.accumulate) return;
  const size_t item = p.out->dtype == DType::f64 ? 8 : p.out->dtype == DType::f32 ? 4 : 2;
  const auto clear = [&](int64_t begin, int64_t end) {
    parallel(ceil_div(max64(0, end - begin), kBlockRows), [&](int64_t i) {
      for (int64_t t = begin + i * kBlockRows; t < min64(end, begin + (i + 1) * kBlockRows); ++t) {
        std::memset(static_cast<char*>(p.out->data) + t * p.out->row_stride * item, 0, cols * item);
      }
    });
  };
  if (p.groups.rows) return clear(0, p.out->rows);
  int64_t next = 0;
  for (const Share<T>& share : shares) {
    clear(next, share.t0);
    next = max64(next, share.t1);
  }
  clear(next, p.out->rows);
}

// Whether the pass is one of the forward products, of factors that can be read where they lie: as wide as sums or
// narrower, and in shards of at least a vector.
bool can_be_direct(const LowRankPass& p, const Direct& direct) {
  if (p.factor_grad || p.dropout.active() || (p.projected && p.out) || (p.out && p.in)) return false;
  const DType pool = p.factor.dtype;
  return (pool == DType::f32 || pool == p.activations().dtype) && p.factor.shard_size >= direct.least_shard;
}

void one_by_one(int64_t count, const std::function<void(int64_t)>& task) {
  for (int64_t i = 0; i < count; ++i) task(i);
}

// Shares [share, end) without packing. A sum over columns is that of its tiles, in order, whichever of them a task has,
// so the grid may depend on rows, and bits do not.
template <class T>
void run_direct(const LowRankPass& p, const Share<T>* share, const Share<T>* end, const Direct& direct,
                const ParallelFor& threads) {
  struct Task {
    const LowRankPass* pass;
    int64_t t0, t1;
  };
  const int64_t cols = p.factor.cols(), stride = p.factor.rank, tiles = ceil_div(cols, kDirectCols);
  std::vector<Task> tasks;
  tasks.reserve(static_cast<size_t>(end - share));
  int64_t products = 0;
  for (; share != end; ++share) {
    products += (kReadRows + share->t1 - share->t0) * share->pass.factor.rank * cols;
    for (int64_t t0 = share->t0; t0 < share->t1; t0 += kDirectRows) {
      tasks.push_back({&share->pass, t0, min64(share->t1, t0 + kDirectRows)});
    }
  }
  const int64_t count = static_cast<int64_t>(tasks.size());
  if (!count) return;
  const bool small = products <= kSmallDirectPass;
  int64_t split_tiles = small ? tiles : ceil_div(tiles, min64(tiles, ceil_div(kWantedBlocks, count)));
  const int64_t splits = ceil_div(tiles, split_tiles);
  const int64_t plane = p.projected && splits > 1 ? p.places() * stride : 0;  // of a tile
  AlignedBuffer planes(static_cast<size_t>(tiles * plane) * sizeof(T));
  const auto scaled = [&](const Task& task) {
    const T scale = static_cast<T>(task.pass->scale);
    for (int64_t t = task.t0; t < task.t1; ++t) {
      T* sums = static_cast<T*>(p.projected) + t * stride;
      const T* parts = planes.as<T>() + t * stride;
      for (int64_t j = 0; plane && j < stride; ++j) {
        T sum = T(0);
        for (int64_t tile = 0; tile < tiles; ++tile) sum += parts[tile * plane + j];
        sums[j] = sum;
      }
      for (int64_t j = 0; j < stride; ++j) sums[j] *= scale;
    }
  };
  const ParallelFor serial = one_by_one;
  const ParallelFor& parallel = small ? serial : threads;
  parallel(count * splits, [&](int64_t i) {
    const Task& task = tasks[static_cast<size_t>(i / splits)];
    const int64_t first = i % splits * split_tiles, last = min64(tiles, first + split_tiles);
    if (p.out) {
      direct.expand(*task.pass,
                    {task.t0, task.t1, first * kDirectCols, min64(cols, last * kDirectCols), stride, false});
      return;
    }
    for (int64_t tile = first; tile < last; ++tile) {
      T* sums = (plane ? planes.as<T>() + tile * plane : static_cast<T*>(p.projected)) + task.t0 * stride;
      if (plane || tile == 0) std::memset(sums, 0, static_cast<size_t>((task.t1 - task.t0) * stride) * sizeof(T));
      direct.project(*task.pass,
                     {task.t0, task.t1, tile * kDirectCols, min64(cols, (tile + 1) * kDirectCols), stride, false},
                     sums);
    }
    if (!plane) scaled(task);
  });
  if (plane) parallel(count, [&](int64_t i) { scaled(tasks[static_cast<size_t>(i)]); });
}

template <class T>
void low_rank_pass_as(const LowRankPass& p, const Kernels& kernels, const Direct& direct, const ParallelFor& threads) {
  const int64_t total_rows = p.places(), total_cols = p.factor.cols(), sum_stride = p.factor.rank;
  const int64_t tiles = ceil_div(total_cols, kColTile), cols_padded = round_up(total_cols, kPanelMultiple);
  std::vector<Share<T>> shares = shares_of<T>(p, kernels);
  if (p.groups) clear_around(p, shares, threads);

  if (can_be_direct(p, direct)) {
    const auto packed = std::partition(shares.begin(), shares.end(), [&](const Share<T>& share) {
      return p.groups.invariant || share.t1 - share.t0 <= kernels.few_rows;
    });
    const Share<T>* first = shares.data();
    run_direct(p, first, first + (packed - shares.begin()), direct, threads);
    if (packed == shares.end()) return;
    shares.erase(shares.begin(), packed);
  }

  const int64_t products = !!p.projected + !!p.factor_grad + !!p.out, factors = static_cast<int64_t>(shares.size());
  const ParallelFor serial = one_by_one;
  const ParallelFor& parallel =
      products * p.factor.rank * total_cols * (kPackRows * factors + total_rows) <= kSmallPass ? serial : threads;

  int64_t row_blocks = 0;
  for (const Share<T>& share : shares) row_blocks += share.row_blocks;
  int64_t splits = p.groups.invariant ? kWantedBlocks : ceil_div(kWantedBlocks, max64(1, row_blocks));
  if (p.projected) splits = min64(splits, kMaxSplits);
  splits = max64(1, min64(splits, tiles));
  const int64_t block_cols = ceil_div(tiles, splits) * kColTile;
  splits = total_cols ? ceil_div(total_cols, block_cols) : 0;

  // The packed factors and the gradients' planes of all shares, one after the other.
  const auto by_column = [&](const Share<T>& share) {
    return p.projected ? static_cast<size_t>(cols_padded / kernels.group * share.rank_padded) : 0;
  };
  const auto by_rank = [&](const Share<T>& share) {
    return p.out ? static_cast<size_t>(cols_padded * share.words) : 0;
  };
  size_t packed_words = 0, grad_elements = 0;
  bool sum_grads = false;
  for (Share<T>& share : shares) {
    if (factors == 1 || share.row_blocks > 1) packed_words += by_column(share) + by_rank(share);
    if (!p.factor_grad) continue;
    // The one block of few rows sums in the result itself, where its vectors fit the columns.
    share.own_grads = !p.scatter && (share.row_blocks != 1 || total_cols != cols_padded);
    share.grad_stride = share.own_grads ? cols_padded : total_cols;
    share.grad_size = share.pass.factor.rank * share.grad_stride;
    if (share.own_grads) grad_elements += static_cast<size_t>(share.row_blocks * share.grad_size);
    sum_grads = sum_grads || share.own_grads;  // of no rows at all, too
  }
  AlignedBuffer words(packed_words * kernels.word_bytes), grad_planes(grad_elements * sizeof(T));
  char* next_packed = words.as<char>();
  T* next_grads = grad_planes.as<T>();
  for (Share<T>& share : shares) {
    if (factors == 1 || share.row_blocks > 1) {
      share.packed = next_packed;
      next_packed += (by_column(share) + by_rank(share)) * kernels.word_bytes;
    }
    share.grads = share.own_grads ? next_grads : static_cast<T*>(share.pass.factor_grad);
    if (share.own_grads) next_grads += share.row_blocks * share.grad_size;
  }
  const auto factor_at = [&](const Share<T>& share, char* packed) {
    return PackedFactor{packed, packed + by_column(share) * kernels.word_bytes};
  };
  const auto pack = [&](const Share<T>& share, const PackedFactor& to, int64_t tile) {
    const size_t c0 = static_cast<size_t>(tile * kColTile), bytes = kernels.word_bytes;
    char* columns = static_cast<char*>(to.by_column) + c0 / kernels.group * share.rank_padded * bytes;
    char* ranks = static_cast<char*>(to.by_rank) + c0 * share.words * bytes;
    kernels.pack_factor(share.pass.factor, tile * kColTile, min64(kColTile, total_cols - tile * kColTile),
                        p.projected ? columns : nullptr, p.out ? ranks : nullptr);
  };

  struct Task {
    const Share<T>* share;
    int64_t row_block;
  };
  std::vector<Task> tasks;
  std::vector<const Share<T>*> packed_ahead;  // where one block of rows packs its own columns, one meeting less
  for (const Share<T>& share : shares) {
    if (share.row_blocks > 1) packed_ahead.push_back(&share);
    for (int64_t i = 0; i < share.row_blocks; ++i) tasks.push_back({&share, i});
  }
  if (!packed_ahead.empty()) {
    parallel(static_cast<int64_t>(packed_ahead.size()) * tiles, [&](int64_t i) {
      const Share<T>& share = *packed_ahead[static_cast<size_t>(i / tiles)];
      pack(share, factor_at(share, share.packed), i % tiles);
    });
  }

  // Own sums of each block, added up in a fixed order. Where columns are split, of less than kWantedBlocks * block_rows
  // rows (or for batch invariance), they are planes that are added up below; else a block holds those of a chunk of its
  // rows at a time.
  const int64_t plane_stride = round_up(p.factor.rank, kernels.width), plane_size = total_rows * plane_stride;
  AlignedBuffer planes(p.projected && splits > 1 ? static_cast<size_t>(splits * plane_size) * sizeof(T) : 0);
  const auto chunk_rows = [&](const Share<T>& share) {
    return p.projected ? min64(kChunkRows, share.block_rows) : share.block_rows;
  };
  const auto write_projected = [&](const Share<T>& share, int64_t t0, int64_t t1, const T* sums) {
    T* result = static_cast<T*>(p.projected);
    const T scale = static_cast<T>(share.pass.scale * p.dropout.keep_scale());
    for (int64_t t = t0; t < t1; ++t, sums += share.rank_padded) {
      for (int64_t j = 0; j < share.pass.factor.rank; ++j) {
        T sum = T(0);
        for (int64_t split = 0; split < splits; ++split) sum += sums[split * plane_size + j];
        result[t * sum_stride + j] = scale * sum;
      }
    }
  };
  // f(t0, t1) of each chunk of a row block.
  const auto over_chunks = [&](const Task& task, const auto& f) {
    const Share<T>& share = *task.share;
    const int64_t begin = share.t0 + task.row_block * share.block_rows, end = min64(share.t1, begin + share.block_rows);
    for (int64_t t0 = begin, t1; t0 < end; t0 = t1) {
      t1 = min64(end, t0 + chunk_rows(share));
      f(t0, t1);
    }
  };

  parallel(static_cast<int64_t>(tasks.size()) * splits, [&](int64_t i) {
    const Task& task = tasks[static_cast<size_t>(i / splits)];
    const Share<T>& share = *task.share;
    const int64_t split = i % splits, c_begin = split * block_cols, c_end = min64(total_cols, c_begin + block_cols);
    std::optional<AlignedBuffer> own_words;  // of the columns of the block, where its rows are all that there are
    char* packed = share.packed;
    if (!packed) {
      own_words.emplace((by_column(share) + by_rank(share)) * kernels.word_bytes);
      packed = own_words->as<char>();
    }
    const PackedFactor factor = factor_at(share, packed);
    for (int64_t c0 = c_begin; share.row_blocks == 1 && c0 < c_end; c0 += kColTile) pack(share, factor, c0 / kColTile);
    T* grad = share.grads ? share.grads + task.row_block * share.grad_size : nullptr;
    std::optional<AlignedBuffer> chunk;  // asked for only where needed: 0.1 us, eight times in a pass over one row
    if (p.projected && splits == 1) {
      chunk.emplace(static_cast<size_t>(chunk_rows(share) * share.rank_padded) * sizeof(T));
    }
    bool first = true;
    over_chunks(task, [&](int64_t t0, int64_t t1) {
      T* projected = nullptr;
      if (p.projected) {
        projected = chunk ? chunk->as<T>() : planes.as<T>() + split * plane_size + t0 * plane_stride;
        std::memset(projected, 0, static_cast<size_t>((t1 - t0) * share.rank_padded) * sizeof(T));
      }
      kernels.run_block(share.pass, {t0, t1, c_begin, c_end, sum_stride, !first}, factor, projected, grad,
                        share.grad_stride);
      if (chunk) write_projected(share, t0, t1, projected);
      first = false;
    });
  });

  if (p.projected && splits != 1) {
    parallel(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
      const Task& task = tasks[static_cast<size_t>(i)];
      over_chunks(task, [&](int64_t t0, int64_t t1) {
        write_projected(*task.share, t0, t1, planes.as<T>() + t0 * plane_stride);
      });
    });
  }
  if (p.scatter) {
    const std::vector<int32_t> uses = uses_of_shards(p.factor);
    const int64_t size = p.factor.shard_size;
    for (int64_t m = 0; m < p.factor.num_shards; ++m) {
      if (uses[static_cast<size_t>(m)]) continue;
      std::memset(static_cast<T*>(p.factor_grad) + m * size, 0, static_cast<size_t>(size) * sizeof(T));
    }
  }
  if (sum_grads) {
    parallel(factors * p.factor.rank, [&](int64_t i) {
      const Share<T>& share = shares[static_cast<size_t>(i / p.factor.rank)];
      const int64_t j = i % p.factor.rank;
      if (!share.own_grads || j >= share.pass.factor.rank) return;
      T* row = static_cast<T*>(share.pass.factor_grad) + j * total_cols;
      std::memset(row, 0, static_cast<size_t>(total_cols) * sizeof(T));
      for (int64_t row_block = 0; row_block < share.row_blocks; ++row_block) {
        const T* part = share.grads + row_block * share.grad_size + j * share.grad_stride;
        for (int64_t c = 0; c < total_cols; ++c) row[c] += part[c];
      }
    });
  }
}

}  // namespace

bool scatters(const Factor& factor, int64_t rows) {
  if (rows < 1 || rows > kBlockRowsSummed || factor.shard_size % kPanelMultiple != 0) return false;
  const std::vector<int32_t> uses = uses_of_shards(factor);
  return std::all_of(uses.begin(), uses.end(), [](int32_t n) { return n <= 1; });
}

void low_rank_pass(const LowRankPass& pass, const ParallelFor& parallel) {
  const DType dtype = pass.activations().dtype;
  const Kernels& kernels = chosen().kernels(dtype);
  const Direct& direct = chosen().directly(dtype);
  if (dtype == DType::f64) {
    low_rank_pass_as<double>(pass, kernels, direct, parallel);
  } else {
    low_rank_pass_as<float>(pass, kernels, direct, parallel);
  }
}

const char* instruction_set() { return chosen().name; }

}  // namespace mos::cpu
