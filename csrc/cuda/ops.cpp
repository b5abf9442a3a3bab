// CUDA kernels of the mos_ext operators, through torch's stable ABI; compiled by the host compiler alone. Tensors to
// views, scratch from torch's allocator, launches on torch's current stream: nothing here synchronises.
#include "../common/interface.h"
#include "../common/stable.h"
#include "heuristics.h"
#include "launch.h"
#include "torch_device.h"

namespace mos::cuda {

namespace {

void check_launch(cudaError_t error) {
  const LaunchRecord& l = last_launch();
  STD_TORCH_CHECK(error == cudaSuccess, "mos_ext: the kernel ", l.kernel, " (", l.arithmetic, "), grid ", l.grid[0],
                  " x ", l.grid[1], " x ", l.grid[2], ", ", l.threads, " threads, ", l.shared_bytes,
                  " bytes of shared memory, did not start: ", cudaGetErrorString(error),
                  error == cudaErrorNoKernelImageForDevice
                      ? "; GPUs below compute capability 8.0 run plain PyTorch with MOS_EXT_DISABLE_NATIVE=1"
                      : "");
}

void check_device(const Tensor& t, int32_t device, const char* name) {
  STD_TORCH_CHECK(on_device(t) && t.get_device() == device, name, " must be on CUDA device ", device);
}

// What every operator begins with: the device of its first tensor made current, and torch's stream there.
struct Launcher {
  int32_t device;
  DeviceGuard guard;
  cudaStream_t stream;

  explicit Launcher(const Tensor& t) : device(device_of(t)), guard(device), stream(current_stream(device)) {}

  static int32_t device_of(const Tensor& t) {
    STD_TORCH_CHECK(on_device(t), "mos_ext: all tensors must be on one CUDA device");
    return t.get_device();
  }
};

// A pool and an index as kernels want them, kept alive together with the view of both.
struct FactorArgument {
  Tensor pool, index;
  Factor view;

  FactorArgument(const Tensor& pool_in, const Tensor& index_in, int32_t device, bool grouped = false)
      : pool(as_contiguous(pool_in)), index(as_contiguous(index_in)), view(factor_of(pool, index, grouped)) {
    check_device(pool, device, "pool");
    check_device(index, device, "index");
  }

  void check(const Tensor& x) const {
    STD_TORCH_CHECK(x.size(1) == view.cols(), "the factor has ", view.cols(), " columns, the activations ", x.size(1));
    STD_TORCH_CHECK(view.dtype == dtype_of(x) || view.dtype == DType::f32,
                    "pool must be float32 or of the activations' dtype");
  }
};

DeviceDropout dropout_of(double p, const std::optional<Tensor>& seed, int32_t device) {
  const uint32_t threshold = threshold_of(p, seed);
  if (threshold == 0) return {nullptr, 0};
  check_device(*seed, device, "seed");
  return {static_cast<const int64_t*>(seed->const_data_ptr()), threshold};
}

Float32 float32_of(bool tf32) { return tf32 ? Float32::tf32 : Float32::exact; }

Tensor sums_on(const Launcher& to, const Tensor& s, const Tensor& x, int64_t rank, const Groups& groups = {}) {
  check_device(s, to.device, "s");
  if (!groups) return sums_contiguous(s, x, rank);
  STD_TORCH_CHECK(
      s.dim() == 2 && s.size(0) == groups.places && s.size(1) == rank && s.scalar_type() == accumulate_type(x),
      "s must be (places, rank) in the accumulation type of x");
  return as_contiguous(s);
}

// Groups as kernels want them, and what they are told of.
GroupsArgument groups_on(const Launcher& to, const Tensor& x, const Tensor& index_a, const Tensor& index_b,
                         const Tensor& ends, const std::optional<Tensor>& rows, const std::optional<Tensor>& ranks,
                         const std::optional<Tensor>& scales, bool invariant) {
  STD_TORCH_CHECK(index_a.dim() == 3 && index_b.dim() == 3 && index_a.size(0) == index_b.size(0),
                  "index_a and index_b must have a table for each group");
  check_device(ends, to.device, "ends");
  if (rows) check_device(*rows, to.device, "rows");
  if (ranks) check_device(*ranks, to.device, "ranks");
  if (scales) check_device(*scales, to.device, "scales");
  GroupsArgument groups(x.size(0), index_a.size(0), ends, rows, ranks, scales, invariant);
  STD_TORCH_CHECK(groups.view.count <= kMaxGroups && groups.view.places <= kMaxPlaces, "there must be at most ",
                  kMaxGroups, " groups of at most ", kMaxPlaces, " rows, got ", groups.view.count, " of ",
                  groups.view.places);
  return groups;
}

// `count` planes of the accumulation type of `like`. A single one is a matrix (rows, cols), ready to be returned.
struct PlanesTensor {
  Tensor tensor;
  Planes view;

