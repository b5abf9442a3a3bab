// The number of the operator interface that a library is built for. mos_ext/ops/loader.py looks for this string in the
// file before loading it, so that a library of another version is refused in one sentence instead of failing at its
// first call. Bump it together with INTERFACE in mos_ext/ops/schema.py, whenever a schema changes.
#pragma once

#define MOS_EXT_INTERFACE "mos_ext interface 4."

// What a library implements: every operator of schema.py, each with a function of its namespace.
#define MOS_EXT_IMPLEMENT_OPERATORS(m)                                                    \
  m.impl("gather_concat", TORCH_BOX(&gather_concat_op));                                  \
  m.impl("scatter_add", TORCH_BOX(&scatter_add_op));                                      \
  m.impl("shrink", TORCH_BOX(&shrink_op));                                                \
  m.impl("expand", TORCH_BOX(&expand_op));                                                \
  m.impl("expand_backward", TORCH_BOX(&expand_backward_op));                              \
  m.impl("shrink_backward", TORCH_BOX(&shrink_backward_op));                              \
  m.impl("low_rank", TORCH_BOX(&low_rank_op));                                            \
  m.impl("low_rank_", TORCH_BOX(&low_rank_inplace_op));                                   \
  m.impl("low_rank_backward", TORCH_BOX(&low_rank_backward_op));                          \
  m.impl("low_rank_backward_", TORCH_BOX(&low_rank_backward_inplace_op));                 \
  m.impl("grouped_low_rank", TORCH_BOX(&grouped_low_rank_op));                            \
  m.impl("grouped_low_rank_", TORCH_BOX(&grouped_low_rank_inplace_op));                   \
  m.impl("grouped_low_rank_backward", TORCH_BOX(&grouped_low_rank_backward_op));          \
  m.impl("grouped_low_rank_backward_", TORCH_BOX(&grouped_low_rank_backward_inplace_op)); \
  m.impl("linear", TORCH_BOX(&linear_op));                                                \
  m.impl("linear_backward", TORCH_BOX(&linear_backward_op))
