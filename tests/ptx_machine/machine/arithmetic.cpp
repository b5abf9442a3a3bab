// Integers that wrap around, and IEEE floats: neither flushed to zero nor contracted.
#include <bit>
#include <cmath>
#include <limits>

#include "elementwise.h"

namespace ptx {
namespace {

template <class T>
using Unsigned = std::make_unsigned_t<T>;

// Twice as wide.
template <class T>
struct WiderOf;
template <>
struct WiderOf<uint16_t> : std::type_identity<uint32_t> {};
template <>
struct WiderOf<int16_t> : std::type_identity<int32_t> {};
template <>
struct WiderOf<uint32_t> : std::type_identity<uint64_t> {};
template <>
struct WiderOf<int32_t> : std::type_identity<int64_t> {};
template <>
struct WiderOf<uint64_t> : std::type_identity<unsigned __int128> {};
template <>
struct WiderOf<int64_t> : std::type_identity<__int128> {};
template <class T>
using Wider = typename WiderOf<T>::type;

template <class T>
T wrapped_product(T a, T b) {
  using U = std::conditional_t<(sizeof(T) < 4), uint32_t, Unsigned<T>>;
  return static_cast<T>(static_cast<U>(a) * static_cast<U>(b));
}

// `integers` and `floats` are what becomes of a and b.
#define PTX_BINARY(name, integers, floats)   \
  struct name {                              \
    template <class T>                       \
    static T f(T a, T b) {                   \
      if constexpr (std::is_integral_v<T>) { \
        return static_cast<T>(integers);     \
      } else {                               \
        return floats;                       \
      }                                      \
    }                                        \
  }
PTX_BINARY(Add, Unsigned<T>(a) + Unsigned<T>(b), a + b);
PTX_BINARY(Subtract, Unsigned<T>(a) - Unsigned<T>(b), a - b);
PTX_BINARY(Multiply, wrapped_product(a, b), a* b);
PTX_BINARY(Minimum, a < b ? a : b, std::fmin(a, b));
PTX_BINARY(Maximum, a > b ? a : b, std::fmax(a, b));
#undef PTX_BINARY

struct MultiplyHigh {
  template <class T>
  static T f(T a, T b) {
    return static_cast<T>((Wider<T>(a) * Wider<T>(b)) >> kBits<T>);
  }
};
struct MultiplyWide {
  template <class T>
  static Wider<T> f(T a, T b) {
    return Wider<T>(a) * Wider<T>(b);
  }
};
struct MultiplyAdd {
  template <class T>
  static T f(T a, T b, T c) {
    return Add::f(Multiply::f(a, b), c);
  }
};
struct MultiplyHighAdd {
  template <class T>
  static T f(T a, T b, T c) {
    return Add::f(MultiplyHigh::f(a, b), c);
  }
};
struct MultiplyWideAdd {
  template <class T>
  static Wider<T> f(T a, T b, Wider<T> c) {
    return Add::f(MultiplyWide::f(a, b), c);
  }
};
struct Fma {
  template <class T>
  static T f(T a, T b, T c) {
    return std::fma(a, b, c);
  }
};
struct Divide {
  template <class T>
  static T f(T a, T b) {
    if constexpr (std::is_integral_v<T>) {
      if (b == 0) return static_cast<T>(-1);  // not specified
      if (std::is_signed_v<T> && b == static_cast<T>(-1)) return static_cast<T>(Unsigned<T>(0) - Unsigned<T>(a));
    }
    return static_cast<T>(a / b);
  }
};
struct Remainder {
  template <class T>
  static T f(T a, T b) {
    if (b == 0) return a;  // not specified
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return 0;
    return static_cast<T>(a % b);
  }
};
struct Negate {
  template <class T>
  static T f(T a) {
    if constexpr (std::is_integral_v<T>) {
      return static_cast<T>(Unsigned<T>(0) - Unsigned<T>(a));
    } else {
      return -a;
    }
  }
};
struct Absolute {
  template <class T>
  static T f(T a) {
    if constexpr (std::is_integral_v<T>) {
      return a < 0 ? Negate::f(a) : a;
    } else {
      return std::fabs(a);
    }
  }
};
struct SquareRoot {
  template <class T>
  static T f(T a) {
    return std::sqrt(a);
  }
};
struct Reciprocal {
  template <class T>
  static T f(T a) {
    return T(1) / a;
  }
};
struct SumOfDifference {  // sad: c + |a - b|
  template <class T>
  static T f(T a, T b, T c) {
    return static_cast<T>(Unsigned<T>(c) + (a > b ? Unsigned<T>(a) - Unsigned<T>(b) : Unsigned<T>(b) - Unsigned<T>(a)));
  }
};

// add.cc, addc, addc.cc, sub.cc, subc, subc.cc: CC.CF is a carry, or a borrow.
template <class T, bool subtract, bool reads, bool writes>
void with_carry(Warp& warp, const Instruction& in, uint32_t lanes) {
  T* d = lanes_of<T>(warp, in.operand[0]);
  const T *a = lanes_of<T>(warp, in.operand[1]), *b = lanes_of<T>(warp, in.operand[2]);
  for_each_lane(lanes, [&](int lane) {
    using W = unsigned __int128;
    const W carry = reads ? warp.carry >> lane & 1u : 0;
    const W sum = subtract ? W(a[lane]) - W(b[lane]) - carry : W(a[lane]) + W(b[lane]) + carry;
    d[lane] = static_cast<T>(sum);
    if (writes) warp.carry = (warp.carry & ~(1u << lane)) | static_cast<uint32_t>(sum >> kBits<T> & 1u) << lane;
  });
}

template <class T>
Signature carried(const std::string& family, const std::string& how) {
  const std::vector<int> width = {kBits<T>};
  const auto make = [](Handler handler) { return Signature{handler, {kBits<T>}, {kBits<T>, kBits<T>}}; };
  if (family == "add" && how == "cc") return make(with_carry<T, false, false, true>);
  if (family == "addc" && how.empty()) return make(with_carry<T, false, true, false>);
  if (family == "addc" && how == "cc") return make(with_carry<T, false, true, true>);
  if (family == "sub" && how == "cc") return make(with_carry<T, true, false, true>);
  if (family == "subc" && how.empty()) return make(with_carry<T, true, true, false>);
  if (family == "subc" && how == "cc") return make(with_carry<T, true, true, true>);
  return {};
}

template <class T>
Signature of_integer(const std::string& family, const std::string& how) {
  constexpr int kWidth = kBits<T>;
  if (family == "mul" || family == "mad") {
    const bool add = family == "mad";
    if (how == "lo") return add ? ternary_signature<T, MultiplyAdd>() : binary_signature<T, Multiply>();
    if (how == "hi") return add ? ternary_signature<T, MultiplyHighAdd>() : binary_signature<T, MultiplyHigh>();
    if constexpr (sizeof(T) < 8) {
      if (how == "wide" && add) {
        return {ternary<Wider<T>, T, T, Wider<T>, MultiplyWideAdd>, {2 * kWidth}, {kWidth, kWidth, 2 * kWidth}};
      }
      if (how == "wide") return {binary<Wider<T>, T, T, MultiplyWide>, {2 * kWidth}, {kWidth, kWidth}};
    }
    return {};
  }
  if constexpr (sizeof(T) >= 4) {
    if (const Signature found = carried<Unsigned<T>>(family, how)) return found;
  }
  if (!how.empty()) return {};
  if (family == "add") return binary_signature<T, Add>();
  if (family == "sub") return binary_signature<T, Subtract>();
  if (family == "min") return binary_signature<T, Minimum>();
  if (family == "max") return binary_signature<T, Maximum>();
  if (family == "div") return binary_signature<T, Divide>();
  if (family == "rem") return binary_signature<T, Remainder>();
  if (family == "sad") return ternary_signature<T, SumOfDifference>();
  if constexpr (std::is_signed_v<T>) {
    if (family == "neg") return unary_signature<T, Negate>();
    if (family == "abs") return unary_signature<T, Absolute>();
  }
  return {};
}

template <class T>
Signature of_float(const std::string& family, const std::string& how) {
  const bool nearest = how == "rn";
  if (family == "add" && (nearest || how.empty())) return binary_signature<T, Add>();
  if (family == "sub" && (nearest || how.empty())) return binary_signature<T, Subtract>();
  if (family == "mul" && (nearest || how.empty())) return binary_signature<T, Multiply>();
  if (family == "div" && nearest) return binary_signature<T, Divide>();
  if (family == "sqrt" && nearest) return unary_signature<T, SquareRoot>();
  if (family == "rcp" && nearest) return unary_signature<T, Reciprocal>();
  if (family == "fma" && nearest) return ternary_signature<T, Fma>();
  if (!how.empty()) return {};
  if (family == "min") return binary_signature<T, Minimum>();
  if (family == "max") return binary_signature<T, Maximum>();
  if (family == "neg") return unary_signature<T, Negate>();
  if (family == "abs") return unary_signature<T, Absolute>();
  return {};
}

}  // namespace

Signature arithmetic(const Words& words) {
  if (words.size() < 2) return {};
  const std::string& type = words.back();
  if (type == "f32") return of_float<float>(words[0], middle(words));
  if (type == "f64") return of_float<double>(words[0], middle(words));
  if (type[0] == 'b') return {};
  return with_integer(type, [&](auto value) { return of_integer<decltype(value)>(words[0], middle(words)); });
}

}  // namespace ptx