  PlanesTensor(const Tensor& like, int64_t count, int64_t rows, int64_t cols)
      : tensor(new_matrix(like, count * rows, cols, accumulate_type(like))),
        view{tensor.mutable_data_ptr(), count, rows, cols} {}

  // Where the sum goes: a matrix of its own, unless there is nothing to add.
  Tensor result() const {
    return view.count == 1 ? tensor : new_matrix(tensor, view.rows, view.cols, tensor.scalar_type());
  }

  ConstPlanes read() const { return {view.data, view.count, view.rows, view.cols}; }
};
ConstPlanes one_plane(const Tensor& s) { return {s.const_data_ptr(), 1, s.size(0), s.size(1)}; }

// A launch that adds planes, which may begin with the place of their sum. Every sum follows the launch that wrote them.
void sum_into(void* out, const ConstPlanes& planes, DType dtype, const Launcher& to) {
  const Sum sum{planes, out};
  check_launch(launch_sum(&sum, 1, dtype, /*early=*/true, to.stream));
}

// Planes that leave the kernels: their sum, (rows, cols).
Tensor summed(const PlanesTensor& planes, const Launcher& to) {
  Tensor out = planes.result();
  if (planes.view.count > 1) sum_into(out.mutable_data_ptr(), planes.read(), dtype_of(out), to);
  return out;
}

// ---------------------------------------------------------------------------------------------- the four passes

PlanesTensor shrink_into_planes(const Tensor& x, const Factor& factor, const DeviceDropout& dropout, Float32 float32,
                                const Launcher& to, const Groups& groups = {}) {
  const Matrix view = matrix_of(x);
  PlanesTensor s(x, shrink_planes(view, factor, groups), groups ? groups.places : view.rows, factor.rank);
  check_launch(launch_shrink(view, factor, dropout, s.view, float32, to.stream, groups));
  return s;
}

// The gradient of a factor, (rank, columns), as planes; or of the factors of all groups, one below the other, and what
// is yet to be added to them (launch.h).
struct FactorGradientTensor {
  PlanesTensor planes;
  std::optional<Tensor> of_groups;
  int64_t part;

  FactorGradientTensor(const Tensor& like, const BackwardPlanes& counts, int64_t rank, int64_t cols,
                       const Groups& groups)
      : planes(like, counts.factor_grad, rank, cols), part(counts.part) {
    if (groups) of_groups = new_matrix(like, groups.count * rank, cols, accumulate_type(like));
  }

