// CPU kernels of the mos_ext operators. Schemas, fakes and defaults live in mos_ext/ops/schema.py;
// this file only adds implementations to them, through torch's stable ABI.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <atomic>

#include "../common/interface.h"
#include "../common/stable.h"
#include "kernels.h"

namespace mos::cpu {

namespace {

void torch_parallel(int64_t count, const std::function<void(int64_t)>& task) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(i);
  });
}

// The same for tasks of unlike size: each thread takes the next one when it is done.
void torch_parallel_in_turn(int64_t count, const std::function<void(int64_t)>& task) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, count, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) task(i);
  });
}

// A pool and an index as kernels want them, kept alive together with the view of both.
struct FactorArgument {
  Tensor pool, index;
  Factor view;

  FactorArgument(const Tensor& pool_in, const Tensor& index_in)
      : pool(as_contiguous(pool_in)), index(as_contiguous(index_in)), view(factor_of(pool, index)) {
    check(0, index.numel());
  }
  // Of groups, only those that have rows: a table of 2000 adapters takes longer to look through than a few rows do.
  FactorArgument(const Tensor& pool_in, const Tensor& index_in, const Groups& groups)
      : pool(as_contiguous(pool_in)), index(as_contiguous(index_in)), view(factor_of(pool, index, true)) {
    STD_TORCH_CHECK(index.size(0) == groups.count, "index_a and index_b must have the same groups and rank");
    const int64_t entries = view.rank * view.shards_per_vector;
    for (int64_t g = 0; g < groups.count; ++g) {
      if (groups.begin(g) < groups.end(g)) check(g * entries, entries);
    }
  }

 private:
  void check(int64_t first, int64_t entries) const {
    const int64_t bad = first_bad_index(view.index + first, entries, view.num_shards);
    STD_TORCH_CHECK(bad < 0, "index must be in [0, ", view.num_shards, "), got ", view.index[first + bad], " at entry ",
                    first + bad);
  }
};

Dropout dropout_of(double p, const std::optional<Tensor>& seed) {
  const uint32_t threshold = threshold_of(p, seed);
  if (threshold == 0) return {0, 0};
  return {static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr())), threshold};
}

void check_cols(const Tensor& x, const Factor& factor) {
  STD_TORCH_CHECK(x.size(1) == factor.cols(), "the factor has ", factor.cols(), " columns, x has ", x.size(1));
}

Tensor gather_concat_op(const Tensor& pool, const Tensor& index) {
  const FactorArgument factor(pool, index);
  Tensor out = new_matrix(pool, factor.view.rank, factor.view.cols(), pool.scalar_type());
  gather_concat(factor.view, output_matrix_of(out), torch_parallel);
  return out;
}

Tensor scatter_add_op(std::vector<Tensor> grads, std::vector<Tensor> indices, int64_t num_shards,
                      const std::optional<Tensor>& starts = std::nullopt,
                      const std::optional<Tensor>& places = std::nullopt) {
  STD_TORCH_CHECK(!grads.empty() && grads.size() == indices.size(), "need one index for each of one or more grads");
  const int64_t shard_size = indices[0].size(1) ? grads[0].size(1) / indices[0].size(1) : 0;
  std::vector<FactorGradient> modules;
  for (size_t k = 0; k < grads.size(); ++k) {
    grads[k] = rows_contiguous(grads[k]);
    indices[k] = as_contiguous(indices[k]);
    modules.push_back(factor_gradient_of(grads[k], indices[k], shard_size, grads[0].scalar_type()));
    const FactorGradient& table = modules.back();
    STD_TORCH_CHECK(first_bad_index(table.index, table.entries(), num_shards) < 0, "index must be in [0, ", num_shards,
                    ")");
  }
  // The kernel makes an inverse of its own in less time than checking this one takes (0.5 and 1.2 ms for 393,216
  // entries), and of fewer entries where modules have no gradient.
  InverseArgument(starts, places, num_shards);
  Tensor out = new_matrix(grads[0], num_shards, shard_size, accumulate_type(grads[0]));
  scatter_add(modules, output_matrix_of(out), torch_parallel_in_turn);
  return out;
}

