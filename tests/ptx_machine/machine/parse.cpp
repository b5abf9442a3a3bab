// PTX text to decoded instructions. Exactly what the kernels' modules contain; everything else is an error.
#include <bit>
#include <cctype>
#include <cstring>

#include "ops.h"
#include "ptx.h"

namespace ptx {
namespace {

struct Token {
  std::string text;
  int line;
};

std::vector<Token> tokens_of(const std::string& s) {
  std::vector<Token> out;
  int line = 1;
  const auto word = [](char c) {
    return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '.' || c == '%';
  };
  for (size_t i = 0; i < s.size();) {
    if (s[i] == '\n')
      ++line, ++i;
    else if (std::isspace(static_cast<unsigned char>(s[i])) || s[i] == '\0')
      ++i;
    else if (s.compare(i, 2, "//") == 0)
      while (i < s.size() && s[i] != '\n') ++i;
    else if (s.compare(i, 2, "/*") == 0) {
      const size_t end = s.find("*/", i + 2);
      for (size_t k = i; k < end; ++k) line += s[k] == '\n';
      i = end + 2;
    } else if (s[i] == '"') {
      const size_t end = s.find('"', i + 1);
      out.push_back({s.substr(i, end + 1 - i), line});
      i = end + 1;
    } else if (word(s[i])) {
      size_t k = i;
      while (k < s.size() && word(s[k])) ++k;
      out.push_back({s.substr(i, k - i), line});
      i = k;
    } else {
      out.push_back({s.substr(i++, 1), line});
    }
  }
  return out;
}

struct Register {
  uint32_t at;
  int bits;  // 1 for predicates
};

struct Operand {
  enum Type { reg, number, real, name, vector, address } type;
  Register r{};
  uint64_t bits = 0;  // number; real: of `width` bits
  int width = 0;
  std::string text;         // name
  std::vector<Operand> of;  // vector; address: the base
  int64_t offset = 0;       // address
};

int bits_of(const std::string& t) {
  if (t == "pred") return 1;
  if (t == "f16x2" || t == "bf16x2" || t == "tf32") return 32;
  if (t == "bf16") return 16;
  if (t.size() >= 2 && std::strchr("busf", t[0])) {
    const int n = std::atoi(t.c_str() + 1);
    if (n == 8 || n == 16 || n == 32 || n == 64) return n;
  }
  return 0;
}

std::vector<std::string> split(const std::string& s) {
  std::vector<std::string> out;
  size_t first = 0;
  for (size_t dot; (dot = s.find('.', first)) != std::string::npos; first = dot + 1)
    out.push_back(s.substr(first, dot - first));
  out.push_back(s.substr(first));
  return out;
}

class Parser {
 public:
  explicit Parser(const std::string& text) : t_(tokens_of(text)) {}

  std::vector<std::unique_ptr<Entry>> module() {
    std::vector<std::unique_ptr<Entry>> out;
    while (at_ < t_.size()) {
      const std::string w = next();
      if (w == ".version" || w == ".target" || w == ".address_size") {
        const int line = t_[at_ - 1].line;
        while (at_ < t_.size() && t_[at_].line == line) ++at_;
      } else if (w == ".visible" || w == ".weak") {
      } else if (w == ".extern") {
        expect(".shared");
        int align = 0;
        while (peek() != ";") {
          const std::string d = next();
          if (d == ".align") align = std::stoi(next());
          if (d[0] == '_') shared_symbols_[d] = align;
        }
        next();
      } else if (w == ".entry") {
        out.push_back(entry());
      } else {
        wrong("module directive " + w);
      }
    }
    return out;
  }

 private:
  [[noreturn]] void wrong(const std::string& what) {
    fail("PTX line " + std::to_string(t_[std::min(at_, t_.size() - 1)].line) + ": not understood: " + what);
  }
  const std::string& peek(size_t k = 0) { return t_.at(at_ + k).text; }
  std::string next() { return t_.at(at_++).text; }
  void expect(const std::string& w) {
    if (next() != w) --at_, wrong("'" + peek() + "' where '" + w + "' should be");
  }
  uint32_t place(int bytes) {
    const uint32_t at = e_->file_bytes;
    e_->file_bytes += (bytes + 63) / 64 * 64;
    return at;
  }
  Register make(int bits) { return {place(bits == 1 ? 4 : kLanes * bits / 8), bits}; }