  void* grads() const { return of_groups ? of_groups->mutable_data_ptr() : nullptr; }
  Tensor result() const { return of_groups ? *of_groups : planes.result(); }
  bool to_add() const { return planes.view.count > (of_groups ? 0 : 1); }
  Sum sum(const Tensor& result) const { return {planes.read(), result.mutable_data_ptr(), part}; }
};

struct ExpandBackwardResult {
  PlanesTensor ds;
  FactorGradientTensor factor_grad;
};
ExpandBackwardResult expand_backward_into_planes(const Tensor& dy, const Tensor& s, const Factor& factor, double scale,
                                                 Float32 float32, const Launcher& to, const Groups& groups = {}) {
  const Matrix view = matrix_of(dy);
  const BackwardPlanes counts = backward_planes(view, factor.rank, groups);
  ExpandBackwardResult out{{dy, counts.projected, s.size(0), factor.rank},
                           {dy, counts, factor.rank, view.cols, groups}};
  check_launch(launch_expand_backward(view, one_plane(s), factor, scale, out.ds.view, out.factor_grad.planes.view,
                                      float32, to.stream, groups, out.factor_grad.grads()));
  return out;
}

FactorGradientTensor shrink_backward_into_planes(const Tensor& x, const ConstPlanes& ds, const Factor& factor,
                                                 const DeviceDropout& dropout, const Tensor& dx, bool accumulate,
                                                 bool early, Float32 float32, const Launcher& to,
                                                 const Groups& groups = {}) {
  const Matrix view = matrix_of(x);
  FactorGradientTensor grad(x, backward_planes(view, factor.rank, groups), factor.rank, view.cols, groups);
  check_launch(launch_shrink_backward(view, ds, factor, dropout, output_matrix_of(dx), accumulate, grad.planes.view,
                                      early, float32, to.stream, groups, grad.grads()));
  return grad;
}

// ---------------------------------------------------------------------------------------------- operators

Tensor gather_concat_op(const Tensor& pool, const Tensor& index) {
  const Launcher to(pool);
  const FactorArgument factor(pool, index, to.device);
  Tensor out = new_matrix(pool, factor.view.rank, factor.view.cols(), pool.scalar_type());
  check_launch(launch_gather_concat(factor.view, output_matrix_of(out), to.stream));
  return out;
}

Tensor scatter_add_op(std::vector<Tensor> grads, std::vector<Tensor> indices, int64_t num_shards,
                      const std::optional<Tensor>& starts = std::nullopt,
                      const std::optional<Tensor>& places = std::nullopt) {
  STD_TORCH_CHECK(!grads.empty() && grads.size() == indices.size(), "need one index for each of one or more grads");
  const int64_t shard_size = indices[0].size(1) ? grads[0].size(1) / indices[0].size(1) : 0;
  const Launcher to(grads[0]);
  std::vector<FactorGradient> modules;
  for (size_t k = 0; k < grads.size(); ++k) {
    grads[k] = rows_contiguous(grads[k]);
    indices[k] = as_contiguous(indices[k]);
    check_device(grads[k], to.device, "grads");
    check_device(indices[k], to.device, "indices");
    modules.push_back(factor_gradient_of(grads[k], indices[k], shard_size, grads[0].scalar_type()));
  }
  if (starts.has_value()) check_device(*starts, to.device, "starts");
  if (places.has_value()) check_device(*places, to.device, "places");
  const InverseArgument inverse(starts, places, num_shards);
  Tensor out = new_matrix(grads[0], num_shards, shard_size, accumulate_type(grads[0]));
  check_launch(launch_scatter_add(modules.data(), static_cast<int>(modules.size()), inverse.view, output_matrix_of(out),
                                  to.stream));
  return out;
}

Tensor shrink_op(const Tensor& x, const Tensor& pool, const Tensor& index, double p, const std::optional<Tensor>& seed,
                 bool tf32) {
  const Launcher to(x);
  const FactorArgument factor(pool, index, to.device);
  factor.check(x);
  const Tensor x_c = rows_contiguous(x);
  return summed(shrink_into_planes(x_c, factor.view, dropout_of(p, seed, to.device), float32_of(tf32), to), to);
}

Tensor expand_op(const Tensor& s, const Tensor& pool, const Tensor& index, double scale, ScalarType dtype, bool tf32) {
  const Launcher to(s);
  const FactorArgument factor(pool, index, to.device);
  Tensor y = new_matrix(s, s.size(0), factor.view.cols(), dtype);
  factor.check(y);
  const Tensor s_c = sums_on(to, s, y, factor.view.rank);
  check_launch(launch_expand(one_plane(s_c), factor.view, scale, output_matrix_of(y), {}, float32_of(tf32), to.stream));
  return y;
}

std::tuple<Tensor, Tensor> expand_backward_op(const Tensor& dy, const Tensor& s, const Tensor& pool,
                                              const Tensor& index, double scale, bool tf32) {
  const Launcher to(dy);
  const FactorArgument factor(pool, index, to.device);
  factor.check(dy);
  const Tensor dy_c = rows_contiguous(dy), s_c = sums_on(to, s, dy, factor.view.rank);
  const auto planes = expand_backward_into_planes(dy_c, s_c, factor.view, scale, float32_of(tf32), to);
  return {summed(planes.ds, to), summed(planes.factor_grad.planes, to)};
}

std::tuple<Tensor, Tensor> shrink_backward_op(const Tensor& ds, const Tensor& x, const Tensor& pool,
                                              const Tensor& index, double p, const std::optional<Tensor>& seed,
                                              bool tf32) {
  const Launcher to(x);
  const FactorArgument factor(pool, index, to.device);
  factor.check(x);
  const Tensor x_c = rows_contiguous(x), ds_c = sums_on(to, ds, x, factor.view.rank);
  Tensor dx = new_matrix(x, x.size(0), x.size(1), x.scalar_type());
  const auto grad = shrink_backward_into_planes(x_c, one_plane(ds_c), factor.view, dropout_of(p, seed, to.device), dx,
                                                /*accumulate=*/false, /*early=*/false, float32_of(tf32), to);
  return {dx, summed(grad.planes, to)};
}

// ---------------------------------------------------------------------------------------------- both factors at once

// Kernels do not touch rows that `rows` does not name, of which there may be none.
void zero_if_written_in_part(Tensor out, bool accumulate, const Groups& groups) {
  if (groups && (groups.rows || groups.places == 0) && !accumulate) torch::stable::zero_(out);
}

// shrink and expand in two launches: the planes of S go straight into expand, which also writes their sum.
Tensor low_rank_into(const Tensor& y, bool accumulate, const std::optional<Tensor>& bias, const Tensor& x,
                     const Tensor& pool_a, const Tensor& index_a, const Tensor& pool_b, const Tensor& index_b,
                     double scale, double p, const std::optional<Tensor>& seed, bool tf32, const Launcher& to,
                     const Groups& groups = {}) {
  const FactorArgument a(pool_a, index_a, to.device, bool(groups)), b(pool_b, index_b, to.device, bool(groups));
  check_device(y, to.device, "y");
  a.check(x);
  b.check(y);
  STD_TORCH_CHECK(a.view.rank == b.view.rank, "index_a and index_b must have the same rank");
  STD_TORCH_CHECK(y.size(0) == x.size(0) && y.scalar_type() == x.scalar_type(), "y must have x's rows and dtype");
  std::optional<Tensor> bias_c;
  ExpandOptions options;
  options.accumulate = accumulate;
  options.early = true;  // what it reads first, its factor and the bias, is older than the shrink before it
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->numel() == y.size(1) && bias->scalar_type() == y.scalar_type(),
                    "bias must be (columns of y,) of y's dtype");
    check_device(*bias, to.device, "bias");
    bias_c = as_contiguous(*bias);
    options.bias = bias_c->const_data_ptr();
  }
  const Tensor x_c = rows_contiguous(x);
  zero_if_written_in_part(y, accumulate, groups);
  const PlanesTensor planes =
      shrink_into_planes(x_c, a.view, dropout_of(p, seed, to.device), float32_of(tf32), to, groups);
  const bool split = planes.view.count > 1;
  Tensor s = planes.result();
  const Matrix out = output_matrix_of(y);
  ConstPlanes sums = planes.read();
  const int64_t elements = sums.rows * sums.cols;
  const bool shared = few_sums(elements) && !groups.invariant;
  if (split && sum_first(sums.count, expand_readers(out, a.view.rank, groups), elements, shared)) {
    sum_into(s.mutable_data_ptr(), sums, dtype_of(s), to);
    sums = one_plane(s);
  } else if (split) {
    options.s_sum = s.mutable_data_ptr();
  }
  check_launch(launch_expand(sums, b.view, scale, out, options, float32_of(tf32), to.stream, groups));
  return s;
}

