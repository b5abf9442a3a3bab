// From PTX text to decoded instructions. parse.cpp knows modules, registers and operands, decode.cpp instructions.
#pragma once

#include "handlers.h"
#include "program.h"
#include "tokens.h"

namespace ptx {

struct Register {
  uint32_t offset;  // in the register file
  int bits;         // 1 of predicates
};

struct Operand {
  enum Type { reg, number, real, name, vector, address, sink } type;
  Register value{};   // reg
  uint64_t bits = 0;  // number; real, of `width` bits
  int width = 0;
  std::string text;              // name
  std::vector<Operand> parts{};  // vector; address: the base
  int64_t offset = 0;            // address
};

class Parser {
 public:
  explicit Parser(const std::string& text) : tokens_(tokens_of(text)) {}
  std::vector<std::unique_ptr<Entry>> module();

 private:
  // Words.
  [[noreturn]] void reject(const std::string& what) const;
  const std::string& peek(size_t ahead = 0) const;
  std::string next();
  void expect(const std::string& word);

  // Modules and what is in them.
  std::unique_ptr<Entry> entry(int architecture);
  void external_shared();
  void parameters();
  void attributes();
  void statement();
  void registers();
  void instruction();

  // Registers and operands.
  Register make_register(int bits);
  const Register* find(const std::string& name) const;
  Register special(const std::string& name);
  uint32_t constant(uint64_t bits, int width);
  Operand operand();
  Operand number_operand(const std::string& word, bool minus);
  Operand negated_operand();
  Operand address_operand();
  Operand vector_operand();
  // The offsets of operands of a width; anything else is rejected.
  uint32_t source(const Operand& operand, int bits);
  uint32_t target(const Operand& operand, int bits);

  // Instructions.
  using Operands = std::vector<Operand>;
  void decode(Instruction& in, const Words& words, const Operands& operands, bool pair);
  bool decode_control(Instruction& in, const std::string& name, const Operands& operands);
  void decode_mma(Instruction& in, const std::string& name, const Operands& operands);
  void decode_ldmatrix(Instruction& in, const Words& words, const Operands& operands);
  void decode_async_copy(Instruction& in, const std::string& name, Words words, const Operands& operands);
  void decode_memory(Instruction& in, Words words, const Operands& operands);
  void decode_move(Instruction& in, int bits, const Operands& operands);
  void bind(Instruction& in, const Signature& signature, const Operands& operands, bool pair);
  void bind_address(Instruction& in, const Operand& memory, int slot);

  std::vector<Token> tokens_;
  size_t at_ = 0;
  Entry* entry_ = nullptr;
  std::vector<std::map<std::string, Register>> scopes_;
  std::map<std::string, int32_t> labels_;
  std::vector<std::pair<size_t, std::string>> jumps_;  // instruction, label
  std::map<std::pair<uint64_t, int>, uint32_t> constants_;
  std::vector<std::string> shared_symbols_;
};

}  // namespace ptx