  std::unique_ptr<Entry> entry() {
    auto out = std::make_unique<Entry>();
    e_ = out.get();
    e_->name = next();
    labels_.clear(), jumps_.clear(), constants_.clear(), scopes_.clear();
    expect("(");
    expect(".param");
    expect(".align");
    next();
    expect(".b8");
    e_->param = next();
    expect("[");
    e_->param_bytes = static_cast<uint32_t>(std::stoul(next()));
    expect("]");
    expect(")");
    while (peek() != "{") {
      const std::string d = next();
      if (d == ".maxntid") {
        e_->max_threads = 1;
        for (int i = 0; i < 3; ++i) {
          e_->max_threads *= std::stoi(next());
          if (peek() != ",") break;
          next();
        }
      } else if (d == ".minnctapersm") {
        next();
      } else {
        wrong("entry directive " + d);
      }
    }
    next();
    scopes_.emplace_back();
    while (!scopes_.empty()) statement();
    for (const auto& [ins, label] : jumps_) {
      if (!labels_.count(label)) fail("no label " + label);
      e_->code[ins].target = labels_[label];
    }
    const Ins& last = e_->code.back();
    const bool ends = last.kind == Kind::exit || last.kind == Kind::branch || last.kind == Kind::trap;
    if (!ends || last.guard >= 0) fail(e_->name + " runs off its end");
    return out;
  }

  void statement() {
    if (peek() == "{") return next(), scopes_.emplace_back(), void();
    if (peek() == "}") return next(), scopes_.pop_back(), void();
    if (peek() == ".reg") {
      next();
      const int bits = bits_of(next().substr(1));
      if (!bits || bits == 8) wrong("register type");
      for (;;) {
        const std::string name = next();
        if (peek() == "<") {
          next();
          const int count = std::stoi(next());
          expect(">");
          for (int i = 0; i < count; ++i) scopes_.back()[name + std::to_string(i)] = make(bits);
        } else {
          scopes_.back()[name] = make(bits);
        }
        if (next() == ";") return;
      }
    }
    if (peek() == ".pragma") {
      while (next() != ";") {
      }
      return;
    }
    if (peek(1) == ":") {
      labels_[next()] = static_cast<int>(e_->code.size());
      next();
      return;
    }
    instruction();
  }

  const Register* find(const std::string& name) {
    for (auto s = scopes_.rbegin(); s != scopes_.rend(); ++s) {
      if (const auto r = s->find(name); r != s->end()) return &r->second;
    }
    return nullptr;
  }

  Operand operand() {
    Operand o{};
    if (peek() == "{") {
      o.type = Operand::vector;
      next();
      do o.of.push_back(operand());
      while (next() == ",");
      --at_;
      expect("}");
      return o;
    }
    if (peek() == "[") {
      o.type = Operand::address;
      next();
      o.of.push_back(operand());
      while (peek() == "+" || peek() == "-") {
        bool minus = false;
        while (peek() == "+" || peek() == "-") minus ^= next() == "-";
        const int64_t v = static_cast<int64_t>(std::stoull(next(), nullptr, 0));
        o.offset += minus ? -v : v;
      }
      expect("]");
      return o;
    }
    const bool minus = peek() == "-";
    if (minus) next();
    const std::string w = next();
    if (std::isdigit(static_cast<unsigned char>(w[0]))) {
      if (w.size() > 2 && w[0] == '0' && (w[1] == 'f' || w[1] == 'd' || w[1] == 'F' || w[1] == 'D')) {
        o.type = Operand::real;
        o.width = std::tolower(w[1]) == 'f' ? 32 : 64;
        if (w.size() != 2u + o.width / 4) wrong("number " + w);
        o.bits = std::stoull(w.substr(2), nullptr, 16);
        if (minus) wrong("negated real");
      } else {
        o.type = Operand::number;
        size_t used = 0;
        o.bits = std::stoull(w, &used, 0);
        if (used != w.size() && w.substr(used) != "U") wrong("number " + w);
        if (minus) o.bits = -o.bits;
      }
      return o;
    }
    if (minus) wrong("-" + w);
    if (const Register* r = find(w)) {
      o.type = Operand::reg;
      o.r = *r;
    } else if (w[0] == '%') {
      o.type = Operand::reg;
      o.r = special(w);
    } else {
      o.type = Operand::name;
      o.text = w;
    }
    return o;
  }

  Register special(const std::string& w) {
    static const char* const known[] = {"%tid.x",    "%tid.y",    "%tid.z",   "%ntid.x",  "%ntid.y",
                                        "%ntid.z",   "%ctaid.x",  "%ctaid.y", "%ctaid.z", "%nctaid.x",
                                        "%nctaid.y", "%nctaid.z", "%laneid"};
    for (const char* k : known) {
      if (w == k) {
        if (!e_->special.count(w)) e_->special[w] = make(32).at;
        return {e_->special[w], 32};
      }
    }
    wrong("register " + w);
  }

