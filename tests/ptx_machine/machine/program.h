// A program as the machine executes it: kernels ("entries") of decoded instructions. parse.cpp makes it of PTX text.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

// Where memory lies. Shared memory does not start at 0, so that a lost base is seen; a generic address is of a window
// if its upper bits are, which no host pointer's are, and its lower half is not yet the address inside.
constexpr uint64_t kParamBase = 0x1000;
constexpr uint32_t kSharedBase = 1024;
constexpr uint64_t kSharedWindow = 0x5AFE000001000000;
constexpr uint64_t kParamWindow = 0x5A9A000001000000;
constexpr uint64_t kWindowMask = 0xFFFF000000000000;

// Of registers in a warp's file, for the CPU's vector instructions.
constexpr uint32_t kFileAlignment = 64;

struct Warp;
struct Instruction;
// Does an instruction for the lanes of a mask.
using Handler = void (*)(Warp&, const Instruction&, uint32_t lanes);

enum class Kind : uint8_t {
  lanes,  // each lane for itself, in any company
  warp,   // all lanes of the warp at once: mma, ldmatrix, shfl, vote, bar.warp.sync
  branch,
  exit,
  barrier,
  trap,
  wait,     // griddepcontrol.wait
  trigger,  // griddepcontrol.launch_dependents
};

// What an instruction did in all launches.
struct Counts {
  uint64_t hits = 0;
  // With Config::traffic. Shared memory: cycles of its 32 banks, and how many there would be without conflicts.
  uint64_t cycles = 0, least_cycles = 0;
  // Global memory: sectors of 32 bytes, and how many would hold the bytes.
  uint64_t sectors = 0, least_sectors = 0;
};

struct Instruction {
  Handler handler = nullptr;
  Kind kind = Kind::lanes;
  bool guard_negated = false;
  int32_t guard = -1;         // offset of the predicate in the register file, or -1
  uint32_t operand[20] = {};  // offsets in the register file: targets first
  int64_t immediate = 0;      // the offset of an address, or what else the handler wants
  int64_t second_immediate = 0;
  bool address_64 = false;    // the base of the address is a 64-bit register
  bool non_coherent = false;  // ld.global.nc
  int32_t target = -1;        // of a branch
  int32_t line = 0;
  std::string text;
  mutable Counts counts;
};

// A register that holds the same for ever; a predicate is one word.
struct Constant {
  uint32_t offset;
  int lanes, bytes;
  uint64_t bits;
};

struct Parameter {
  std::string name;
  uint32_t offset, bytes;
};

struct Entry {
  std::string name;
  int architecture = 0;  // 90 for .target sm_90
  std::vector<Instruction> code;
  uint32_t file_bytes = 0;  // of a warp's register file
  std::vector<Constant> constants;
  std::map<std::string, uint32_t> special;  // %tid.x to its offset
  std::vector<Parameter> parameters;
  uint32_t param_bytes = 0;
  uint64_t max_threads = 1024;
  size_t shared_attribute = 48 * 1024;  // dynamic shared memory that a launch may ask for
};

// The entries of a module. Throws for anything that it does not know.
std::vector<std::unique_ptr<Entry>> parse(const std::string& text);

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error(what); }

}  // namespace ptx
