// The CPU kernels. Torch-free and Python-free; sizes and dtypes are the caller's to check, index
// tables too (first_bad_index), because an index out of range is read, not trapped.
#pragma once

#include <cstdint>
#include <vector>

#include "../common/parallel.h"
#include "../common/params.h"

namespace mos::cpu {

// Position of the first of `entries` indices outside [0, num_shards), or -1.
int64_t first_bad_index(const int32_t* index, int64_t entries, int64_t num_shards);

// out (rank, cols) = the assembled factor, in the pool's dtype.
void gather_concat(const Factor& factor, const Matrix& out, const ParallelFor& parallel);

// Adjoint of gather_concat for every module of a pool at once: pool_grad[m] = the sum, in the order
// of `modules` and of positions, of all segments whose index is m. Overwrites pool_grad
// (num_shards, shard_size), whose dtype is the accumulation type of the gradients; a shard that
// nobody uses gets zeros.
void scatter_add(const std::vector<FactorGradient>& modules, const Matrix& pool_grad, const ParallelFor& parallel);

// One pass over activations against a factor F (r, C); each product is optional. With D the dropout
// mask times 1/(1-p):
//   projected   (T, r)   = scale * (D * in) F^T      shrink forward; dS of expand
//   factor_grad (r, C)   = scale * s^T (D * in)      dF of both
//   out         (T, C) (+)= scale * D * (s F)        expand forward; dX of shrink
// so shrink, expand and their backwards are this one kernel, and `in` is read once whatever is
// asked of it. T is in->rows (or out->rows), C is factor.cols(). s, projected and factor_grad are
// contiguous and of the accumulation type of in/out (float, or double for double); in and out share
// a dtype.
//
// Where rows are in groups, s and projected have a row per place, factor_grad is (groups, r, C), `factor` is that of
// the first group, and what belongs to no group, or lies beyond a group's rank, becomes zero, or stays as it is in an
// `out` that is accumulated into. groups.rows must be in range and different, ends may be anything.
struct LowRankPass {
  Factor factor;
  Dropout dropout{0, 0};
  double scale = 1.0;
  const Matrix* in = nullptr;   // null: nothing to read (expand)
  const void* s = nullptr;      // null: only `projected` is asked for (shrink)
  void* projected = nullptr;    // null: not wanted
  void* factor_grad = nullptr;  // null: not wanted
  bool scatter = false;         // factor_grad is the pool's, (num_shards, shard_size): see `scatters`
  const Matrix* out = nullptr;  // null: not wanted
  bool accumulate = false;      // out += rather than out =
  Groups groups{};

  // An empty matrix has no address, so presence is a pointer to the view and not the view's data.
  const Matrix& activations() const { return in ? *in : *out; }
  int64_t places() const { return groups ? groups.places : activations().rows; }
};

void low_rank_pass(const LowRankPass& pass, const ParallelFor& parallel);

// Whether a pass over `rows` rows can write the gradient of the factor where scatter_add would add it, with the same
// bits: there is one block of rows, vectors do not straddle shards, and no shard is used twice.
bool scatters(const Factor& factor, int64_t rows);

// The instruction set that low_rank_pass runs with here: "avx512", "avx2" or "baseline".
const char* instruction_set();

}  // namespace mos::cpu