  uint32_t constant(uint64_t bits, int width) {
    if (width < 64) bits &= (uint64_t{1} << width) - 1;
    const auto key = std::make_pair(bits, width);
    if (const auto c = constants_.find(key); c != constants_.end()) return c->second;
    const uint32_t at = make(width).at;
    e_->constants.push_back(
        {at, width == 1 ? 1 : kLanes, width == 1 ? 4 : width / 8, width == 1 ? (bits ? kAll : 0) : bits});
    return constants_[key] = at;
  }

  // The offset of a source operand of `bits` bits.
  uint32_t source(const Operand& o, int bits) {
    switch (o.type) {
      case Operand::reg:
        if (o.r.bits != bits)
          wrong("register of " + std::to_string(o.r.bits) + " bits where " + std::to_string(bits) + " are wanted");
        return o.r.at;
      case Operand::number:
        return constant(o.bits, bits);
      case Operand::real:
        if (o.width != bits) wrong("real of another width");
        return constant(o.bits, bits);
      case Operand::name:
        if (o.text == e_->param) return constant(kParamBase, bits);
        if (shared_symbols_.count(o.text)) return constant(kSharedBase, bits);
        wrong("name " + o.text);
      default:
        wrong("operand");
    }
  }
  uint32_t target(const Operand& o, int bits) {
    if (o.type != Operand::reg || o.r.bits != bits) wrong("destination");
    return o.r.at;
  }

  void instruction();
  void memory(Ins& in, const std::vector<std::string>& w, const std::vector<Operand>& a);

