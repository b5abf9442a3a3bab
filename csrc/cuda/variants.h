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
// | shrink  | whole groups; whole dropout groups                         | experts, adapters of a batch: forward     |
// | expand  | whole groups                                               | the same; writing or accumulating         |
// | dy pass | whole groups                                               | backward of experts                       |
// | x pass  | whole groups; whole dropout groups                         | the same; writing or accumulating         |
// clang-format on
//
// With groups a kernel asks at run time whether it accumulates, once for a tile, and whether rows stand elsewhere: what
// variants of their own would save of a tile is not worth their number (RESOURCES.md has both).
//
// "Whole" promises aligned groups of eight columns, float pools whose shards hold whole groups, ranks in quads and in
// one block, and strides and shards that 32 bits reach. All else, float32 and float64 included, takes the variant that
// asks. A kernel costs about 20 KB for each architecture.
#pragma once

#include <cstddef>
#include <type_traits>

#include "heuristics.h"

namespace mos::cuda {

using Variant = unsigned;
constexpr Variant kAny = 0, kWhole = 1, kDropout = 2, kAccumulate = 4, kBias = 8, kGroups = 16;

constexpr Variant kShrinkVariants[] = {kWhole, kWhole | kDropout, kWhole | kGroups, kWhole | kDropout | kGroups};
constexpr Variant kExpandVariants[] = {kWhole, kWhole | kBias, kWhole | kAccumulate, kWhole | kGroups};
constexpr Variant kDyPassVariants[] = {kWhole, kWhole | kGroups};
constexpr Variant kXPassVariants[] = {
    kWhole,           kWhole | kDropout,          kWhole | kAccumulate, kWhole | kDropout | kAccumulate,
    kWhole | kGroups, kWhole | kDropout | kGroups};

// Whether a variant does `part`: known when it is compiled, or what the call asked for.
template <Variant kVariant, Variant kPart>
MOS_HOST_DEVICE constexpr bool does(bool asked) {
  const bool asks = !(kVariant & kWhole) || (kPart == kAccumulate && (kVariant & kGroups) != 0);
  return asks ? asked : (kVariant & kPart) != 0;
}

// What a launch wants. Where it is not whole it asks at run time.
constexpr Variant variant_of(bool whole, bool groups, bool dropout, bool accumulate = false, bool bias = false) {
  if (!whole) return kAny;
  const Variant more = groups ? kGroups : (accumulate ? kAccumulate : 0) | (bias ? kBias : 0);
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
