// A PTX interpreter: modules, entries, launches. See README.md.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

constexpr int kLanes = 32;
constexpr uint32_t kAll = 0xFFFFFFFFu;
constexpr uint64_t kParamBase = 0x1000;                 // where the parameters of a kernel lie in .param
constexpr uint32_t kSharedBase = 1024;                  // where .shared starts: not 0, so that a lost base is seen
constexpr uint64_t kSharedWindow = 0x5AFE000000000000;  // generic addresses of .shared: no host pointer looks so

struct Warp;
struct Ins;
using Fn = void (*)(Warp&, const Ins&, uint32_t);

// normal: each lane for itself. together: needs all lanes of the warp at once (mma, ldmatrix, vote, bar.warp.sync).
enum class Kind : uint8_t { normal, together, branch, exit, barrier, trap };

struct Ins {
  Fn fn = nullptr;
  Kind kind = Kind::normal;
  bool negated = false;
  bool vector_address64 = false;  // of a memory operand: 64-bit base register
  int32_t guard = -1;             // offset of a predicate, or -1
  uint32_t o[16] = {};            // offsets of operands in the register file
  int64_t imm = 0;                // address offset, or whatever the handler wants
  int32_t target = -1;
  mutable uint64_t hits = 0;
  mutable uint64_t cycles = 0, ideal = 0;   // traffic mode, shared memory: cycles of its 32 banks
  mutable uint64_t sectors = 0, least = 0;  // and global memory: sectors of 32 bytes
  int32_t line = 0;
  std::string text;
};

struct Constant {
  uint32_t at;
  int lanes, bytes;  // a predicate is one word
  uint64_t bits;
};

struct Entry {
  std::string name;
  std::vector<Ins> code;
  uint32_t file_bytes = 0;  // of a warp's register file
  std::vector<Constant> constants;
  std::map<std::string, uint32_t> special;  // %tid.x -> offset
  std::string param;
  uint32_t param_bytes = 0;
  int max_threads = 1024;
  size_t shared_attribute = 48 * 1024;
};

// Parses a module; calls for anything it does not know.
std::vector<std::unique_ptr<Entry>> parse(const std::string& text);

struct Dim {
  uint32_t x, y, z;
};
struct Config {
  int64_t late = 1;    // cp.async: 1 lands at the wait (poison until then), 0 at once
  int64_t warps = 0;   // 0 in order, 1 backwards, 2 random slices
  int64_t lanes = 0;   // diverged lanes: 0 lowest pc first, 1 highest first, 2 random, 3 every lane alone between syncs
  int64_t blocks = 0;  // 0 in order, 1 backwards, 2 random
  int64_t race = 0;    // check shared and global memory for races
  int64_t seed = 1;
  int64_t traffic = 0;  // count cycles of shared and sectors of global memory
};
struct Stats {
  uint64_t launches = 0, instructions = 0, unwaited = 0, unwritten = 0;
};
extern Config config;
extern Stats stats;

struct Range {
  uint64_t lo, hi;
  bool writable;
  std::vector<uint32_t> writer;  // race mode: of each byte, thread + 1 of this launch
};
extern std::vector<Range> ranges;

// Throws std::runtime_error with all it knows.
void launch(Entry& e, Dim grid, Dim block, size_t shared_bytes, const void* params);

[[noreturn]] void fail(const std::string& what);

}  // namespace ptx
