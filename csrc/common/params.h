// Plain-old-data views that every kernel takes, on the CPU and on CUDA alike.
//
// The only vocabulary shared by kernels and bindings: raw pointers, sizes, and strides *in
// elements*. No torch, no Python, no ownership. The last dimension is always contiguous.
#pragma once

#include <cstdint>

namespace mos {

enum class DType : int32_t { f32, f64, bf16, f16 };

// A (rows, cols) matrix.
struct Matrix {
  void* data;
  DType dtype;
  int64_t rows, cols;
  int64_t row_stride;
};

// A low-rank factor M (rank, shards_per_vector * shard_size) that is never stored: row j is the
// concatenation of the pool rows index[j, 0 .. shards_per_vector). A of the paper is such an M; B
// is one transposed.
struct Factor {
  const void* pool;  // (num_shards, shard_size)
  DType dtype;
  int64_t num_shards, shard_size;
  int64_t pool_stride;   // elements between two shards
  const int32_t* index;  // (rank, shards_per_vector), contiguous
  int64_t rank, shards_per_vector;

  int64_t cols() const { return shards_per_vector * shard_size; }
};

// Rows that are sorted by group, each group with a factor of its own: group g has the places from ends[g - 1] (0 for
// the first) to ends[g], cut off at 0 and at the number of places. Place t is row rows[t] of the activations, or row t.
// The tables of all groups are (count, rank, shards_per_vector), one after the other: a Factor's `index` is the
// first's.
struct Groups {
  const int32_t* ends = nullptr;   // (count,); null where all rows share one factor
  const int32_t* rows = nullptr;   // (places,) or null
  const int32_t* ranks = nullptr;  // (count,), rows of its table that a group uses, or null: all
  const float* scales = nullptr;   // (count,), what the scale is multiplied by, or null
  int64_t count = 0;
  int64_t places = 0;      // rows of S
  bool invariant = false;  // sums of a row are cut by columns and rank alone

  // The places of group g, none where it ends before it begins; where ends are read on the host.
  int64_t begin(int64_t g) const { return g && ends[g - 1] > 0 ? ends[g - 1] : 0; }
  int64_t end(int64_t g) const { return ends[g] < places ? ends[g] : places; }

  explicit operator bool() const { return ends != nullptr; }
};

// One module's share of a pool gradient: the gradient (rank, cols) of its factor, or one without rows if it got none,
// and the table it was gathered with.
struct FactorGradient {
  Matrix grad;
  const int32_t* index;
  int64_t shards_per_vector;

  int64_t entries() const { return grad.rows * shards_per_vector; }
};

// An entry of a table that names a shard.
struct Place {
  int32_t module, position;
};

// The inverse of the tables of all modules: shard m is used at places[starts[m]] to places[starts[m + 1]], in the order
// of modules and positions.
struct Inverse {
  const int32_t* starts = nullptr;  // (num_shards + 1,); null where nobody has made one
  const Place* places = nullptr;    // (count,)
  int64_t count = 0;

  explicit operator bool() const { return starts != nullptr; }
};

// Dropout regenerated from a counter (philox.h), never stored. threshold == 0 keeps everything.
struct Dropout {
  uint64_t seed;
  uint32_t threshold;  // an element is dropped when its 16 random bits are below this; probability
                       // threshold / 65536

  bool active() const { return threshold != 0; }
  // 1 / (1 - p); with p = 1 nothing is kept, so any finite value does.
  double keep_scale() const { return threshold < 65536u ? 65536.0 / (65536.0 - threshold) : 0.0; }
};

// threshold for a probability p in [0, 1], rounded to the nearest 1/65536.
inline uint32_t dropout_threshold(double p) { return static_cast<uint32_t>(p * 65536.0 + 0.5); }

}  // namespace mos
