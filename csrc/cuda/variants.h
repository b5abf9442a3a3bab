// Which variants of the low-rank kernels are compiled, and which one a launch takes.
//
// Every kernel has a variant that takes anything and asks at run time what the call wants: the odd shapes, strides and
// dtypes. For what people run, in the types that people train in, the questions are answered when it is compiled, for
// the kernels are bound by instructions where they ask: an inner loop of expand had 518 instructions for a tile of
// 8 KiB with all its questions, of which a plain write needs less than half.
//
// clang-format off
// | kernel  | variants of 16-bit elements, each for 16 and for 64 ranks  | who runs them                             |
// |---------|------------------------------------------------------------|-------------------------------------------|
// | shrink  | whole; whole dropout                                       | forward                                   |
// | expand  | whole; whole bias; whole accumulate                        | forward; with a bias; over an opaque base |
// | dy pass | whole                                                      | backward                                  |
// | x pass  | whole; whole dropout; whole accumulate; both               | backward; both over an opaque base        |
// | shrink  | whole groups; whole dropout groups; whole groups rows      | experts, adapters of a batch              |
// | expand  | whole groups; whole groups rows; writing or accumulating   | experts, adapters of a batch              |
// | dy pass | whole groups                                               | experts                                   |
// | x pass  | whole groups; whole dropout groups; writing or accumulating| experts                                   |
// clang-format on
//
// "Whole" promises aligned groups of eight columns, float pools whose shards hold whole groups, ranks in quads and in
// one block, and strides and shards that 32 bits reach. All else, float32 and float64 included, takes the variant that
// asks. A kernel costs about 20 KB for each architecture.
//
// "Groups" are of rows with factors of their own, "rows" says that those stand elsewhere, as do the sequences of a
// batch when adapters are served; that in backward, or with dropout, is nobody's main road. Whether it accumulates a
// kernel with groups asks at run time, once for a tile: variants for both would save less than their number costs.
#pragma once

#include <cstddef>
#include <type_traits>

#include "heuristics.h"

namespace mos::cuda {

using Variant = unsigned;
constexpr Variant kAny = 0, kWhole = 1, kDropout = 2, kAccumulate = 4, kBias = 8, kGrouped = 16, kMapped = 32;

constexpr Variant kShrinkVariants[] = {kWhole, kWhole | kDropout, kWhole | kGrouped, kWhole | kDropout | kGrouped,
                                       kWhole | kGrouped | kMapped};
constexpr Variant kExpandVariants[] = {kWhole, kWhole | kBias, kWhole | kAccumulate, kWhole | kGrouped,
                                       kWhole | kGrouped | kMapped};
constexpr Variant kDyPassVariants[] = {kWhole, kWhole | kGrouped};
constexpr Variant kXPassVariants[] = {kWhole,
                                      kWhole | kDropout,
                                      kWhole | kAccumulate,
                                      kWhole | kDropout | kAccumulate,
                                      kWhole | kGrouped,
                                      kWhole | kDropout | kGrouped};

// Whether a variant does `part`: known when it is compiled, or what the call asked for.
template <Variant kVariant, Variant kPart>
MOS_HOST_DEVICE constexpr bool does(bool asked) {
  const bool asks = !(kVariant & kWhole) || (kPart == kAccumulate && (kVariant & kGrouped) != 0);
  return asks ? asked : (kVariant & kPart) != 0;
}

// What is of the rows of a block where a variant may have groups, and of the launch where it has none.
template <Variant kVariant>
constexpr bool kMayHaveGroups = !(kVariant & kWhole) || (kVariant & kGrouped) != 0;
template <Variant kVariant, class T>
using OfRows = std::conditional_t<kMayHaveGroups<kVariant>, T, const T&>;

// What a launch wants. Where it is not whole it asks at run time.
inline Variant variant_of(bool whole, const Groups& groups, bool dropout, bool accumulate = false, bool bias = false) {
  if (!whole) return kAny;
  const Variant more =
      groups ? kGrouped | (groups.rows ? kMapped : 0) : (accumulate ? kAccumulate : 0) | (bias ? kBias : 0);
  return kWhole | (dropout ? kDropout : 0) | more;
}

// Calls f(std::integral_constant<Variant, v>) with the variant of a list that is wanted; with the one that takes
// anything where there is none, or where M's arithmetic has no others.
template <class M, const auto& kVariants, size_t kAt = 0, class F>
auto with_variant(Variant wanted, const F& f) {
  if constexpr (!M::kWholeVariant || kAt == sizeof(kVariants) / sizeof(kVariants[0])) {
    return f(std::integral_constant<Variant, kAny>{});
  } else {
    return wanted == kVariants[kAt] ? f(std::integral_constant<Variant, kVariants[kAt]>{})
                                    : with_variant<M, kVariants, kAt + 1>(wanted, f);
  }
}

}  // namespace mos::cuda
