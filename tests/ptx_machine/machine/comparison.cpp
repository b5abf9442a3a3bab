// Predicates: setp, selp, their logic. A predicate is one word, a bit for each lane.
#include <cmath>

#include "elementwise.h"

namespace ptx {
namespace {

void assign(Warp& warp, const Instruction& in, uint32_t lanes, uint32_t bits) {
  uint32_t* d = lanes_of<uint32_t>(warp, in.operand[0]);
  *d = (*d & ~lanes) | (bits & lanes);
}
uint32_t predicate(Warp& warp, const Instruction& in, int operand) {
  return *lanes_of<uint32_t>(warp, in.operand[operand]);
}

template <class T, class F>
void compare(Warp& warp, const Instruction& in, uint32_t lanes) {
  const T *a = lanes_of<T>(warp, in.operand[1]), *b = lanes_of<T>(warp, in.operand[2]);
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= static_cast<uint32_t>(F::f(a[lane], b[lane])) << lane;
  assign(warp, in, lanes, bits);
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

template <class T>
Handler ordered(const std::string& how) {
  if (how == "eq") return compare<T, Equal>;
  if (how == "ne") return compare<T, NotEqual>;
  if (how == "lt") return compare<T, Less>;
  if (how == "le") return compare<T, LessOrEqual>;
  if (how == "gt") return compare<T, Greater>;
  if (how == "ge") return compare<T, GreaterOrEqual>;
  return nullptr;
}
template <class T>
Handler of_float(const std::string& how) {
  if (how == "ltu") return compare<T, NotGreaterOrEqual>;
  if (how == "leu") return compare<T, NotGreater>;
  if (how == "gtu") return compare<T, NotLessOrEqual>;
  if (how == "geu") return compare<T, NotLess>;
  if (how == "equ") return compare<T, EqualOrUnordered>;
  if (how == "neu") return compare<T, NotEqualOrUnordered>;
  if (how == "num") return compare<T, Ordered>;
  if (how == "nan") return compare<T, Unordered>;
  return ordered<T>(how);
}
Handler of_integer(const std::string& how, const std::string& type) {
  if (type[0] == 'b' && how != "eq" && how != "ne") return nullptr;
  return with_integer(type, [&](auto value) -> Handler {
    using T = decltype(value);
    if (std::is_unsigned_v<T>) {
      if (how == "lo") return compare<T, Less>;
      if (how == "ls") return compare<T, LessOrEqual>;
      if (how == "hi") return compare<T, Greater>;
      if (how == "hs") return compare<T, GreaterOrEqual>;
    }
    return ordered<T>(how);
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
  assign(warp, in, lanes, predicate(warp, in, 1));
}
void not_predicate(Warp& warp, const Instruction& in, uint32_t lanes) {
  assign(warp, in, lanes, ~predicate(warp, in, 1));
}
void and_predicates(Warp& warp, const Instruction& in, uint32_t lanes) {
  assign(warp, in, lanes, predicate(warp, in, 1) & predicate(warp, in, 2));
}
void or_predicates(Warp& warp, const Instruction& in, uint32_t lanes) {
  assign(warp, in, lanes, predicate(warp, in, 1) | predicate(warp, in, 2));
}
void xor_predicates(Warp& warp, const Instruction& in, uint32_t lanes) {
  assign(warp, in, lanes, predicate(warp, in, 1) ^ predicate(warp, in, 2));
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

Signature comparison(const Words& words) {
  const std::string &family = words[0], &type = words.back();
  const int bits = width_of_type(type);
  if (family == "setp" && words.size() == 3 && bits) {
    const Handler handler = type == "f32"   ? of_float<float>(words[1])
                            : type == "f64" ? of_float<double>(words[1])
                                            : of_integer(words[1], type);
    return {handler, {1}, {bits, bits}};
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
