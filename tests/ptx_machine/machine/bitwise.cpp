// Instructions on bits.
#include <bit>

#include "elementwise.h"

namespace ptx {
namespace {

struct And {
  template <class T>
  static T f(T a, T b) {
    return static_cast<T>(a & b);
  }
};
struct Or {
  template <class T>
  static T f(T a, T b) {
    return static_cast<T>(a | b);
  }
};
struct Xor {
  template <class T>
  static T f(T a, T b) {
    return static_cast<T>(a ^ b);
  }
};
struct Not {
  template <class T>
  static T f(T a) {
    return static_cast<T>(~a);
  }
};
struct LogicalNot {
  template <class T>
  static T f(T a) {
    return a == 0;
  }
};
// Amounts beyond the width are taken for the width.
struct ShiftLeft {
  template <class T>
  static T f(T a, uint32_t amount) {
    return amount >= kBits<T> ? T(0) : static_cast<T>(static_cast<uint64_t>(a) << amount);
  }
};
struct ShiftRight {
  template <class T>
  static T f(T a, uint32_t amount) {
    if constexpr (std::is_signed_v<T>) return static_cast<T>(a >> (amount >= kBits<T> ? kBits<T> - 1 : amount));
    return amount >= kBits<T> ? T(0) : static_cast<T>(a >> amount);
  }
};

// shf: 32 bits of the 64 of b and a. wrap takes the amount modulo 32, clamp at most 32.
template <bool left, bool wrap>
struct FunnelShift {
  static uint32_t f(uint32_t a, uint32_t b, uint32_t c) {
    const uint32_t amount = wrap ? c & 31 : c > 32 ? 32 : c;
    const uint64_t both = uint64_t{b} << 32 | a;
    if (left) return amount == 32 ? a : static_cast<uint32_t>(both << amount >> 32);
    return amount == 32 ? b : static_cast<uint32_t>(both >> amount);
  }
};

struct Reverse {
  template <class T>
  static T f(T a) {
    T reversed = 0;
    for (int i = 0; i < kBits<T>; ++i) reversed |= (a >> i & T(1)) << (kBits<T> - 1 - i);
    return reversed;
  }
};
struct Count {
  template <class T>
  static uint32_t f(T a) {
    return static_cast<uint32_t>(std::popcount(a));
  }
};
struct LeadingZeros {
  template <class T>
  static uint32_t f(T a) {
    return static_cast<uint32_t>(std::countl_zero(a));
  }
};
// The place of the highest bit that is not the sign, or, as_shift, how far it is from the top.
template <bool as_shift>
struct Find {
  template <class T>
  static uint32_t f(T a) {
    const auto bits = static_cast<std::make_unsigned_t<T>>(a < 0 ? ~a : a);
    if (bits == 0) return 0xFFFFFFFFu;
    const uint32_t zeros = static_cast<uint32_t>(std::countl_zero(bits));
    return as_shift ? zeros : kBits<T> - 1 - zeros;
  }
};

// bfe: the low bytes of b and c say where a field starts and how long it is; beyond the top it repeats the sign.
struct Extract {
  template <class T>
  static T f(T a, uint32_t b, uint32_t c) {
    const uint32_t first = b & 255, length = c & 255, top = kBits<T> - 1;
    const uint32_t last = first + length - 1 < top ? first + length - 1 : top;
    const T sign = std::is_signed_v<T> && length ? a >> last & T(1) : 0;
    T field = 0;
    for (uint32_t i = 0; i <= top; ++i) {
      const bool inside = i < length && first + i <= top;
      const uint64_t bit = static_cast<uint64_t>(inside ? a >> (first + i) & T(1) : sign);
      field = static_cast<T>(field | static_cast<T>(bit << i));
    }
    return field;
  }
};

// bfi: b with the low bits of a in a field.
template <class T>
void insert(Warp& warp, const Instruction& in, uint32_t lanes) {
  const T *a = lanes_of<T>(warp, in.operand[1]), *b = lanes_of<T>(warp, in.operand[2]);
  const uint32_t *c = lanes_of<uint32_t>(warp, in.operand[3]), *d = lanes_of<uint32_t>(warp, in.operand[4]);
  T* out = lanes_of<T>(warp, in.operand[0]);
  for_each_lane(lanes, [&](int lane) {
    const uint32_t first = c[lane] & 255, length = d[lane] & 255;
    T field = b[lane];
    for (uint32_t i = 0; i < length && first + i < kBits<T>; ++i) {
      const T bit = T(1) << (first + i);
      field = (field & ~bit) | (a[lane] >> i & T(1) ? bit : T(0));
    }
    out[lane] = field;
  });
}

// prmt: four bytes of the eight of b and a; bit 3 of a selector spreads the byte's sign.
struct Permute {
  static uint32_t f(uint32_t a, uint32_t b, uint32_t selectors) {
    const uint64_t both = uint64_t{b} << 32 | a;
    uint32_t out = 0;
    for (int i = 0; i < 4; ++i) {
      const uint32_t selector = selectors >> 4 * i & 15;
      uint32_t byte = static_cast<uint32_t>(both >> 8 * (selector & 7)) & 255;
      if (selector & 8) byte = byte & 128 ? 255 : 0;
      out |= byte << 8 * i;
    }
    return out;
  }
};

// lop3: the table says what becomes of the bits of a, b and c.
void lookup(Warp& warp, const Instruction& in, uint32_t lanes) {
  uint32_t* d = lanes_of<uint32_t>(warp, in.operand[0]);
  const uint32_t* given[4];
  for (int i = 0; i < 4; ++i) given[i] = lanes_of<uint32_t>(warp, in.operand[1 + i]);
  for_each_lane(lanes, [&](int lane) {
    const uint32_t a = given[0][lane], b = given[1][lane], c = given[2][lane], table = given[3][lane];
    uint32_t out = 0;
    for (uint32_t row = 0; row < 8; ++row) {
      if (table >> row & 1) out |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
    }
    d[lane] = out;
  });
}

template <class T>
Signature of_bits(const std::string& family) {
  constexpr int kWidth = kBits<T>;
  if (family == "and") return binary_signature<T, And>();
  if (family == "or") return binary_signature<T, Or>();
  if (family == "xor") return binary_signature<T, Xor>();
  if (family == "not") return unary_signature<T, Not>();
  if (family == "cnot") return unary_signature<T, LogicalNot>();
  if (family == "shl") return {binary<T, T, uint32_t, ShiftLeft>, {kWidth}, {kWidth, 32}};
  if constexpr (sizeof(T) >= 4) {
    if (family == "brev") return unary_signature<T, Reverse>();
    if (family == "popc") return {unary<uint32_t, T, Count>, {32}, {kWidth}};
    if (family == "clz") return {unary<uint32_t, T, LeadingZeros>, {32}, {kWidth}};
    if (family == "bfi") return {insert<T>, {kWidth}, {kWidth, kWidth, 32, 32}};
  }
  return {};
}

}  // namespace

Signature bitwise(const Words& words) {
  if (words.size() < 2) return {};
  const std::string &family = words[0], &type = words.back(), how = middle(words);
  if (family == "shf" && type == "b32") {
    const auto make = [](Handler handler) { return Signature{handler, {32}, {32, 32, 32}}; };
    using U = uint32_t;
    if (how == "l.wrap") return make(ternary<U, U, U, U, FunnelShift<true, true>>);
    if (how == "l.clamp") return make(ternary<U, U, U, U, FunnelShift<true, false>>);
    if (how == "r.wrap") return make(ternary<U, U, U, U, FunnelShift<false, true>>);
    if (how == "r.clamp") return make(ternary<U, U, U, U, FunnelShift<false, false>>);
    return {};
  }
  if (family == "bfind" && (how.empty() || how == "shiftamt") && type[0] != 'b') {
    return with_integer(type, [&](auto value) -> Signature {
      using T = decltype(value);
      if (sizeof(T) < 4) return {};
      return {how.empty() ? unary<uint32_t, T, Find<false>> : unary<uint32_t, T, Find<true>>, {32}, {kBits<T>}};
    });
  }
  if (!how.empty()) return {};
  if (family == "shr") {
    return with_integer(type, [](auto value) -> Signature {
      using T = decltype(value);
      return {binary<T, T, uint32_t, ShiftRight>, {kBits<T>}, {kBits<T>, 32}};
    });
  }
  if (family == "bfe" && type[0] != 'b') {
    return with_integer(type, [](auto value) -> Signature {
      using T = decltype(value);
      if (sizeof(T) < 4) return {};
      return {ternary<T, T, uint32_t, uint32_t, Extract>, {kBits<T>}, {kBits<T>, 32, 32}};
    });
  }
  if (family == "prmt" && type == "b32") return ternary_signature<uint32_t, Permute>();
  if (family == "lop3" && type == "b32") return {lookup, {32}, {32, 32, 32, 32}};
  if (type == "b16") return of_bits<uint16_t>(family);
  if (type == "b32") return of_bits<uint32_t>(family);
  if (type == "b64") return of_bits<uint64_t>(family);
  return {};
}

}  // namespace ptx