std::tuple<Tensor, Tensor> low_rank_op(const Tensor& x, const Tensor& pool_a, const Tensor& index_a,
                                       const Tensor& pool_b, const Tensor& index_b, const std::optional<Tensor>& bias,
                                       double scale, double p, const std::optional<Tensor>& seed, bool tf32) {
  const Launcher to(x);
  Tensor y = new_matrix(x, x.size(0), index_b.size(1) * pool_b.size(1), x.scalar_type());
  Tensor s =
      low_rank_into(y, /*accumulate=*/false, bias, x, pool_a, index_a, pool_b, index_b, scale, p, seed, tf32, to);
  return {y, s};
}

Tensor low_rank_inplace_op(Tensor y, const Tensor& x, const Tensor& pool_a, const Tensor& index_a, const Tensor& pool_b,
                           const Tensor& index_b, double scale, double p, const std::optional<Tensor>& seed,
                           bool tf32) {
  const Launcher to(x);
  const Tensor y_c = rows_contiguous(y);
  Tensor s = low_rank_into(y_c, /*accumulate=*/true, std::nullopt, x, pool_a, index_a, pool_b, index_b, scale, p, seed,
                           tf32, to);
  if (y_c.get() != y.get()) torch::stable::copy_(y, y_c);
  return s;
}

