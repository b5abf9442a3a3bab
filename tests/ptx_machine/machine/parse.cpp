// Modules, entries, registers and operands. What nvcc has not made of the kernels so far is an error.
#include <algorithm>
#include <cctype>

#include "parser.h"

namespace ptx {
namespace {

bool is_digit(char c) { return std::isdigit(static_cast<unsigned char>(c)); }
bool is_word(const std::string& text) { return std::isalnum(static_cast<unsigned char>(text.back())); }

}  // namespace

// ------------------------------------------------------------------------------------------------ words

void Parser::reject(const std::string& what) const {
  fail("PTX line " + std::to_string(tokens_[std::min(at_, tokens_.size() - 1)].line) + ": not understood: " + what);
}
const std::string& Parser::peek(size_t ahead) const {
  if (at_ + ahead >= tokens_.size()) reject("the end");
  return tokens_[at_ + ahead].text;
}
std::string Parser::next() {
  std::string word = peek();
  ++at_;
  return word;
}
void Parser::expect(const std::string& word) {
  if (peek() != word) reject("'" + peek() + "' where '" + word + "' should be");
  ++at_;
}

// ------------------------------------------------------------------------------------------------ modules

std::vector<std::unique_ptr<Entry>> Parser::module() {
  std::vector<std::unique_ptr<Entry>> entries;
  int architecture = 0;
  while (at_ < tokens_.size()) {
    const std::string word = next();
    if (word == ".version") {
      next();
    } else if (word == ".address_size") {
      expect("64");
    } else if (word == ".target") {
      const std::string target = next();
      if (target.compare(0, 3, "sm_") != 0) reject("target " + target);
      architecture = std::stoi(target.substr(3));
    } else if (word == ".extern") {
      external_shared();
    } else if (word == ".entry") {
      entries.push_back(entry(architecture));
    } else if (word != ".visible" && word != ".weak") {
      reject("module directive " + word);
    }
  }
  return entries;
}

// .extern .shared .align 128 .b8 name[];
void Parser::external_shared() {
  expect(".shared");
  expect(".align");
  if (kSharedBase % std::stoul(next())) reject("an alignment that shared memory does not start with");
  expect(".b8");
  shared_symbols_.push_back(next());
  for (const char* word : {"[", "]", ";"}) expect(word);
}

std::unique_ptr<Entry> Parser::entry(int architecture) {
  auto out = std::make_unique<Entry>();
  entry_ = out.get();
  entry_->architecture = architecture;
  entry_->name = next();
  labels_.clear(), jumps_.clear(), constants_.clear(), scopes_.clear();
  parameters();
  attributes();
  expect("{");
  scopes_.emplace_back();
  while (!scopes_.empty()) statement();
  for (const auto& [instruction, label] : jumps_) {
    if (!labels_.count(label)) fail("no label " + label + " in " + entry_->name);
    entry_->code[instruction].target = labels_[label];
  }
  if (entry_->code.empty()) fail(entry_->name + " is empty");
  const Instruction& last = entry_->code.back();
  const bool ends = last.kind == Kind::exit || last.kind == Kind::branch || last.kind == Kind::trap;
  if (!ends || last.guard >= 0) fail(entry_->name + " runs off its end");
  return out;
}

// (.param .u64 a, .param .align 8 .b8 b[160])
void Parser::parameters() {
  expect("(");
  while (peek() != ")") {
    if (!entry_->parameters.empty()) expect(",");
    expect(".param");
    uint32_t alignment = 1, bytes = 0;
    while (peek()[0] == '.') {
      const std::string word = next();
      if (word == ".align") {
        alignment = static_cast<uint32_t>(std::stoul(next()));
      } else if (bits_of(word.substr(1)) >= 8) {
        bytes = static_cast<uint32_t>(bits_of(word.substr(1)) / 8);
      } else {
        reject("parameter directive " + word);
      }
    }
    alignment = std::max(alignment, bytes);
    const std::string name = next();
    if (peek() == "[") {
      next();
      bytes *= static_cast<uint32_t>(std::stoul(next()));
      expect("]");
    }
    if (bytes == 0) reject("the type of parameter " + name);
    const uint32_t offset = (entry_->param_bytes + alignment - 1) / alignment * alignment;
    entry_->parameters.push_back({name, offset, bytes});
    entry_->param_bytes = offset + bytes;
  }
  expect(")");
}

void Parser::attributes() {
  while (peek() != "{") {
    const std::string word = next();
    if (word == ".maxntid" || word == ".reqntid") {
      entry_->max_threads = std::stoul(next());
      while (peek() == ",") {
        next();
        entry_->max_threads *= std::stoul(next());
      }
    } else if (word == ".minnctapersm" || word == ".maxnreg") {
      next();
    } else {
      reject("entry directive " + word);
    }
  }
}

void Parser::statement() {
  if (peek() == "{") {
    next();
    scopes_.emplace_back();
  } else if (peek() == "}") {
    next();
    scopes_.pop_back();
  } else if (peek() == ".reg") {
    next();
    registers();
  } else if (peek() == ".pragma") {
    while (next() != ";") {
    }
  } else if (peek(1) == ":") {
    labels_[next()] = static_cast<int32_t>(entry_->code.size());
    next();
  } else {
    instruction();
  }
}

// .reg .b32 %r<7>; or .reg .pred p, q;
void Parser::registers() {
  const int bits = bits_of(next().substr(1));
  if (bits == 0 || bits == 8) reject("register type");
  do {
    const std::string name = next();
    if (peek() == "<") {
      next();
      const int count = std::stoi(next());
      expect(">");
      for (int i = 0; i < count; ++i) scopes_.back()[name + std::to_string(i)] = make_register(bits);
    } else {
      scopes_.back()[name] = make_register(bits);
    }
  } while (next() == ",");
}

void Parser::instruction() {
  Instruction in;
  in.line = tokens_[at_].line;
  const size_t first = at_;
  if (peek() == "@") {
    next();
    in.guard_negated = peek() == "!";
    if (in.guard_negated) next();
    const Register* guard = find(next());
    if (!guard || guard->bits != 1) reject("guard");
    in.guard = static_cast<int32_t>(guard->offset);
  }
  const std::string name = next();
  std::vector<Operand> operands;
  bool pair = false;  // d|p: two targets
  while (peek() != ";") {
    operands.push_back(operand());
    if (peek() == ";") break;
    const std::string separator = next();
    if (separator == "|" && operands.size() == 1) {
      pair = true;
    } else if (separator != ",") {
      reject("'" + separator + "' between operands");
    }
  }
  expect(";");
  for (size_t i = first; i + 1 < at_; ++i) {
    const std::string& word = tokens_[i].text;
    const bool apart = i > first && is_word(tokens_[i - 1].text) && (is_word(word) || word == "[" || word == "{");
    in.text += (apart ? " " : "") + word;
  }
  decode(in, split(name), operands, pair);
  entry_->code.push_back(std::move(in));
}

// ------------------------------------------------------------------------------------------------ registers

Register Parser::make_register(int bits) {
  const uint32_t bytes = bits == 1 ? 4 : static_cast<uint32_t>(kLanes * bits / 8);
  const uint32_t offset = entry_->file_bytes;
  entry_->file_bytes += (bytes + kFileAlignment - 1) / kFileAlignment * kFileAlignment;
  return {offset, bits};
}

const Register* Parser::find(const std::string& name) const {
  for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
    if (const auto found = scope->find(name); found != scope->end()) return &found->second;
  }
  return nullptr;
}