// The last argument of every product, tf32, is for CUDA: CPUs compute float32 exactly.

Tensor shrink_op(const Tensor& x, const Tensor& pool, const Tensor& index, double dropout,
                 const std::optional<Tensor>& seed, bool) {
  const FactorArgument factor(pool, index);
  const Tensor x_c = rows_contiguous(x);
  LowRankPass pass{factor.view, dropout_of(dropout, seed)};
  check_cols(x, pass.factor);
  Tensor s = new_matrix(x, x.size(0), pass.factor.rank, accumulate_type(x));
  const Matrix in = matrix_of(x_c);
  pass.in = &in;
  pass.projected = s.mutable_data_ptr();
  low_rank_pass(pass, torch_parallel);
  return s;
}

void expand_into(const Tensor& y, const Tensor& s, const Tensor& pool, const Tensor& index, double scale,
                 bool accumulate) {
  const FactorArgument factor(pool, index);
  LowRankPass pass{factor.view, {}, scale};
  check_cols(y, pass.factor);
  const Tensor s_c = sums_contiguous(s, y, pass.factor.rank);
  pass.s = s_c.const_data_ptr();
  const Matrix out = output_matrix_of(y);
  pass.out = &out;
  pass.accumulate = accumulate;
  low_rank_pass(pass, torch_parallel);
}

Tensor expand_op(const Tensor& s, const Tensor& pool, const Tensor& index, double scale, ScalarType dtype, bool) {
  Tensor y = new_matrix(s, s.size(0), index.size(1) * pool.size(1), dtype);
  expand_into(y, s, pool, index, scale, /*accumulate=*/false);
  return y;
}

// The gradient of a pass' factor (rank, columns), or of the pool that it was gathered from, (num_shards, shard_size):
// where the pass cannot write that itself, by `scatter_add`.
class GradientOf {
 public:
  GradientOf(LowRankPass& pass, const Tensor& like, const Tensor& index, bool pool)
      : index_(index), num_shards_(pass.factor.num_shards), pool_(pool) {
    pass.scatter = pool && scatters(pass.factor, pass.activations().rows);
    written_ = pass.scatter ? new_matrix(like, num_shards_, pass.factor.shard_size, like.scalar_type())
                            : new_matrix(like, pass.factor.rank, pass.factor.cols(), like.scalar_type());
    pass.factor_grad = written_.mutable_data_ptr();
    scattered_ = pass.scatter;
  }
  Tensor result() const { return pool_ && !scattered_ ? scatter_add_op({written_}, {index_}, num_shards_) : written_; }

 private:
  const Tensor& index_;
  int64_t num_shards_;
  bool pool_, scattered_;
  Tensor written_;
};

std::tuple<Tensor, Tensor> expand_backward_into(const Tensor& dy, const Tensor& s, const Tensor& pool,
                                                const Tensor& index, double scale, bool of_pool) {
  const FactorArgument factor(pool, index);
  const Tensor dy_c = rows_contiguous(dy);
  LowRankPass pass{factor.view, {}, scale};
  check_cols(dy, pass.factor);
  const Tensor s_c = sums_contiguous(s, dy, pass.factor.rank);
  Tensor ds = new_matrix(s, s.size(0), s.size(1), s.scalar_type());
  const Matrix in = matrix_of(dy_c);
  pass.in = &in;
  pass.s = s_c.const_data_ptr();
  pass.projected = ds.mutable_data_ptr();
  const GradientOf grad(pass, s, index, of_pool);
  low_rank_pass(pass, torch_parallel);
  return {ds, grad.result()};
}

std::tuple<Tensor, Tensor> expand_backward_op(const Tensor& dy, const Tensor& s, const Tensor& pool,
                                              const Tensor& index, double scale, bool) {
  return expand_backward_into(dy, s, pool, index, scale, /*of_pool=*/false);
}