// The two backward passes, and one launch that adds the planes of both factor gradients.
std::tuple<Tensor, Tensor> low_rank_backward_into(const Tensor& dx, bool accumulate, const Tensor& dy, const Tensor& s,
                                                  const Tensor& x, const Tensor& pool_a, const Tensor& index_a,
                                                  const Tensor& pool_b, const Tensor& index_b, double scale, double p,
                                                  const std::optional<Tensor>& seed, bool tf32, const Launcher& to,
                                                  const Groups& groups = {}) {
  const FactorArgument a(pool_a, index_a, to.device, bool(groups)), b(pool_b, index_b, to.device, bool(groups));
  check_device(dy, to.device, "dy");
  check_device(dx, to.device, "dx");
  a.check(x);
  b.check(dy);
  STD_TORCH_CHECK(a.view.rank == b.view.rank, "index_a and index_b must have the same rank");
  STD_TORCH_CHECK(dy.size(0) == x.size(0) && dy.scalar_type() == x.scalar_type(), "dy must have x's rows and dtype");
  STD_TORCH_CHECK(dx.size(0) == x.size(0) && dx.size(1) == x.size(1) && dx.scalar_type() == x.scalar_type(),
                  "dx must have the shape and dtype of x");
  const Tensor x_c = rows_contiguous(x), dy_c = rows_contiguous(dy), s_c = sums_on(to, s, x, a.view.rank, groups);
  const Float32 float32 = float32_of(tf32);
  zero_if_written_in_part(dx, accumulate, groups);
  const auto first = expand_backward_into_planes(dy_c, s_c, b.view, scale, float32, to, groups);
  ConstPlanes ds = first.ds.read();
  if (sum_first(ds.count, shrink_backward_readers(matrix_of(x_c), a.view.rank, groups), ds.rows * ds.cols,
                /*shared=*/false)) {
    sum_into(first.ds.view.data, ds, dtype_of(s_c), to);  // the sum becomes the first plane
    ds.count = 1;
  }
  const auto second = shrink_backward_into_planes(x_c, ds, a.view, dropout_of(p, seed, to.device), dx, accumulate,
                                                  /*early=*/true, float32, to, groups);
  Tensor grad_a = second.result(), grad_b = first.factor_grad.result();
  Sum sums[kSums];
  int count = 0;
  if (second.to_add()) sums[count++] = second.sum(grad_a);
  if (first.factor_grad.to_add()) sums[count++] = first.factor_grad.sum(grad_b);
  if (count) check_launch(launch_sum(sums, count, dtype_of(s_c), /*early=*/true, to.stream, groups));
  return {grad_a, grad_b};
}

