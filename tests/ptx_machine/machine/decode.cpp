// Instructions: which handler, and where its operands are.
#include <algorithm>

#include "parser.h"

namespace ptx {
namespace {

// Hints that change no result.
bool is_cache_hint(const std::string& word) {
  static const std::vector<std::string> hints = {"ca", "cg", "cs", "lu", "wb", "wt"};
  return std::find(hints.begin(), hints.end(), word) != hints.end() || word.compare(0, 4, "L1::") == 0 ||
         word.compare(0, 4, "L2::") == 0;
}

void drop_cache_hints(std::vector<std::string>& words) {
  words.erase(std::remove_if(words.begin() + 1, words.end(), is_cache_hint), words.end());
}

// Takes a word out, if it stands at a place.
bool take_word(std::vector<std::string>& words, size_t at, const std::string& word) {
  if (at >= words.size() || words[at] != word) return false;
  words.erase(words.begin() + static_cast<std::ptrdiff_t>(at));
  return true;
}

int width_of(const Operand& operand, int otherwise) {
  return operand.type == Operand::reg ? operand.value.bits : otherwise;
}

}  // namespace

void Parser::decode(Instruction& in, const Words& words, const Operands& operands, bool pair) {
  const std::string name = join(words);
  const std::string& family = words[0];
  if (decode_control(in, name, operands)) {
  } else if (family == "mma") {
    decode_mma(in, name, operands);
  } else if (family == "ldmatrix") {
    decode_ldmatrix(in, words, operands);
  } else if (family == "cp") {
    decode_async_copy(in, name, words, operands);
  } else if (family == "ld" || family == "st") {
    decode_memory(in, words, operands);
  } else if (family == "mov" && words.size() == 2 && bits_of(words[1]) > 1) {
    decode_move(in, bits_of(words[1]), operands);
  } else if (family == "cvta") {
    bind(in, {address_conversion(words), {64}, {64}}, operands, pair);
  } else if (family == "cvt" && words.size() > 2 && operands.size() > 1) {
    const int target_bits = std::max(16, bits_of(words[words.size() - 2]));
    const int source_bits = std::max(16, bits_of(words.back()));
    bind(in, conversion(words, width_of(operands[0], target_bits), width_of(operands[1], source_bits)), operands, pair);
  } else if (const Signature exchanged = exchange(words)) {
    bind(in, exchanged, operands, pair);
  } else if (const Signature compared = comparison(words, pair)) {
    bind(in, compared, operands, pair);
  } else if (const Signature bits = bitwise(words)) {
    bind(in, bits, operands, pair);
  } else if (const Signature computed = arithmetic(words)) {
    bind(in, computed, operands, pair);
  } else {
    reject(name);
  }
  if (in.kind == Kind::warp && in.guard >= 0) reject("a guard of an instruction of the whole warp");
}

bool Parser::decode_control(Instruction& in, const std::string& name, const Operands& operands) {
  const auto none = [&](Kind kind) {
    if (!operands.empty()) reject("operands of " + name);
    in.kind = kind;
    return true;
  };
  if (name == "bra" || name == "bra.uni") {
    if (operands.size() != 1 || operands[0].type != Operand::name) reject("where to branch");
    if (name == "bra.uni" && in.guard >= 0) reject("a guarded bra.uni");
    in.kind = Kind::branch;
    jumps_.emplace_back(entry_->code.size(), operands[0].text);
    return true;
  }
  if (name == "ret" || name == "exit") return none(Kind::exit);
  if (name == "trap") return none(Kind::trap);
  if (name == "bar.sync" || name == "barrier.sync" || name == "barrier.sync.aligned") {
    if (operands.size() != 1 || operands[0].type != Operand::number || operands[0].bits != 0) reject("a named barrier");
    if (in.guard >= 0) reject("a guarded barrier");
    in.kind = Kind::barrier;
    return true;
  }
  const bool is_wait = name == "griddepcontrol.wait";
  if (is_wait || name == "griddepcontrol.launch_dependents") {
    if (entry_->architecture < 90) reject(name + " below sm_90");
    if (is_wait && in.guard >= 0) reject("a guarded wait");
    return none(is_wait ? Kind::wait : Kind::trigger);
  }
  return false;
}

void Parser::decode_mma(Instruction& in, const std::string& name, const Operands& operands) {
  in.kind = Kind::warp;
  in.handler = mma_of(name);
  constexpr size_t kSizes[] = {4, 4, 2, 4};  // registers of D, A, B and C
  if (!in.handler || operands.size() != 4) reject(name);
  uint32_t* slot = in.operand;
  for (size_t matrix = 0; matrix < 4; ++matrix) {
    if (operands[matrix].parts.size() != kSizes[matrix]) reject("the size of a matrix");
    for (const Operand& part : operands[matrix].parts) *slot++ = matrix == 0 ? target(part, 32) : source(part, 32);
  }
}

// ldmatrix.sync.aligned.m8n8.x4[.trans].shared.b16
void Parser::decode_ldmatrix(Instruction& in, const Words& words, const Operands& operands) {
  Words rest = words;
  const bool transposed = take_word(rest, 5, "trans");
  const int matrices = rest.size() > 4 && rest[4].size() == 2 && rest[4][0] == 'x' ? rest[4][1] - '0' : 0;
  const std::string wanted = "ldmatrix.sync.aligned.m8n8.x" + std::to_string(matrices) + ".shared";
  in.kind = Kind::warp;
  in.handler = ldmatrix_of(matrices, transposed);
  if ((join(rest) != wanted + ".b16" && join(rest) != wanted + "::cta.b16") || !in.handler) reject(join(words));
  const bool vector = operands.size() == 2 && operands[0].type == Operand::vector;
  if (!vector || static_cast<int>(operands[0].parts.size()) != matrices) reject("operands of ldmatrix");
  for (int i = 0; i < matrices; ++i) in.operand[i] = target(operands[0].parts[static_cast<size_t>(i)], 32);
  bind_address(in, operands[1], matrices);
  if (in.address_64) reject("a 64-bit address of shared memory");
}

void Parser::decode_async_copy(Instruction& in, const std::string& name, Words words, const Operands& operands) {
  const auto number = [&](size_t i) {
    if (i >= operands.size() || operands[i].type != Operand::number) reject("a number of " + name);
    return static_cast<int64_t>(operands[i].bits);
  };
  if (name == "cp.async.commit_group" || name == "cp.async.wait_all") {
    if (!operands.empty()) reject("operands of " + name);
    in.handler = name == "cp.async.wait_all" ? async_copy_wait_all : async_copy_commit;
    return;
  }
  if (name == "cp.async.wait_group") {
    in.handler = async_copy_wait;
    in.immediate = number(0);
    if (operands.size() != 1) reject("operands of " + name);
    return;
  }
  const std::string cache = words.size() > 2 ? words[2] : "";
  drop_cache_hints(words);
  const std::string rest = join(words);
  if (rest != "cp.async.shared.global" && rest != "cp.async.shared::cta.global") reject(name);
  const int64_t size = number(2);
  // .cg goes past L1 and takes 16 bytes only.
  if (operands.size() < 3 || operands.size() > 4 || (cache == "cg" ? size != 16 : cache != "ca")) reject(name);
  in.handler = async_copy_of(static_cast<int>(size));
  if (!in.handler) reject("size of " + name);
  bind_address(in, operands[1], 1);
  if (!in.address_64) reject("a 32-bit address of global memory");
  in.second_immediate = in.immediate;
  bind_address(in, operands[0], 0);
  if (in.address_64) reject("a 64-bit address of shared memory");
  in.operand[2] = operands.size() == 4 ? source(operands[3], 32) : constant(static_cast<uint64_t>(size), 32);
}

// ld.global.nc.v4.u32, st.shared.f32, ld.param.b64, ...
void Parser::decode_memory(Instruction& in, Words words, const Operands& operands) {
  const std::string name = join(words);
  const bool load = words[0] == "ld";
  drop_cache_hints(words);
  std::string space = "generic";
  for (const char* known : {"global", "shared", "param"}) {
    if (take_word(words, 1, known)) space = known;
  }
  if (take_word(words, 1, "shared::cta")) space = "shared";
  in.non_coherent = space == "global" && load && take_word(words, 1, "nc");
  const int vector = take_word(words, 1, "v2") ? 2 : take_word(words, 1, "v4") ? 4 : 1;
  if (words.size() != 2 || operands.size() != 2) reject(name);
  const std::string& type = words[1];
  const Operand& data = operands[load ? 0 : 1];
  const Operands registers = vector > 1 ? data.parts : Operands{data};
  if ((data.type == Operand::vector) != (vector > 1) || static_cast<int>(registers.size()) != vector) reject("vector");
  bind_address(in, operands[load ? 1 : 0], 0);
  int width = 0;
  for (const Operand& part : registers) width = std::max(width, width_of(part, std::max(16, bits_of(type))));
  if (type[0] == 'f' && width != bits_of(type)) reject("the width of a float's register");
  for (size_t i = 0; i < registers.size(); ++i) {
    in.operand[1 + i] = load ? target(registers[i], width) : source(registers[i], width);
  }
  in.handler = memory_of(load, space, type, vector, width);
  if (!in.handler) reject(name);
}

void Parser::decode_move(Instruction& in, int bits, const Operands& operands) {
  if (operands.size() != 2) reject("operands of mov");
  const bool pack = operands[1].type == Operand::vector, unpack = operands[0].type == Operand::vector;
  if (pack && unpack) reject("mov of a vector to a vector");
  const Operands& parts = operands[pack ? 1 : 0].parts;
  const int count = static_cast<int>(parts.size());
  if (!pack && !unpack) {
    in.handler = move_of(bits);
    in.operand[0] = target(operands[0], bits);
    in.operand[1] = source(operands[1], bits);
  } else if (pack) {
    in.handler = pack_of(bits, count);
    if (!in.handler) reject("mov from such a vector");
    in.operand[0] = target(operands[0], bits);
    for (int i = 0; i < count; ++i) in.operand[1 + i] = source(parts[static_cast<size_t>(i)], bits / count);
  } else {
    in.handler = unpack_of(bits, count);
    if (!in.handler) reject("mov to such a vector");
    for (int i = 0; i < count; ++i) in.operand[i] = target(parts[static_cast<size_t>(i)], bits / count);
    in.operand[count] = source(operands[1], bits);
  }
  if (!in.handler) reject("mov");
}

void Parser::bind_address(Instruction& in, const Operand& memory, int slot) {
  if (memory.type != Operand::address) reject("address");
  const Operand& base = memory.parts[0];
  in.address_64 = base.type != Operand::reg || base.value.bits == 64;
  in.operand[slot] = source(base, in.address_64 ? 64 : 32);
  in.immediate = memory.offset;
}

void Parser::bind(Instruction& in, const Signature& signature, const Operands& operands, bool pair) {
  if (!signature) reject("such an instruction");
  in.handler = signature.handler;
  in.kind = signature.kind;
  in.immediate = signature.immediate;
  uint32_t* slot = in.operand;
  size_t given = 0;
  for (size_t i = 0; i < signature.targets.size(); ++i) {
    const bool absent = i == 1 && signature.optional_predicate && !pair;
    if (!absent && given == operands.size()) reject("too few operands");
    *slot++ = absent ? make_register(1).offset : target(operands[given++], signature.targets[i]);
  }
  if (pair && !signature.optional_predicate) reject("two targets");
  if (operands.size() - given != signature.sources.size()) reject("the number of operands");
  for (const int bits : signature.sources) *slot++ = source(operands[given++], bits);
}

}  // namespace ptx
