// The one bridge from torch::stable tensors to the kernels' views. Only ops.cpp files include it.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>
#include <vector>

#include "params.h"

namespace mos {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      STD_TORCH_CHECK(false, "mos_ext kernels take float32, float64, bfloat16 and float16 tensors");
  }
}

// The dtype that sums of t are kept and returned in.
inline ScalarType accumulate_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// An uninitialised tensor on the device of `like`. torch::stable::new_empty looks an operator up by name at every call,
// which costs a small layer more than its products do.
inline Tensor new_strided(const Tensor& like, int64_t dim, const int64_t* sizes, const int64_t* strides,
                          ScalarType dtype) {
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  int32_t device_type;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides, code, device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

inline Tensor new_matrix(const Tensor& like, int64_t rows, int64_t cols, ScalarType dtype) {
  const int64_t sizes[] = {rows, cols}, strides[] = {cols > 1 ? cols : 1, 1};
  return new_strided(like, 2, sizes, strides, dtype);
}

// (groups, rows, cols).
inline Tensor new_matrices(const Tensor& like, int64_t groups, int64_t rows, int64_t cols, ScalarType dtype) {
  const int64_t sizes[] = {groups, rows, cols}, strides[] = {rows * cols, cols, 1};
  return new_strided(like, 3, sizes, strides, dtype);
}

// Without a trip through the dispatcher where there is nothing to do.
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// t with a contiguous last dimension, copied only if it has none.
inline Tensor rows_contiguous(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 2, "expected a matrix, got ", t.dim(), " dimensions");
  return t.size(1) <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

// W^T, a view past the dispatcher.
inline Tensor transposed(const Tensor& t) {
  const int64_t sizes[] = {t.size(1), t.size(0)}, strides[] = {t.stride(1), t.stride(0)};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 2, sizes, strides, 0, &handle));
  return Tensor(handle);
}

// What a base layer multiplies with: x, or dy, and its weight, (columns of y, of x).
inline void check_weight(const Tensor& weight, const Tensor& x, int64_t columns_of_y, int64_t columns_of_x) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) == columns_of_y && weight.size(1) == columns_of_x &&
                      weight.scalar_type() == x.scalar_type(),
                  "weight must be (columns of y, columns of x) of x's dtype");
}

// A view of t, which must outlive it and come from rows_contiguous. For reading only: a copy-on-write input is not
// copied.
inline Matrix matrix_of(const Tensor& t) {
  return {const_cast<void*>(t.const_data_ptr()), dtype_of(t), t.size(0), t.size(1),
          t.size(0) > 1 ? t.stride(0) : t.size(1)};
}

// The same for a tensor that is written. Rows must not overlap: two tasks would write the same element.
inline Matrix output_matrix_of(const Tensor& t) {
  Matrix view = matrix_of(t);
  STD_TORCH_CHECK(t.size(0) <= 1 || t.stride(0) >= t.size(1), "an output must not overlap itself, got row stride ",
                  t.stride(0), " for ", t.size(1), " columns");
  view.data = t.mutable_data_ptr();
  return view;
}

// The factor that index (rank, shards_per_vector) selects from pool, or the first of those that a grouped one, (groups,
// rank, shards_per_vector), does; both must outlive it. Shapes that could corrupt memory are refused here; everything a
// user can get wrong was refused in Python before.
inline Factor factor_of(const Tensor& pool, const Tensor& index, bool grouped = false) {
  STD_TORCH_CHECK(pool.dim() == 2 && pool.is_contiguous(), "pool must be a contiguous matrix");
  const int64_t dim = grouped ? 3 : 2;
  STD_TORCH_CHECK(index.dim() == dim && index.is_contiguous() && index.scalar_type() == ScalarType::Int,
                  "index must be a contiguous int32 matrix, one for each group where there are groups");
  return {pool.const_data_ptr(), dtype_of(pool),     pool.size(0),
          pool.size(1),          pool.size(1),       static_cast<const int32_t*>(index.const_data_ptr()),
          index.size(dim - 2),   index.size(dim - 1)};
}

