// Handlers of instructions that compute a register lane by lane: templates over a struct F with a static function f.
#pragma once

#include <type_traits>

#include "handlers.h"
#include "state.h"

namespace ptx {

template <class D, class A, class F>
void unary(Warp& warp, const Instruction& in, uint32_t lanes) {
  D* d = lanes_of<D>(warp, in.operand[0]);
  const A* a = lanes_of<A>(warp, in.operand[1]);
  for_each_lane(lanes, [&](int lane) { d[lane] = F::f(a[lane]); });
}
template <class D, class A, class B, class F>
void binary(Warp& warp, const Instruction& in, uint32_t lanes) {
  D* d = lanes_of<D>(warp, in.operand[0]);
  const A* a = lanes_of<A>(warp, in.operand[1]);
  const B* b = lanes_of<B>(warp, in.operand[2]);
  for_each_lane(lanes, [&](int lane) { d[lane] = F::f(a[lane], b[lane]); });
}
template <class D, class A, class B, class C, class F>
void ternary(Warp& warp, const Instruction& in, uint32_t lanes) {
  D* d = lanes_of<D>(warp, in.operand[0]);
  const A* a = lanes_of<A>(warp, in.operand[1]);
  const B* b = lanes_of<B>(warp, in.operand[2]);
  const C* c = lanes_of<C>(warp, in.operand[3]);
  for_each_lane(lanes, [&](int lane) { d[lane] = F::f(a[lane], b[lane], c[lane]); });
}

template <class T>
constexpr int kBits = 8 * sizeof(T);

template <class T, class F>
Signature unary_signature() {
  return {unary<T, T, F>, {kBits<T>}, {kBits<T>}};
}
template <class T, class F>
Signature binary_signature() {
  return {binary<T, T, T, F>, {kBits<T>}, {kBits<T>, kBits<T>}};
}
template <class T, class F>
Signature ternary_signature() {
  return {ternary<T, T, T, T, F>, {kBits<T>}, {kBits<T>, kBits<T>, kBits<T>}};
}

// Calls f with a value of the C++ type of an integer type of PTX, of 16 bits or more; b as u.
template <class F>
auto with_integer(const std::string& type, const F& f) -> decltype(f(uint32_t{})) {
  if (type == "u16" || type == "b16") return f(uint16_t{});
  if (type == "s16") return f(int16_t{});
  if (type == "u32" || type == "b32") return f(uint32_t{});
  if (type == "s32") return f(int32_t{});
  if (type == "u64" || type == "b64") return f(uint64_t{});
  if (type == "s64") return f(int64_t{});
  return {};
}

// The parts of a name between the first and the last: "lo" of mul.lo.s32.
inline std::string middle(const Words& words) {
  std::string text;
  for (size_t i = 1; i + 1 < words.size(); ++i) text += (text.empty() ? "" : ".") + words[i];
  return text;
}

}  // namespace ptx