std::tuple<Tensor, Tensor, Tensor> low_rank_backward_op(const Tensor& dy, const Tensor& s, const Tensor& x,
                                                        const Tensor& pool_a, const Tensor& index_a,
                                                        const Tensor& pool_b, const Tensor& index_b, double scale,
                                                        double p, const std::optional<Tensor>& seed, bool tf32) {
  const Launcher to(x);
  Tensor dx = new_matrix(x, x.size(0), x.size(1), x.scalar_type());
  auto [grad_a, grad_b] = low_rank_backward_into(dx, /*accumulate=*/false, dy, s, x, pool_a, index_a, pool_b, index_b,
                                                 scale, p, seed, tf32, to);
  return {dx, grad_a, grad_b};
}

std::tuple<Tensor, Tensor> low_rank_backward_inplace_op(Tensor dx, const Tensor& dy, const Tensor& s, const Tensor& x,
                                                        const Tensor& pool_a, const Tensor& index_a,
                                                        const Tensor& pool_b, const Tensor& index_b, double scale,
                                                        double p, const std::optional<Tensor>& seed, bool tf32) {
  const Launcher to(x);
  const Tensor dx_c = rows_contiguous(dx);
  auto grads = low_rank_backward_into(dx_c, /*accumulate=*/true, dy, s, x, pool_a, index_a, pool_b, index_b, scale, p,
                                      seed, tf32, to);
  if (dx_c.get() != dx.get()) torch::stable::copy_(dx, dx_c);
  return grads;
}

// ---------------------------------------------------------------------------------------------- in groups of rows

// The gradients of the factors of all groups, which were computed one below the other.
Tensor of_groups(const Tensor& grads, const Tensor& index) {
  const int64_t sizes[] = {index.size(0), index.size(1), grads.size(1)};
  const int64_t strides[] = {index.size(1) * grads.size(1), grads.size(1), 1};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(grads.get(), 3, sizes, strides, 0, &handle));
  return Tensor(handle);
}

std::tuple<Tensor, Tensor> grouped_low_rank_op(const Tensor& x, const Tensor& pool_a, const Tensor& index_a,
                                               const Tensor& pool_b, const Tensor& index_b, double scale, double p,
                                               const std::optional<Tensor>& seed, const Tensor& ends,
                                               const std::optional<Tensor>& rows, const std::optional<Tensor>& ranks,
                                               const std::optional<Tensor>& scales, bool invariant, bool tf32) {
  const Launcher to(x);
  const GroupsArgument groups = groups_on(to, x, index_a, index_b, ends, rows, ranks, scales, invariant);
  Tensor y = new_matrix(x, x.size(0), index_b.size(2) * pool_b.size(1), x.scalar_type());
  Tensor s = low_rank_into(y, /*accumulate=*/false, std::nullopt, x, pool_a, index_a, pool_b, index_b, scale, p, seed,
                           tf32, to, groups.view);
  return {y, s};
}

Tensor grouped_low_rank_inplace_op(Tensor y, const Tensor& x, const Tensor& pool_a, const Tensor& index_a,
                                   const Tensor& pool_b, const Tensor& index_b, double scale, double p,
                                   const std::optional<Tensor>& seed, const Tensor& ends,
                                   const std::optional<Tensor>& rows, const std::optional<Tensor>& ranks,
                                   const std::optional<Tensor>& scales, bool invariant, bool tf32) {
  const Launcher to(x);
  const GroupsArgument groups = groups_on(to, x, index_a, index_b, ends, rows, ranks, scales, invariant);
  const Tensor y_c = rows_contiguous(y);
  Tensor s = low_rank_into(y_c, /*accumulate=*/true, std::nullopt, x, pool_a, index_a, pool_b, index_b, scale, p, seed,
                           tf32, to, groups.view);
  if (y_c.get() != y.get()) torch::stable::copy_(y, y_c);
  return s;
}