  std::vector<Token> t_;
  size_t at_ = 0;
  Entry* e_ = nullptr;
  std::vector<std::map<std::string, Register>> scopes_;
  std::map<std::string, int> labels_;
  std::vector<std::pair<size_t, std::string>> jumps_;
  std::map<std::pair<uint64_t, int>, uint32_t> constants_;
  std::map<std::string, int> shared_symbols_;
};

void Parser::instruction() {
  Ins in;
  in.line = t_[at_].line;
  const size_t first = at_;
  if (peek() == "@") {
    next();
    if (peek() == "!") next(), in.negated = true;
    const Register* p = find(next());
    if (!p || p->bits != 1) wrong("guard");
    in.guard = static_cast<int32_t>(p->at);
  }
  const std::string op = next();
  std::vector<Operand> a;
  if (peek() != ";") {
    do a.push_back(operand());
    while (next() == ",");
    --at_;
  }
  expect(";");
  for (size_t i = first; i + 1 < at_; ++i)
    in.text += (i > first && std::isalnum(static_cast<unsigned char>(t_[i].text.back())) &&
                        std::isalnum(static_cast<unsigned char>(t_[i - 1].text.back()))
                    ? " "
                    : "") +
               t_[i].text;
  const std::vector<std::string> w = split(op);
  const std::string& name = w[0];
  const std::string& last = w.back();
  const auto count = [&](size_t n) {
    if (a.size() != n) wrong("number of operands");
  };

  if (name == "bra") {
    count(1);
    if (w.size() == 2 ? last != "uni" : w.size() != 1) wrong(op);
    if (w.size() == 2 && in.guard >= 0) wrong("guarded bra.uni");
    in.kind = Kind::branch;
    jumps_.emplace_back(e_->code.size(), a[0].text);
  } else if (op == "ret" || op == "exit") {
    in.kind = Kind::exit;
  } else if (op == "trap") {
    in.kind = Kind::trap;
  } else if (op == "bar.sync") {
    count(1);
    if (a[0].type != Operand::number || a[0].bits != 0 || in.guard >= 0) wrong("bar.sync");
    in.kind = Kind::barrier;
  } else if (op == "bar.warp.sync") {
    count(1);
    if (a[0].type != Operand::number || static_cast<uint32_t>(a[0].bits) != kAll || in.guard >= 0)
      wrong("bar.warp.sync");
    in.kind = Kind::together;
    in.fn = warp_sync;
  } else if (op == "vote.sync.ballot.b32") {
    count(3);
    if (in.guard >= 0) wrong("guarded vote");
    in.kind = Kind::together;
    in.fn = ballot;
    in.o[0] = target(a[0], 32), in.o[1] = source(a[1], 1), in.o[2] = source(a[2], 32);
  } else if (name == "mma") {
    in.kind = Kind::together;
    const bool wide = op == "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32";
    in.fn = wide                                                          ? mma_tf32
            : op == "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" ? mma_bf16
            : op == "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"   ? mma_f16
                                                                          : nullptr;
    if (!in.fn || in.guard >= 0) wrong(op);
    count(4);
    const size_t sizes[] = {4, 4, 2, 4};
    int k = 0;
    for (int v = 0; v < 4; ++v) {
      if (a[v].of.size() != sizes[v]) wrong(op);
      for (const Operand& o : a[v].of) in.o[k++] = v ? source(o, 32) : target(o, 32);
    }
  } else if (name == "ldmatrix") {
    in.kind = Kind::together;
    in.fn = op == "ldmatrix.sync.aligned.m8n8.x4.shared.b16"         ? ldmatrix
            : op == "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16" ? ldmatrix_trans
                                                                     : nullptr;
    count(2);
    if (!in.fn || in.guard >= 0 || a[0].of.size() != 4 || a[1].type != Operand::address) wrong(op);
    for (int i = 0; i < 4; ++i) in.o[i] = target(a[0].of[i], 32);
    in.o[4] = source(a[1].of[0], 32);
    in.imm = a[1].offset;
  } else if (name == "cp") {
    if (op == "cp.async.commit_group") {
      count(0);
      in.fn = cp_async_commit;
    } else if (op == "cp.async.wait_group") {
      count(1);
      in.fn = cp_async_wait;
      if (a[0].type != Operand::number) wrong(op);
      in.imm = static_cast<int64_t>(a[0].bits);
    } else if (op == "cp.async.cg.shared.global") {
      count(4);
      in.fn = cp_async;
      if (a[0].type != Operand::address || a[1].type != Operand::address || a[2].type != Operand::number ||
          a[2].bits != 16)
        wrong(op);
      in.o[0] = source(a[0].of[0], 32);
      in.o[1] = source(a[1].of[0], 64);
      in.o[2] = source(a[3], 32);
      in.imm = a[0].offset;
      if (a[1].offset) wrong("offset of a source of cp.async");
    } else {
      wrong(op);
    }
  } else if (name == "ld" || name == "st") {
    memory(in, w, a);
  } else if (name == "setp") {
    count(3);
    const int bits = bits_of(last);
    if (w.size() != 3 || bits < 16) wrong(op);
    in.fn = setp_of(w[1], last);
    in.o[0] = target(a[0], 1), in.o[1] = source(a[1], bits), in.o[2] = source(a[2], bits);
  } else if (name == "selp") {
    count(4);
    const int bits = bits_of(last);
    if (w.size() != 2 || bits < 16) wrong(op);
    in.fn = bits == 16 ? selp<uint16_t> : bits == 32 ? selp<uint32_t> : selp<uint64_t>;
    in.o[0] = target(a[0], bits), in.o[1] = source(a[1], bits), in.o[2] = source(a[2], bits), in.o[3] = source(a[3], 1);
  } else if (name == "mov") {
    count(2);
    const int bits = bits_of(last);
    if (w.size() != 2 || !bits || bits == 8) wrong(op);
    if (a[0].type == Operand::vector || a[1].type == Operand::vector) {
      const bool pack = a[1].type == Operand::vector;
      const Operand& v = a[pack ? 1 : 0];
      if (v.of.size() != 2 || bits == 16) wrong("mov with this vector");
      in.fn = pack ? (bits == 32 ? pack2<uint32_t, uint16_t> : pack2<uint64_t, uint32_t>)
                   : (bits == 32 ? unpack2<uint32_t, uint16_t> : unpack2<uint64_t, uint32_t>);
      if (pack) {
        in.o[0] = target(a[0], bits);
        for (int i = 0; i < 2; ++i) in.o[1 + i] = source(v.of[i], bits / 2);
      } else {
        in.o[2] = source(a[1], bits);
        for (int i = 0; i < 2; ++i) in.o[i] = target(v.of[i], bits / 2);
      }
    } else {
      in.fn = bits == 1 ? mov_pred : bits == 16 ? mov<uint16_t> : bits == 32 ? mov<uint32_t> : mov<uint64_t>;
      in.o[0] = target(a[0], bits), in.o[1] = source(a[1], bits);
    }
  } else if (name == "cvta") {
    count(2);
    if (op == "cvta.to.global.u64")
      in.fn = cvta_to_global;
    else if (op == "cvta.shared.u64")
      in.fn = cvta_shared;
    else
      wrong(op);
    in.o[0] = target(a[0], 64), in.o[1] = source(a[1], 64);
  } else if (name == "cvt") {
    const std::string& from = last;
    const std::string& to = w[w.size() - 2];
    const std::string mode = w.size() == 4 ? w[1] : "";
    if (w.size() < 3 || w.size() > 4) wrong(op);
    if (to == "bf16x2" || to == "f16x2") {
      count(3);
      if (mode != "rn" || from != "f32") wrong(op);
      in.fn = to == "bf16x2" ? cvt_bf16x2 : cvt_f16x2;
      in.o[0] = target(a[0], 32), in.o[1] = source(a[1], 32), in.o[2] = source(a[2], 32);
    } else {
      count(2);
      in.fn = cvt_of(mode, to, from);
      in.o[0] = target(a[0], bits_of(to)), in.o[1] = source(a[1], bits_of(from));
    }
  } else if (last == "pred") {
    if (w.size() != 2) wrong(op);
    if (name == "not") {
      count(2);
      in.fn = not_pred;
      in.o[0] = target(a[0], 1), in.o[1] = source(a[1], 1);
    } else {
      count(3);
      in.fn = name == "and" ? and_pred : name == "or" ? or_pred : name == "xor" ? xor_pred : nullptr;
      in.o[0] = target(a[0], 1), in.o[1] = source(a[1], 1), in.o[2] = source(a[2], 1);
    }
  } else {
    // Arithmetic: one type, but for the amounts of shifts, wide products and what bits are found.
    const int bits = bits_of(last);
    if (bits < 16) wrong(op);
    std::string what = op.substr(0, op.size() - last.size() - 1);
    if (const auto f = unary_of(what, last)) {
      count(2);
      in.fn = f;
      in.o[0] = target(a[0], bits), in.o[1] = source(a[1], bits);
    } else if (const auto g = binary_of(what, last)) {
      count(3);
      const bool shift = what == "shl" || what == "shr", wide = what == "mul.wide";
      in.fn = g;
      in.o[0] = target(a[0], wide ? 2 * bits : bits), in.o[1] = source(a[1], bits),
      in.o[2] = source(a[2], shift ? 32 : bits);
    } else if (const auto h = ternary_of(what, last)) {
      count(4);
      in.fn = h;
      in.o[0] = target(a[0], bits);
      for (int i = 1; i < 4; ++i) in.o[i] = source(a[i], bits);
    } else if (op == "bfi.b32") {
      count(5);
      in.fn = bfi32;
      in.o[0] = target(a[0], 32);
      for (int i = 1; i < 5; ++i) in.o[i] = source(a[i], 32);
    }
  }
  if (!in.fn && (in.kind == Kind::normal || in.kind == Kind::together)) wrong(op);
  e_->code.push_back(std::move(in));
}

void Parser::memory(Ins& in, const std::vector<std::string>& w, const std::vector<Operand>& a) {
  const bool load = w[0] == "ld";
  size_t k = 1;
  std::string space = "generic";
  if (w[k] == "global" || w[k] == "shared" || w[k] == "param") space = w[k++];
  int vector = 1;
  if (w[k] == "v2" || w[k] == "v4") vector = w[k++][1] - '0';
  if (k + 1 != w.size() || a.size() != 2) wrong("memory instruction");
  const std::string& type = w[k];
  const Operand& memory = a[load ? 1 : 0];
  const Operand& data = a[load ? 0 : 1];
  if (memory.type != Operand::address) wrong("address");
  if ((data.type == Operand::vector) != (vector > 1) || (vector > 1 && static_cast<int>(data.of.size()) != vector))
    wrong("vector");
  const Operand& base = memory.of[0];
  in.vector_address64 = base.type != Operand::reg || base.r.bits == 64;
  in.o[0] = source(base, in.vector_address64 ? 64 : 32);
  in.imm = memory.offset;
  int width = 0;
  for (int i = 0; i < vector; ++i) {
    const Operand& d = vector > 1 ? data.of[i] : data;
    const int bits = d.type == Operand::reg ? d.r.bits : std::max(16, bits_of(type));
    if (bits < bits_of(type) || bits < 16 || (width && bits != width)) wrong("width of a register");
    width = bits;
    in.o[1 + i] = load ? target(d, bits) : source(d, bits);
  }
  if ((type == "f32" && width != 32) || (type == "f64" && width != 64)) wrong("width of a float register");
  in.fn = memory_of(load, space, type, vector, width);
}

}  // namespace

std::vector<std::unique_ptr<Entry>> parse(const std::string& text) { return Parser(text).module(); }

}  // namespace ptx