// The gradient of the factor, or of the pool; dx (contiguous rows) is written or accumulated into.
Tensor shrink_backward_into(const Tensor& dx, const Tensor& ds, const Tensor& x, const Tensor& pool,
                            const Tensor& index, double dropout, const std::optional<Tensor>& seed, bool accumulate,
                            bool of_pool = false) {
  const FactorArgument factor(pool, index);
  const Tensor x_c = rows_contiguous(x);
  LowRankPass pass{factor.view, dropout_of(dropout, seed)};
  check_cols(x, pass.factor);
  STD_TORCH_CHECK(dx.size(0) == x.size(0) && dx.size(1) == x.size(1) && dx.scalar_type() == x.scalar_type(),
                  "dx must have the shape and dtype of x");
  const Tensor ds_c = sums_contiguous(ds, x, pass.factor.rank);
  const Matrix in = matrix_of(x_c);
  pass.in = &in;
  pass.s = ds_c.const_data_ptr();
  const GradientOf grad(pass, ds, index, of_pool);
  const Matrix out = output_matrix_of(dx);
  pass.out = &out;
  pass.accumulate = accumulate;
  low_rank_pass(pass, torch_parallel);
  return grad.result();
}

std::tuple<Tensor, Tensor> shrink_backward_op(const Tensor& ds, const Tensor& x, const Tensor& pool,
                                              const Tensor& index, double dropout, const std::optional<Tensor>& seed,
                                              bool) {
  Tensor dx = new_matrix(x, x.size(0), x.size(1), x.scalar_type());
  Tensor grad = shrink_backward_into(dx, ds, x, pool, index, dropout, seed, /*accumulate=*/false);
  return {dx, grad};
}

// Both factors at once: the same passes, one after the other.

Tensor low_rank_into(const Tensor& y, bool accumulate, const Tensor& x, const Tensor& pool_a, const Tensor& index_a,
                     const Tensor& pool_b, const Tensor& index_b, double scale, double dropout,
                     const std::optional<Tensor>& seed) {
  STD_TORCH_CHECK(y.size(0) == x.size(0) && y.scalar_type() == x.scalar_type(), "y must have x's rows and dtype");
  Tensor s = shrink_op(x, pool_a, index_a, dropout, seed, false);
  expand_into(y, s, pool_b, index_b, scale, accumulate);
  return s;
}

std::tuple<Tensor, Tensor> low_rank_op(const Tensor& x, const Tensor& pool_a, const Tensor& index_a,
                                       const Tensor& pool_b, const Tensor& index_b, const std::optional<Tensor>& bias,
                                       double scale, double dropout, const std::optional<Tensor>& seed, bool) {
  Tensor y = new_matrix(x, x.size(0), index_b.size(1) * pool_b.size(1), x.scalar_type());
  if (bias.has_value()) torch::stable::copy_(y, *bias);  // every row
  Tensor s = low_rank_into(y, bias.has_value(), x, pool_a, index_a, pool_b, index_b, scale, dropout, seed);
  return {y, s};
}

Tensor low_rank_inplace_op(Tensor y, const Tensor& x, const Tensor& pool_a, const Tensor& index_a, const Tensor& pool_b,
                           const Tensor& index_b, double scale, double dropout, const std::optional<Tensor>& seed,
                           bool) {
  const Tensor y_c = rows_contiguous(y);
  Tensor s = low_rank_into(y_c, /*accumulate=*/true, x, pool_a, index_a, pool_b, index_b, scale, dropout, seed);
  if (y_c.get() != y.get()) torch::stable::copy_(y, y_c);
  return s;
}

std::tuple<Tensor, Tensor, Tensor> low_rank_backward_op(const Tensor& dy, const Tensor& s, const Tensor& x,
                                                        const Tensor& pool_a, const Tensor& index_a,
                                                        const Tensor& pool_b, const Tensor& index_b, double scale,
                                                        double dropout, const std::optional<Tensor>& seed, bool) {
  auto [ds, grad_b] = expand_backward_op(dy, s, pool_b, index_b, scale, false);
  auto [dx, grad_a] = shrink_backward_op(ds, x, pool_a, index_a, dropout, seed, false);
  return {dx, grad_a, grad_b};
}