// The tensors behind a view of groups, contiguous, kept alive together with it. `rows_of_x` are the rows of
// activations.
class __attribute__((visibility("hidden"))) GroupsArgument {
 public:
  GroupsArgument(int64_t rows_of_x, int64_t groups, const Tensor& ends, const std::optional<Tensor>& rows,
                 const std::optional<Tensor>& ranks, const std::optional<Tensor>& scales, bool invariant)
      : ends_(as_contiguous(ends)), rows_(contiguous(rows)), ranks_(contiguous(ranks)), scales_(contiguous(scales)) {
    check("ends", ends_, ScalarType::Int, groups);
    if (ranks_) check("ranks", *ranks_, ScalarType::Int, groups);
    if (scales_) check("scales", *scales_, ScalarType::Float, groups);
    if (rows_) check("rows", *rows_, ScalarType::Int, -1);
    view.ends = static_cast<const int32_t*>(ends_.const_data_ptr());
    view.rows = rows_ ? static_cast<const int32_t*>(rows_->const_data_ptr()) : nullptr;
    view.ranks = ranks_ ? static_cast<const int32_t*>(ranks_->const_data_ptr()) : nullptr;
    view.scales = scales_ ? static_cast<const float*>(scales_->const_data_ptr()) : nullptr;
    view.count = groups;
    view.places = rows_ ? rows_->size(0) : rows_of_x;
    view.invariant = invariant;
  }

  Groups view;

 private:
  static std::optional<Tensor> contiguous(const std::optional<Tensor>& t) {
    return t.has_value() ? std::optional<Tensor>(as_contiguous(*t)) : std::nullopt;
  }
  static void check(const char* name, const Tensor& t, ScalarType type, int64_t size) {
    STD_TORCH_CHECK(t.dim() == 1 && t.scalar_type() == type && (size < 0 || t.size(0) == size), name, " must be ",
                    size < 0 ? "one for each place" : "one for each group", ", int32 (scales: float32)");
  }

  Tensor ends_;
  std::optional<Tensor> rows_, ranks_, scales_;
};

// The tensors behind an inverse of tables, contiguous, kept alive together with the view.
class InverseArgument {
 public:
  InverseArgument(const std::optional<Tensor>& starts, const std::optional<Tensor>& places, int64_t num_shards) {
    STD_TORCH_CHECK(starts.has_value() == places.has_value(), "starts and places must come together");
    if (!starts.has_value()) return;
    STD_TORCH_CHECK(starts->dim() == 1 && starts->size(0) == num_shards + 1 && starts->scalar_type() == ScalarType::Int,
                    "starts must be (num_shards + 1,) int32");
    STD_TORCH_CHECK(places->dim() == 2 && places->size(1) == 2 && places->scalar_type() == ScalarType::Int,
                    "places must be (entries, 2) int32");
    starts_ = as_contiguous(*starts);
    places_ = as_contiguous(*places);
    view = {static_cast<const int32_t*>(starts_->const_data_ptr()),
            static_cast<const Place*>(places_->const_data_ptr()), places_->size(0)};
  }

  Inverse view;

 private:
  std::optional<Tensor> starts_, places_;
};

// One module of a scatter_add; grad comes from rows_contiguous and both must outlive it.
inline FactorGradient factor_gradient_of(const Tensor& grad, const Tensor& index, int64_t shard_size,
                                         ScalarType dtype) {
  STD_TORCH_CHECK(index.dim() == 2 && index.is_contiguous() && index.scalar_type() == ScalarType::Int &&
                      (grad.size(0) == index.size(0) || grad.size(0) == 0) &&
                      grad.size(1) == index.size(1) * shard_size && grad.scalar_type() == dtype,
                  "grads must be (r, l * shard_size) of one dtype, or have no rows, and indices (r, l) int32");
  return {matrix_of(grad), static_cast<const int32_t*>(index.const_data_ptr()), index.size(1)};
}

// s, dS: contiguous (rows of x, rank) in the accumulation type of x.
inline Tensor sums_contiguous(const Tensor& s, const Tensor& x, int64_t rank) {
  STD_TORCH_CHECK(s.dim() == 2 && s.size(0) == x.size(0) && s.size(1) == rank && s.scalar_type() == accumulate_type(x),
                  "s must be (rows of x, rank) in the accumulation type of x");
  return as_contiguous(s);
}

// The threshold of a dropout (params.h). Where it is not 0 there is a seed.
inline uint32_t threshold_of(double p, const std::optional<Tensor>& seed) {
  STD_TORCH_CHECK(p >= 0.0 && p <= 1.0, "dropout must be in [0, 1], got ", p);
  const uint32_t threshold = dropout_threshold(p);
  STD_TORCH_CHECK(threshold == 0 || (seed.has_value() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1),
                  "dropout needs a seed of one int64");
  return threshold;
}

}  // namespace mos
