// A block that runs: its warps, their lanes and registers, its memory.
#pragma once

#include "machine.h"
#include "races.h"

namespace ptx {

// Lanes of a warp that go on together.
struct Party {
  int32_t at;  // the next instruction
  uint32_t lanes;
  bool waiting;  // for the rest of the warp, at an instruction of Kind::warp
};

// A cp.async in flight.
struct Copy {
  int lane;
  uint32_t group;  // the how manieth group of its lane
  uint32_t target;
  uint64_t source;
  uint32_t bytes, read_bytes;
};

struct Block;

struct Warp {
  unsigned char* registers;
  Block* block;
  int number;
  int32_t at = 0;      // the next instruction of the lanes that run
  uint32_t lanes = 0;  // that run
  uint32_t live = 0;   // that have not left
  std::vector<Party> others;
  bool at_barrier = false;
  bool at_wait = false;  // griddepcontrol.wait
  bool dependent;        // what the launch before writes must not be touched yet
  uint32_t epoch = 1;    // bar.warp.sync and barriers so far, for races
  uint32_t carry = 0;    // the lanes' CC.CF
  uint32_t groups[kLanes] = {};
  std::vector<Copy> copies;
};

struct Block {
  const Launch* launch;
  uint64_t index;  // in the grid
  std::vector<unsigned char> shared;
  std::vector<SharedByte> races;
  std::vector<Warp> warps;
  std::vector<unsigned char> files;
  uint32_t epoch = 1;  // barriers so far, for races
  bool triggered = false;
  bool may_pass_wait = false;
  bool done = false;
};

// The lanes' values of a register.
template <class T>
inline T* lanes_of(Warp& warp, uint32_t offset) {
  return reinterpret_cast<T*>(warp.registers + offset);
}

template <class F>
inline void for_each_lane(uint32_t lanes, const F& f) {
  if (lanes == kAllLanes) {
#pragma GCC ivdep
    for (int lane = 0; lane < kLanes; ++lane) f(lane);
  } else {
    for (; lanes; lanes &= lanes - 1) f(__builtin_ctz(lanes));
  }
}

// Numbers drawn from Config::seed.
void seed_draws(uint64_t seed);
uint64_t draw(uint64_t below);

// schedule.cpp. Makes a block ready to start; `files` are its warps' registers, if it may have those of another.
void start(Block& block, const Launch& launch, uint64_t index);
// Until the block is done or cannot go on: it waits for the launch before, or has just triggered the next (with
// Config::early).
void run(Block& block);

}  // namespace ptx