std::tuple<Tensor, Tensor> low_rank_backward_inplace_op(Tensor dx, const Tensor& dy, const Tensor& s, const Tensor& x,
                                                        const Tensor& pool_a, const Tensor& index_a,
                                                        const Tensor& pool_b, const Tensor& index_b, double scale,
                                                        double dropout, const std::optional<Tensor>& seed, bool) {
  const Tensor dx_c = rows_contiguous(dx);
  auto [ds, grad_b] = expand_backward_op(dy, s, pool_b, index_b, scale, false);
  Tensor grad_a = shrink_backward_into(dx_c, ds, x, pool_a, index_a, dropout, seed, /*accumulate=*/true);
  if (dx_c.get() != dx.get()) torch::stable::copy_(dx, dx_c);
  return {grad_a, grad_b};
}

// The whole layer: the base's product by ATen, as linear and matmul would compute it, then the branch onto it.

std::tuple<Tensor, Tensor> linear_op(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                     const Tensor& pool_a, const Tensor& index_a, const Tensor& pool_b,
                                     const Tensor& index_b, double scale, double dropout,
                                     const std::optional<Tensor>& seed, bool) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2, "x and weight must be matrices");
  check_weight(weight, x, weight.size(0), x.size(1));
  Tensor y = new_matrix(x, x.size(0), weight.size(0), x.scalar_type());
  const Tensor right = transposed(weight);
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == y.size(1) && bias->scalar_type() == x.scalar_type(),
                    "bias must be (columns of y,) of y's dtype");
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(y.get(), bias->get(), x.get(), right.get(), 1.0, 1.0));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(y.get(), x.get(), right.get()));
  }
  Tensor s = low_rank_into(y, /*accumulate=*/true, x, pool_a, index_a, pool_b, index_b, scale, dropout, seed);
  return {y, s};
}

std::tuple<Tensor, Tensor, Tensor> linear_backward_op(const Tensor& dy, const Tensor& s, const Tensor& x,
                                                      const Tensor& weight, const Tensor& pool_a, const Tensor& index_a,
                                                      const Tensor& pool_b, const Tensor& index_b, double scale,
                                                      double dropout, const std::optional<Tensor>& seed, bool of_pools,
                                                      bool) {
  STD_TORCH_CHECK(dy.dim() == 2 && x.dim() == 2, "dy and x must be matrices");
  STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type(), "dy must have the dtype of x");
  check_weight(weight, x, dy.size(1), x.size(1));
  Tensor dx = new_matrix(x, x.size(0), x.size(1), x.scalar_type());
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(dx.get(), dy.get(), weight.get()));
  auto [ds, grad_b] = expand_backward_into(dy, s, pool_b, index_b, scale, of_pools);
  Tensor grad_a = shrink_backward_into(dx, ds, x, pool_a, index_a, dropout, seed, /*accumulate=*/true, of_pools);
  return {dx, grad_a, grad_b};
}

// In groups of rows: the same passes, with many factors.

// What every grouped operator is given, and the passes made of it.
struct Grouped {
  GroupsArgument groups;
  FactorArgument a, b;
  Dropout dropout;
  double scale;

  Grouped(const Tensor& x, const Tensor& pool_a, const Tensor& index_a, const Tensor& pool_b, const Tensor& index_b,
          double scale, double p, const std::optional<Tensor>& seed, const Tensor& ends,
          const std::optional<Tensor>& rows, const std::optional<Tensor>& ranks, const std::optional<Tensor>& scales,
          bool invariant)
      : groups(x.size(0), index_a.size(0), ends, rows, ranks, scales, invariant),
        a(pool_a, index_a, groups.view),
        b(pool_b, index_b, groups.view),
        dropout(dropout_of(p, seed)),
        scale(scale) {
    STD_TORCH_CHECK(x.dim() == 2, "x must be a matrix");
    STD_TORCH_CHECK(a.view.rank == b.view.rank, "index_a and index_b must have the same groups and rank");
    check_cols(x, a.view);
    const int64_t bad = groups.view.rows ? first_bad_index(groups.view.rows, groups.view.places, x.size(0)) : -1;
    STD_TORCH_CHECK(bad < 0, "rows must be in [0, ", x.size(0), "), got ", groups.view.rows[bad], " at place ", bad);
  }