std::tuple<Tensor, Tensor, Tensor> grouped_low_rank_backward_op(
    const Tensor& dy, const Tensor& s, const Tensor& x, const Tensor& pool_a, const Tensor& index_a,
    const Tensor& pool_b, const Tensor& index_b, double scale, double p, const std::optional<Tensor>& seed,
    const Tensor& ends, const std::optional<Tensor>& rows, const std::optional<Tensor>& ranks,
    const std::optional<Tensor>& scales, bool invariant, bool tf32) {
  const Launcher to(x);
  const GroupsArgument groups = groups_on(to, x, index_a, index_b, ends, rows, ranks, scales, invariant);
  Tensor dx = new_matrix(x, x.size(0), x.size(1), x.scalar_type());
  auto [grad_a, grad_b] = low_rank_backward_into(dx, /*accumulate=*/false, dy, s, x, pool_a, index_a, pool_b, index_b,
                                                 scale, p, seed, tf32, to, groups.view);
  return {dx, of_groups(grad_a, index_a), of_groups(grad_b, index_b)};
}

std::tuple<Tensor, Tensor> grouped_low_rank_backward_inplace_op(
    Tensor dx, const Tensor& dy, const Tensor& s, const Tensor& x, const Tensor& pool_a, const Tensor& index_a,
    const Tensor& pool_b, const Tensor& index_b, double scale, double p, const std::optional<Tensor>& seed,
    const Tensor& ends, const std::optional<Tensor>& rows, const std::optional<Tensor>& ranks,
    const std::optional<Tensor>& scales, bool invariant, bool tf32) {
  const Launcher to(x);
  const GroupsArgument groups = groups_on(to, x, index_a, index_b, ends, rows, ranks, scales, invariant);
  const Tensor dx_c = rows_contiguous(dx);
  auto [grad_a, grad_b] = low_rank_backward_into(dx_c, /*accumulate=*/true, dy, s, x, pool_a, index_a, pool_b, index_b,
                                                 scale, p, seed, tf32, to, groups.view);
  if (dx_c.get() != dx.get()) torch::stable::copy_(dx, dx_c);
  return {of_groups(grad_a, index_a), of_groups(grad_b, index_b)};
}

// ---------------------------------------------------------------------------------------------- the whole layer

// The branch, written, becomes the C of the base's product.

std::tuple<Tensor, Tensor> linear_op(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                     const Tensor& pool_a, const Tensor& index_a, const Tensor& pool_b,
                                     const Tensor& index_b, double scale, double p, const std::optional<Tensor>& seed,
                                     bool tf32) {
  const Launcher to(x);
  check_device(weight, to.device, "weight");
  check_weight(weight, x, index_b.size(1) * pool_b.size(1), x.size(1));
  auto [y, s] = low_rank_op(x, pool_a, index_a, pool_b, index_b, bias, scale, p, seed, tf32);
  add_product(y, x, transposed(weight));
  return {y, s};
}

std::tuple<Tensor, Tensor, Tensor> linear_backward_op(const Tensor& dy, const Tensor& s, const Tensor& x,
                                                      const Tensor& weight, const Tensor& pool_a, const Tensor& index_a,
                                                      const Tensor& pool_b, const Tensor& index_b, double scale,
                                                      double p, const std::optional<Tensor>& seed, bool of_pools,
                                                      bool tf32) {
  const Launcher to(x);
  check_device(weight, to.device, "weight");
  check_weight(weight, x, dy.size(1), x.size(1));
  auto [dx, grad_a, grad_b] = low_rank_backward_op(dy, s, x, pool_a, index_a, pool_b, index_b, scale, p, seed, tf32);
  add_product(dx, dy, weight);
  if (of_pools) {
    grad_a = scatter_add_op({grad_a}, {index_a}, pool_a.size(0));
    grad_b = scatter_add_op({grad_b}, {index_b}, pool_b.size(0));
  }
  return {dx, grad_a, grad_b};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mos_ext, MOS_DISPATCH_KEY, m) { MOS_EXT_IMPLEMENT_OPERATORS(m); }

}  // namespace mos::cuda

// With the version of the runtime that is linked in: loader.py asks whether the driver is new enough for it.
#define MOS_TEXT_OF(number) #number
#define MOS_RUNTIME(version) " CUDA " MOS_TEXT_OF(version) "."
extern "C" __attribute__((visibility("default"), used)) const char mos_ext_cuda_interface[] =
    MOS_EXT_INTERFACE MOS_RUNTIME(CUDART_VERSION);
