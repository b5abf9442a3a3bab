// The kernels' host functions (csrc/cuda/launch.h) with C linkage, for kernels.py. Views travel as pointers to the
// structs of csrc/common/params.h and launch.h, which kernels.py mirrors.
#include "../../csrc/cuda/launch.h"

using namespace mos;
using namespace mos::cuda;

namespace {
// Whether launches may start early, as they do when an operator makes several.
bool early = false;
// The groups that rows of all launches are in, and where the gradients of their factors go: of the dy pass, of the x
// pass.
Groups groups;
void *grads_b = nullptr, *grads_a = nullptr;
}  // namespace

extern "C" {

void mos_launch_early(int on) { early = on != 0; }
void mos_in_groups(const Groups* all, void* of_dy_pass, void* of_x_pass) {
  groups = all ? *all : Groups{};
  grads_b = of_dy_pass;
  grads_a = of_x_pass;
}

// So that kernels.py can tell whether its mirrors are exact.
void mos_struct_sizes(int64_t* out) {
  const size_t sizes[] = {sizeof(Matrix), sizeof(Factor),        sizeof(FactorGradient), sizeof(DeviceDropout),
                          sizeof(Planes), sizeof(ExpandOptions), sizeof(Groups),         sizeof(Inverse)};
  for (int i = 0; i < 8; ++i) out[i] = static_cast<int64_t>(sizes[i]);
}

int64_t mos_shrink_planes(const Matrix* x, const Factor* factor) { return shrink_planes(*x, *factor, groups); }
int mos_shrink(const Matrix* x, const Factor* factor, const DeviceDropout* dropout, const Planes* s, int tf32) {
  return launch_shrink(*x, *factor, *dropout, *s, tf32 ? Float32::tf32 : Float32::exact, nullptr, groups);
}

int mos_expand(const ConstPlanes* s, const Factor* factor, double scale, const Matrix* y, const ExpandOptions* options,
               int tf32) {
  ExpandOptions all = *options;
  all.early = early;
  return launch_expand(*s, *factor, scale, *y, all, tf32 ? Float32::tf32 : Float32::exact, nullptr, groups);
}

void mos_backward_planes(const Matrix* activations, int64_t rank, int64_t* out) {
  const BackwardPlanes planes = backward_planes(*activations, rank, groups);
  out[0] = planes.projected;
  out[1] = planes.factor_grad;
  out[2] = planes.part;
}
int mos_expand_backward(const Matrix* dy, const ConstPlanes* s, const Factor* factor, double scale, const Planes* ds,
                        const Planes* factor_grad, int tf32) {
  return launch_expand_backward(*dy, *s, *factor, scale, *ds, *factor_grad, tf32 ? Float32::tf32 : Float32::exact,
                                nullptr, groups, grads_b);
}
int mos_shrink_backward(const Matrix* x, const ConstPlanes* ds, const Factor* factor, const DeviceDropout* dropout,
                        const Matrix* dx, int accumulate, const Planes* factor_grad, int tf32) {
  return launch_shrink_backward(*x, *ds, *factor, *dropout, *dx, accumulate != 0, *factor_grad, early,
                                tf32 ? Float32::tf32 : Float32::exact, nullptr, groups, grads_a);
}

int mos_sum(const ConstPlanes* planes, void* out, int dtype) {
  const Sum sum{*planes, out};
  return launch_sum(&sum, 1, static_cast<DType>(dtype), early, nullptr);
}
int mos_sums(const ConstPlanes* a, const ConstPlanes* b, void* out_a, void* out_b, int dtype) {
  const Sum sums[] = {{*a, out_a}, {*b, out_b}};
  return launch_sum(sums, 2, static_cast<DType>(dtype), early, nullptr);
}
// Of what is beyond the first parts of groups, onto the gradients.
int mos_sums_of_groups(const ConstPlanes* a, const ConstPlanes* b, int64_t part_a, int64_t part_b, int dtype) {
  const Sum sums[] = {{*a, grads_a, part_a}, {*b, grads_b, part_b}};
  return launch_sum(sums, 2, static_cast<DType>(dtype), early, nullptr, groups);
}
int mos_gather_concat(const Factor* factor, const Matrix* out) { return launch_gather_concat(*factor, *out, nullptr); }
int mos_scatter_add(const FactorGradient* modules, int count, const Inverse* inverse, const Matrix* pool_grad) {
  return launch_scatter_add(modules, count, *inverse, *pool_grad, nullptr);
}

// What the last launch was: grid x, y, z, threads, bytes of shared memory; returns "kernel arithmetic"'s two halves.
const char* mos_last_kernel(int64_t* out) {
  const LaunchRecord& l = last_launch();
  const int64_t all[] = {l.grid[0], l.grid[1], l.grid[2], l.threads, static_cast<int64_t>(l.shared_bytes)};
  for (int i = 0; i < 5; ++i) out[i] = all[i];
  return l.kernel;
}

}  // extern "C"
