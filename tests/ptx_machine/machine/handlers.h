// What instructions do: by the parts of their names, the handler and the operands that it wants. No handler where there
// is no such instruction, or none that the kernels have needed so far.
#pragma once

#include "program.h"

namespace ptx {

struct Signature {
  Handler handler = nullptr;
  std::vector<int> targets, sources;  // widths in bits, 1 of a predicate
  bool optional_predicate = false;    // the second target may be absent
  Kind kind = Kind::lanes;
  int64_t immediate = 0;

  explicit operator bool() const { return handler != nullptr; }
};

using Words = std::vector<std::string>;

Signature arithmetic(const Words& words);  // arithmetic.cpp
Signature bitwise(const Words& words);     // bitwise.cpp
// setp, selp, slct, logic of predicates. `pair`: there are two targets. comparison.cpp.
Signature comparison(const Words& words, bool pair);
// `widths`: of the registers, of the target first; they may be wider than the types.
Signature conversion(const Words& words, int target_width, int source_width);  // conversion.cpp
Signature exchange(const Words& words);                                        // exchange.cpp: shfl, vote, match, ...

// Moves between a register of `bits` and a vector of registers. conversion.cpp. Operands: targets, then sources.
Handler pack_of(int bits, int parts);
Handler unpack_of(int bits, int parts);
Handler move_of(int bits);

// memory_handlers.cpp. Loads and stores of a type through registers of `width` bits: operand 0 is the address, then
// data.
Handler memory_of(bool load, const std::string& space, const std::string& type, int vector, int width);
Handler address_conversion(const Words& words);
// Operands: target and source address, the bytes that are read; immediate and second_immediate: the target's and the
// source's offset. The size is copied.
Handler async_copy_of(int size);
void async_copy_commit(Warp&, const Instruction&, uint32_t);
void async_copy_wait(Warp&, const Instruction&, uint32_t);  // immediate: how many groups may be in flight
void async_copy_wait_all(Warp&, const Instruction&, uint32_t);

// tensor.cpp. Operands of mma: targets, then A, B and C; of ldmatrix: targets, then the address.
Handler mma_of(const std::string& name);
Handler ldmatrix_of(int matrices, bool transposed);

}  // namespace ptx