Register Parser::special(const std::string& name) {
  static const std::vector<std::string> known = {
      "%tid.x",   "%tid.y",       "%tid.z",       "%ntid.x",      "%ntid.y",      "%ntid.z",
      "%ctaid.x", "%ctaid.y",     "%ctaid.z",     "%nctaid.x",    "%nctaid.y",    "%nctaid.z",
      "%laneid",  "%lanemask_eq", "%lanemask_lt", "%lanemask_le", "%lanemask_gt", "%lanemask_ge"};
  if (std::find(known.begin(), known.end(), name) == known.end()) reject("register " + name);
  if (!entry_->special.count(name)) entry_->special[name] = make_register(32).offset;
  return {entry_->special[name], 32};
}

uint32_t Parser::constant(uint64_t bits, int width) {
  if (width < 64) bits &= (uint64_t{1} << width) - 1;
  const auto key = std::make_pair(bits, width);
  if (const auto found = constants_.find(key); found != constants_.end()) return found->second;
  const uint32_t offset = make_register(width).offset;
  if (width == 1) {
    entry_->constants.push_back({offset, 1, 4, bits ? kAllLanes : 0});
  } else {
    entry_->constants.push_back({offset, kLanes, width / 8, bits});
  }
  return constants_[key] = offset;
}

