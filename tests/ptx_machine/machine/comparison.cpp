// Predicates: setp, selp, their logic. A predicate is one word, a bit for each lane.
#include <cmath>

#include "elementwise.h"

namespace ptx {
namespace {

void assign(Warp& warp, const Instruction& in, int operand, uint32_t lanes, uint32_t bits) {
  uint32_t* d = lanes_of<uint32_t>(warp, in.operand[operand]);
  *d = (*d & ~lanes) | (bits & lanes);
}
uint32_t predicate(Warp& warp, const Instruction& in, int operand) {
  return *lanes_of<uint32_t>(warp, in.operand[operand]);
}

template <class T, class F>
uint32_t compared(Warp& warp, uint32_t first, uint32_t second) {
  const T *a = lanes_of<T>(warp, first), *b = lanes_of<T>(warp, second);
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= static_cast<uint32_t>(F::f(a[lane], b[lane])) << lane;
  return bits;
}
template <class T, class F>
void compare(Warp& warp, const Instruction& in, uint32_t lanes) {
  assign(warp, in, 0, lanes, compared<T, F>(warp, in.operand[1], in.operand[2]));
}

// p|q = a ? b with predicate c: q is of the opposite comparison.
enum Combination : int64_t { kNone, kAnd, kOr, kXor };
uint32_t combined(int64_t how, uint32_t a, uint32_t b) {
  return how == kAnd ? a & b : how == kOr ? a | b : how == kXor ? a ^ b : a;
}
template <class T, class F>
void compare_and_combine(Warp& warp, const Instruction& in, uint32_t lanes) {
  const uint32_t bits = compared<T, F>(warp, in.operand[2], in.operand[3]);
  const uint32_t with = in.immediate == kNone ? 0 : predicate(warp, in, 4);
  assign(warp, in, 0, lanes, combined(in.immediate, bits, with));
  assign(warp, in, 1, lanes, combined(in.immediate, ~bits, with));
}

// Ordered comparisons are false where an operand is NaN, unordered ones true.
#define PTX_COMPARISON(name, condition) \
  struct name {                         \
    template <class T>                  \
    static bool f(T a, T b) {           \
      return condition;                 \
    }                                   \
  }
PTX_COMPARISON(Equal, a == b);
PTX_COMPARISON(NotEqual, a != b && a == a && b == b);
PTX_COMPARISON(Less, a < b);
PTX_COMPARISON(LessOrEqual, a <= b);
PTX_COMPARISON(Greater, a > b);
PTX_COMPARISON(GreaterOrEqual, a >= b);
PTX_COMPARISON(NotLess, !(a < b));
PTX_COMPARISON(NotLessOrEqual, !(a <= b));
PTX_COMPARISON(NotGreater, !(a > b));
PTX_COMPARISON(NotGreaterOrEqual, !(a >= b));
PTX_COMPARISON(EqualOrUnordered, a == b || a != a || b != b);
PTX_COMPARISON(NotEqualOrUnordered, a != b);
PTX_COMPARISON(Ordered, a == a && b == b);
PTX_COMPARISON(Unordered, a != a || b != b);
#undef PTX_COMPARISON

template <class T, class F>
Handler pick(bool simple) {
  return simple ? compare<T, F> : compare_and_combine<T, F>;
}
template <class T>
Handler ordered(const std::string& how, bool simple) {
  if (how == "eq") return pick<T, Equal>(simple);
  if (how == "ne") return pick<T, NotEqual>(simple);
  if (how == "lt") return pick<T, Less>(simple);
  if (how == "le") return pick<T, LessOrEqual>(simple);
  if (how == "gt") return pick<T, Greater>(simple);
  if (how == "ge") return pick<T, GreaterOrEqual>(simple);
  return nullptr;
}
template <class T>
Handler of_float(const std::string& how, bool simple) {
  if (how == "ltu") return pick<T, NotGreaterOrEqual>(simple);
  if (how == "leu") return pick<T, NotGreater>(simple);
  if (how == "gtu") return pick<T, NotLessOrEqual>(simple);
  if (how == "geu") return pick<T, NotLess>(simple);
  if (how == "equ") return pick<T, EqualOrUnordered>(simple);
  if (how == "neu") return pick<T, NotEqualOrUnordered>(simple);
  if (how == "num") return pick<T, Ordered>(simple);
  if (how == "nan") return pick<T, Unordered>(simple);
  return ordered<T>(how, simple);
}
Handler of_integer(const std::string& how, const std::string& type, bool simple) {
  if (type[0] == 'b' && how != "eq" && how != "ne") return nullptr;
  return with_integer(type, [&](auto value) -> Handler {
    using T = decltype(value);
    if (std::is_unsigned_v<T>) {
      if (how == "lo") return pick<T, Less>(simple);
      if (how == "ls") return pick<T, LessOrEqual>(simple);
      if (how == "hi") return pick<T, Greater>(simple);
      if (how == "hs") return pick<T, GreaterOrEqual>(simple);
    }
    return ordered<T>(how, simple);
  });
}

template <class T>
void select(Warp& warp, const Instruction& in, uint32_t lanes) {
  T* d = lanes_of<T>(warp, in.operand[0]);
  const T *a = lanes_of<T>(warp, in.operand[1]), *b = lanes_of<T>(warp, in.operand[2]);
  const uint32_t bits = predicate(warp, in, 3);
  for_each_lane(lanes, [&](int lane) { d[lane] = bits >> lane & 1u ? a[lane] : b[lane]; });
}

// slct: a where c is not negative, else b.
template <class T, class C>
void select_by_sign(Warp& warp, const Instruction& in, uint32_t lanes) {
  T* d = lanes_of<T>(warp, in.operand[0]);
  const T *a = lanes_of<T>(warp, in.operand[1]), *b = lanes_of<T>(warp, in.operand[2]);
  const C* c = lanes_of<C>(warp, in.operand[3]);
  for_each_lane(lanes, [&](int lane) { d[lane] = c[lane] >= C(0) ? a[lane] : b[lane]; });
}

void move_predicate(Warp& warp, const Instruction& in, uint32_t lanes) {
  assign(warp, in, 0, lanes, predicate(warp, in, 1));
}
void not_predicate(Warp& warp, const Instruction& in, uint32_t lanes) {
  assign(warp, in, 0, lanes, ~predicate(warp, in, 1));
}
void and_predicates(Warp& warp, const Instruction& in, uint32_t lanes) {
  assign(warp, in, 0, lanes, predicate(warp, in, 1) & predicate(warp, in, 2));
}
void or_predicates(Warp& warp, const Instruction& in, uint32_t lanes) {
  assign(warp, in, 0, lanes, predicate(warp, in, 1) | predicate(warp, in, 2));
}
void xor_predicates(Warp& warp, const Instruction& in, uint32_t lanes) {
  assign(warp, in, 0, lanes, predicate(warp, in, 1) ^ predicate(warp, in, 2));
}

// The type of registers of a width, as selp and slct see it.
template <template <class> class Make>
Signature by_width(int bits) {
  return bits == 16 ? Make<uint16_t>::make() : bits == 32 ? Make<uint32_t>::make() : Make<uint64_t>::make();
}
template <class T>
struct Select {
  static Signature make() { return {select<T>, {kBits<T>}, {kBits<T>, kBits<T>, 1}}; }
};
template <class T>
struct SelectByInteger {
  static Signature make() { return {select_by_sign<T, int32_t>, {kBits<T>}, {kBits<T>, kBits<T>, 32}}; }
};
template <class T>
struct SelectByFloat {
  static Signature make() { return {select_by_sign<T, float>, {kBits<T>}, {kBits<T>, kBits<T>, 32}}; }
};

int width_of_type(const std::string& type) {
  for (const char* bits : {"16", "32", "64"}) {
    if (type.size() == 3 && type.substr(1) == bits) return std::stoi(bits);
  }
  return 0;
}

}  // namespace

Signature comparison(const Words& words, bool pair) {
  const std::string &family = words[0], &type = words.back();
  const int bits = width_of_type(type);
  if (family == "setp" && (words.size() == 3 || words.size() == 4) && bits) {
    const std::string combination = words.size() == 4 ? words[2] : "";
    const Combination how = combination == "and"   ? kAnd
                            : combination == "or"  ? kOr
                            : combination == "xor" ? kXor
                                                   : kNone;
    if (how == kNone && !combination.empty()) return {};
    const bool simple = how == kNone && !pair;
    const Handler handler = type == "f32"   ? of_float<float>(words[1], simple)
                            : type == "f64" ? of_float<double>(words[1], simple)
                                            : of_integer(words[1], type, simple);
    if (simple) return {handler, {1}, {bits, bits}};
    const std::vector<int> sources = how == kNone ? std::vector<int>{bits, bits} : std::vector<int>{bits, bits, 1};
    return {handler, {1, 1}, sources, true, Kind::lanes, how};
  }
  if (family == "selp" && words.size() == 2 && bits) return by_width<Select>(bits);
  if (family == "slct" && words.size() == 3 && width_of_type(words[1])) {
    if (type == "s32") return by_width<SelectByInteger>(width_of_type(words[1]));
    if (type == "f32") return by_width<SelectByFloat>(width_of_type(words[1]));
  }
  if (type != "pred" || words.size() != 2) return {};
  if (family == "mov") return {move_predicate, {1}, {1}};
  if (family == "not") return {not_predicate, {1}, {1}};
  if (family == "and") return {and_predicates, {1}, {1, 1}};
  if (family == "or") return {or_predicates, {1}, {1, 1}};
  if (family == "xor") return {xor_predicates, {1}, {1, 1}};
  return {};
}

}  // namespace ptx