  // S, or dS: one row per place.
  Tensor new_sums(const Tensor& x) const { return new_matrix(x, groups.view.places, a.view.rank, accumulate_type(x)); }

  // The gradients of the factors of one side, (groups, rank, columns).
  static Tensor new_gradients(const Tensor& like, const FactorArgument& factor) {
    return new_matrices(like, factor.index.size(0), factor.view.rank, factor.view.cols(), like.scalar_type());
  }

  LowRankPass pass(const FactorArgument& factor) const {
    LowRankPass pass{factor.view};
    pass.groups = groups.view;
    return pass;
  }
};

template <class... Operands>
Tensor grouped_low_rank_into(const Tensor& y, bool accumulate, const Tensor& x, const Operands&... operands) {
  const Grouped g(x, operands...);
  check_cols(y, g.b.view);
  STD_TORCH_CHECK(y.size(0) == x.size(0) && y.scalar_type() == x.scalar_type(), "y must have x's rows and dtype");
  const Tensor x_c = rows_contiguous(x);
  Tensor s = g.new_sums(x);
  const Matrix in = matrix_of(x_c), out = output_matrix_of(y);
  LowRankPass shrink = g.pass(g.a), expand = g.pass(g.b);
  shrink.dropout = g.dropout;
  shrink.in = &in;
  shrink.groups.scales = nullptr;  // S has no scale
  shrink.projected = s.mutable_data_ptr();
  low_rank_pass(shrink, torch_parallel_in_turn);
  expand.scale = g.scale;
  expand.s = s.const_data_ptr();
  expand.out = &out;
  expand.accumulate = accumulate;
  low_rank_pass(expand, torch_parallel_in_turn);
  return s;
}

template <class... Operands>
std::tuple<Tensor, Tensor> grouped_low_rank_backward_into(const Tensor& dx, bool accumulate, const Tensor& dy,
                                                          const Tensor& s, const Tensor& x,
                                                          const Operands&... operands) {
  const Grouped g(x, operands...);
  check_cols(dy, g.b.view);
  STD_TORCH_CHECK(dy.size(0) == x.size(0) && dy.scalar_type() == x.scalar_type(), "dy must have x's rows and dtype");
  STD_TORCH_CHECK(dx.size(0) == x.size(0) && dx.size(1) == x.size(1) && dx.scalar_type() == x.scalar_type(),
                  "dx must have the shape and dtype of x");
  STD_TORCH_CHECK(s.dim() == 2 && s.size(0) == g.groups.view.places && s.size(1) == g.a.view.rank &&
                      s.scalar_type() == accumulate_type(x),
                  "s must be (places, rank) in the accumulation type of x");
  const Tensor x_c = rows_contiguous(x), dy_c = rows_contiguous(dy), s_c = as_contiguous(s);
  Tensor ds = g.new_sums(x), grad_a = Grouped::new_gradients(s, g.a), grad_b = Grouped::new_gradients(s, g.b);
  const Matrix in_x = matrix_of(x_c), in_dy = matrix_of(dy_c), out = output_matrix_of(dx);
  LowRankPass expand = g.pass(g.b), shrink = g.pass(g.a);
  expand.scale = g.scale;
  expand.in = &in_dy;
  expand.s = s_c.const_data_ptr();
  expand.projected = ds.mutable_data_ptr();
  expand.factor_grad = grad_b.mutable_data_ptr();
  low_rank_pass(expand, torch_parallel_in_turn);
  shrink.dropout = g.dropout;
  shrink.groups.scales = nullptr;  // dS has it already
  shrink.in = &in_x;
  shrink.s = ds.const_data_ptr();
  shrink.factor_grad = grad_a.mutable_data_ptr();
  shrink.out = &out;
  shrink.accumulate = accumulate;
  low_rank_pass(shrink, torch_parallel_in_turn);
  return {grad_a, grad_b};
}