// ------------------------------------------------------------------------------------------------ operands

Operand Parser::operand() {
  if (peek() == "{") return vector_operand();
  if (peek() == "[") return address_operand();
  if (peek() == "!") return negated_operand();
  const bool minus = peek() == "-";
  if (minus) next();
  const std::string word = next();
  if (is_digit(word[0])) return number_operand(word, minus);
  if (minus) reject("-" + word);
  Operand out{};
  if (word == "_") {
    out.type = Operand::sink;
  } else if (const Register* found = find(word)) {
    out.type = Operand::reg;
    out.value = *found;
  } else if (word[0] == '%') {
    out.type = Operand::reg;
    out.value = special(word);
  } else {
    out.type = Operand::name;
    out.text = word;
  }
  return out;
}

// !p: the negation is an instruction of its own, into a register that nobody else knows.
Operand Parser::negated_operand() {
  expect("!");
  Instruction negation;
  negation.line = tokens_[at_].line;
  negation.text = "!" + peek();
  const uint32_t predicate = source(operand(), 1);
  Operand out{};
  out.type = Operand::reg;
  out.value = make_register(1);
  negation.handler = comparison({"not", "pred"}, false).handler;
  negation.operand[0] = out.value.offset;
  negation.operand[1] = predicate;
  entry_->code.push_back(std::move(negation));
  return out;
}

Operand Parser::vector_operand() {
  Operand out{};
  out.type = Operand::vector;
  expect("{");
  out.parts.push_back(operand());
  while (peek() == ",") {
    next();
    out.parts.push_back(operand());
  }
  expect("}");
  return out;
}

// [base], [base+8], [base+-8]
Operand Parser::address_operand() {
  Operand out{};
  out.type = Operand::address;
  expect("[");
  out.parts.push_back(operand());
  while (peek() == "+" || peek() == "-") {
    bool minus = false;
    while (peek() == "+" || peek() == "-") minus ^= next() == "-";
    const int64_t value = static_cast<int64_t>(std::stoull(next(), nullptr, 0));
    out.offset += minus ? -value : value;
  }
  expect("]");
  return out;
}

// 7, 0x7, 7U, 0f3F800000, 0d3FF0000000000000
Operand Parser::number_operand(const std::string& word, bool minus) {
  Operand out{};
  const char kind = word.size() > 2 && word[0] == '0' ? static_cast<char>(std::tolower(word[1])) : ' ';
  if (kind == 'f' || kind == 'd') {
    out.type = Operand::real;
    out.width = kind == 'f' ? 32 : 64;
    if (word.size() != 2u + static_cast<unsigned>(out.width) / 4 || minus) reject("number " + word);
    out.bits = std::stoull(word.substr(2), nullptr, 16);
  } else {
    out.type = Operand::number;
    size_t used = 0;
    out.bits = std::stoull(word, &used, 0);
    if (used != word.size() && word.substr(used) != "U") reject("number " + word);
    if (minus) out.bits = -out.bits;
  }
  return out;
}

uint32_t Parser::source(const Operand& operand, int bits) {
  switch (operand.type) {
    case Operand::reg:
      if (operand.value.bits != bits) {
        reject("a register of " + std::to_string(operand.value.bits) + " bits where " + std::to_string(bits) +
               " are wanted");
      }
      return operand.value.offset;
    case Operand::number:
      return constant(operand.bits, bits);
    case Operand::real:
      if (operand.width != bits) reject("a real of another width");
      return constant(operand.bits, bits);
    case Operand::name:
      for (const Parameter& parameter : entry_->parameters) {
        if (operand.text == parameter.name) return constant(kParamBase + parameter.offset, bits);
      }
      if (std::find(shared_symbols_.begin(), shared_symbols_.end(), operand.text) != shared_symbols_.end()) {
        return constant(kSharedBase, bits);
      }
      reject("name " + operand.text);
    default:
      reject("operand");
  }
}

uint32_t Parser::target(const Operand& operand, int bits) {
  if (operand.type == Operand::sink) return make_register(bits).offset;
  if (operand.type != Operand::reg || operand.value.bits != bits) reject("target");
  return operand.value.offset;
}

std::vector<std::unique_ptr<Entry>> parse(const std::string& text) { return Parser(text).module(); }

}  // namespace ptx
