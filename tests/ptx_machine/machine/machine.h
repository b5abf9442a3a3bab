// The state of a running block, and memory.
#pragma once
#include <cstring>

#include "ptx.h"

namespace ptx {

struct Shadow {                              // of a byte of shared memory, in race mode
  uint32_t write_block = 0, write_warp = 0;  // epochs
  uint32_t read_block = 0, read_warp = 0, read_lanes = 0;
  int16_t writer = -1;   // thread
  int16_t pending = -1;  // thread whose cp.async is in flight
  uint32_t read_warps = 0;
};

struct Split {
  int32_t pc;
  uint32_t mask;
  bool waiting;
};

struct Copy {  // cp.async in flight
  int lane;
  uint32_t group;
  uint32_t target;
  uint64_t source;
  uint32_t bytes;
};

struct Block;

struct Warp {
  unsigned char* regs;
  Block* block;
  int number;
  int32_t pc = 0;
  uint32_t mask = 0, live = 0;
  bool at_barrier = false;
  uint32_t epoch = 1;
  std::vector<Split> others;
  uint32_t groups[kLanes] = {};
  std::vector<Copy> copies;
};

struct Block {
  const Entry* entry;
  std::vector<unsigned char> shared;
  std::vector<Shadow> shadow;
  std::vector<unsigned char> params;
  std::vector<Warp> warps;
  std::vector<unsigned char> files;
  uint32_t epoch = 1;
  uint32_t first_thread = 0;  // of the grid, for global races
};

unsigned char* shared_at(Warp& w, uint64_t address, unsigned bytes);
void shared_read(Warp& w, uint64_t address, unsigned bytes, uint32_t lanes);
void shared_write(Warp& w, uint64_t address, unsigned bytes, int lane);
unsigned char* global_at(Warp& w, uint64_t address, unsigned bytes, bool write, int lane);

// Of one instruction of a warp: `n` accesses of `bytes` each.
void count_shared(const Ins& in, const uint64_t* address, int n, unsigned bytes);
void count_global(const Ins& in, const uint64_t* address, int n, unsigned bytes);

enum Space { kGlobal, kShared, kParam, kGeneric };

template <Space space, bool write>
inline unsigned char* at(Warp& w, uint64_t address, unsigned bytes, int lane) {
  if (space == kGeneric) {
    const bool shared = address >> 48 == kSharedWindow >> 48;
    return shared ? at<kShared, write>(w, address & 0xFFFFFFFFu, bytes, lane)
                  : at<kGlobal, write>(w, address, bytes, lane);
  }
  if (address % bytes)
    fail("misaligned address " + std::to_string(address) + " of " + std::to_string(bytes) + " bytes");
  if (space == kGlobal) return global_at(w, address, bytes, write, lane);
  if (space == kShared) {
    unsigned char* p = shared_at(w, address, bytes);
    if (config.race) write ? shared_write(w, address, bytes, lane) : shared_read(w, address, bytes, 1u << lane);
    return p;
  }
  if (address < kParamBase || address - kParamBase + bytes > w.block->params.size()) fail("outside of .param");
  return w.block->params.data() + (address - kParamBase);
}

}  // namespace ptx
