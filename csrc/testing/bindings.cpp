// Test-only bindings of the torch-free CPU kernels: NumPy in, NumPy out (in place). Built by tests/test_kernels.py,
// never shipped. bf16 and fp16 travel as uint16 bit patterns next to a dtype name. Tasks run one after another,
// forwards or backwards.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "../common/numeric.h"
#include "../common/philox.h"
#include "../cpu/kernels.h"

namespace py = pybind11;
using namespace mos;

namespace {

DType dtype_named(const std::string& name) {
  if (name == "f32") return DType::f32;
  if (name == "f64") return DType::f64;
  if (name == "bf16") return DType::bf16;
  if (name == "f16") return DType::f16;
  throw std::invalid_argument("unknown dtype " + name);
}

Matrix matrix(const std::optional<py::array>& a, DType dtype) {
  if (!a) return {};
  const int64_t size = a->itemsize();
  return {const_cast<void*>(a->data()), dtype, a->shape(0), a->shape(1),
          a->shape(0) > 1 ? a->strides(0) / size : a->shape(1)};
}

Factor factor(const py::array& pool, DType dtype, const py::array_t<int32_t>& index) {
  const py::ssize_t r = index.ndim() - 2;  // before it, groups
  return {pool.data(),  dtype,          pool.shape(0),     pool.shape(1), pool.strides(0) / pool.itemsize(),
          index.data(), index.shape(r), index.shape(r + 1)};
}

ParallelFor in_order(bool reversed) {
  return [reversed](int64_t count, const std::function<void(int64_t)>& task) {
    for (int64_t i = 0; i < count; ++i) task(reversed ? count - 1 - i : i);
  };
}

}  // namespace

PYBIND11_MODULE(mos_kernels, m) {
  m.def("instruction_set", &cpu::instruction_set);
  m.def("first_bad_index", [](const py::array_t<int32_t>& index, int64_t num_shards) {
    return cpu::first_bad_index(index.data(), index.size(), num_shards);
  });
  m.def("round_trip", [](const std::string& dtype, const py::array_t<float>& values) {
    py::array_t<float> out(values.size());
    for (py::ssize_t i = 0; i < values.size(); ++i) {
      const float v = values.data()[i];
      out.mutable_data()[i] =
          dtype == "bf16" ? static_cast<float>(bf16_t::round(v)) : static_cast<float>(f16_t::round(v));
    }
    return out;
  });
  m.def("philox", [](uint64_t seed, uint32_t group, uint64_t row) {
    const PhiloxBlock b = philox(seed, group, row);
    return std::vector<uint32_t>(b.word, b.word + 4);
  });
  m.def("gather_concat",
        [](const py::array& pool, const std::string& dtype, const py::array_t<int32_t>& index, py::array out) {
          const DType d = dtype_named(dtype);
          cpu::gather_concat(factor(pool, d, index), matrix(out, d), in_order(false));
        });
  m.def("scatter_add", [](const std::vector<py::array>& grads, const std::string& dtype,
                          const std::vector<py::array_t<int32_t>>& indices, py::array pool_grad, bool reversed) {
    std::vector<FactorGradient> modules;
    for (size_t k = 0; k < grads.size(); ++k) {
      modules.push_back({matrix(grads[k], dtype_named(dtype)), indices[k].data(), indices[k].shape(1)});
    }
    const DType sums = dtype == "f64" ? DType::f64 : DType::f32;
    cpu::scatter_add(modules, matrix(pool_grad, sums), in_order(reversed));
  });
  m.def(
      "low_rank_pass",
      [](const py::array& pool, const std::string& pool_dtype, const py::array_t<int32_t>& index,
         const std::string& dtype, std::optional<py::array> in, std::optional<py::array> s,
         std::optional<py::array> projected, std::optional<py::array> factor_grad, std::optional<py::array> out,
         bool accumulate, double scale, double dropout, uint64_t seed, bool reversed, bool scatter,
         const std::optional<py::array_t<int32_t>>& ends, const std::optional<py::array_t<int32_t>>& rows,
         const std::optional<py::array_t<int32_t>>& ranks, const std::optional<py::array_t<float>>& scales,
         bool invariant) {
        cpu::LowRankPass pass{factor(pool, dtype_named(pool_dtype), index), {seed, dropout_threshold(dropout)}, scale};
        const Matrix in_view = matrix(in, dtype_named(dtype)), out_view = matrix(out, dtype_named(dtype));
        pass.in = in ? &in_view : nullptr;
        pass.out = out ? &out_view : nullptr;
        pass.s = s ? s->data() : nullptr;
        pass.projected = projected ? projected->mutable_data() : nullptr;
        pass.factor_grad = factor_grad ? factor_grad->mutable_data() : nullptr;
        pass.accumulate = accumulate;
        pass.scatter = scatter;
        if (ends) {
          pass.groups = {ends->data(), rows ? rows->data() : nullptr, ranks ? ranks->data() : nullptr,
                         scales ? scales->data() : nullptr, ends->size()};
          pass.groups.places = rows ? rows->size() : pass.activations().rows;
          pass.groups.invariant = invariant;
        }
        cpu::low_rank_pass(pass, in_order(reversed));
      },
      py::kw_only(), py::arg("pool"), py::arg("pool_dtype"), py::arg("index"), py::arg("dtype"),
      py::arg("input") = py::none(), py::arg("s") = py::none(), py::arg("projected") = py::none(),
      py::arg("factor_grad") = py::none(), py::arg("out") = py::none(), py::arg("accumulate") = false,
      py::arg("scale") = 1.0, py::arg("dropout") = 0.0, py::arg("seed") = 0, py::arg("reversed") = false,
      py::arg("scatter") = false, py::arg("ends") = py::none(), py::arg("rows") = py::none(),
      py::arg("ranks") = py::none(), py::arg("scales") = py::none(), py::arg("invariant") = false);
  m.def("scatters", [](const py::array& pool, const py::array_t<int32_t>& index, int64_t rows) {
    return cpu::scatters(factor(pool, DType::f32, index), rows);
  });
}