std::tuple<Tensor, Tensor> grouped_low_rank_op(const Tensor& x, const Tensor& pool_a, const Tensor& index_a,
                                               const Tensor& pool_b, const Tensor& index_b, double scale, double p,
                                               const std::optional<Tensor>& seed, const Tensor& ends,
                                               const std::optional<Tensor>& rows, const std::optional<Tensor>& ranks,
                                               const std::optional<Tensor>& scales, bool invariant, bool) {
  Tensor y = new_matrix(x, x.size(0), index_b.size(2) * pool_b.size(1), x.scalar_type());
  Tensor s = grouped_low_rank_into(y, /*accumulate=*/false, x, pool_a, index_a, pool_b, index_b, scale, p, seed, ends,
                                   rows, ranks, scales, invariant);
  return {y, s};
}

Tensor grouped_low_rank_inplace_op(Tensor y, const Tensor& x, const Tensor& pool_a, const Tensor& index_a,
                                   const Tensor& pool_b, const Tensor& index_b, double scale, double p,
                                   const std::optional<Tensor>& seed, const Tensor& ends,
                                   const std::optional<Tensor>& rows, const std::optional<Tensor>& ranks,
                                   const std::optional<Tensor>& scales, bool invariant, bool) {
  const Tensor y_c = rows_contiguous(y);
  Tensor s = grouped_low_rank_into(y_c, /*accumulate=*/true, x, pool_a, index_a, pool_b, index_b, scale, p, seed, ends,
                                   rows, ranks, scales, invariant);
  if (y_c.get() != y.get()) torch::stable::copy_(y, y_c);
  return s;
}

std::tuple<Tensor, Tensor, Tensor> grouped_low_rank_backward_op(
    const Tensor& dy, const Tensor& s, const Tensor& x, const Tensor& pool_a, const Tensor& index_a,
    const Tensor& pool_b, const Tensor& index_b, double scale, double p, const std::optional<Tensor>& seed,
    const Tensor& ends, const std::optional<Tensor>& rows, const std::optional<Tensor>& ranks,
    const std::optional<Tensor>& scales, bool invariant, bool) {
  Tensor dx = new_matrix(x, x.size(0), x.size(1), x.scalar_type());
  auto [grad_a, grad_b] = grouped_low_rank_backward_into(dx, /*accumulate=*/false, dy, s, x, pool_a, index_a, pool_b,
                                                         index_b, scale, p, seed, ends, rows, ranks, scales, invariant);
  return {dx, grad_a, grad_b};
}

std::tuple<Tensor, Tensor> grouped_low_rank_backward_inplace_op(
    Tensor dx, const Tensor& dy, const Tensor& s, const Tensor& x, const Tensor& pool_a, const Tensor& index_a,
    const Tensor& pool_b, const Tensor& index_b, double scale, double p, const std::optional<Tensor>& seed,
    const Tensor& ends, const std::optional<Tensor>& rows, const std::optional<Tensor>& ranks,
    const std::optional<Tensor>& scales, bool invariant, bool) {
  const Tensor dx_c = rows_contiguous(dx);
  auto grads = grouped_low_rank_backward_into(dx_c, /*accumulate=*/true, dy, s, x, pool_a, index_a, pool_b, index_b,
                                              scale, p, seed, ends, rows, ranks, scales, invariant);
  if (dx_c.get() != dx.get()) torch::stable::copy_(dx, dx_c);
  return grads;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mos_ext, CPU, m) { MOS_EXT_IMPLEMENT_OPERATORS(m); }

}  // namespace mos::cpu

extern "C" __attribute__((visibility("default"), used)) const char mos_ext_cpu_interface[] = MOS_EXT_INTERFACE;

// Read by `python -m mos_ext` through ctypes: which instruction set the kernels chose on this
// machine.
extern "C" __attribute__((visibility("default"))) const char* mos_ext_cpu_instruction_set() {
  return mos::cpu::instruction_set();
}
