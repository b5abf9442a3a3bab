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
  uint32_t group;  // its number among the groups of its lane
  uint32_t target;
  uint64_t source;
  uint32_t bytes, read_bytes;
};

struct Block;

struct Warp {
  unsigned char* registers;  // its part of Block::files
  Block* block;
  int number;
  int32_t at = 0;      // the next instruction of the lanes that run
  uint32_t lanes = 0;  // that run
  uint32_t live = 0;   // that have not left
  std::vector<Party> others;
  bool at_barrier = false;
  bool at_wait = false;  // griddepcontrol.wait
  bool dependent;        // has not waited yet: what the launch before writes must not be touched yet
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
  std::vector<unsigned char> files;  // of registers
  uint32_t epoch = 1;                // barriers so far, for races
  bool triggered = false;            // the launch behind, by griddepcontrol.launch_dependents
  bool may_pass_wait = false;        // griddepcontrol.wait
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

// Makes a block ready to run; it finds in its registers what another block of the launch has left there, if one ran in
// the same memory. start.cpp.
void start(Block& block, const Launch& launch, uint64_t index);
// Until the block is done or pauses: it waits for the launch before, or, with Config::early, has just triggered the
// launch behind. schedule.cpp.
void run(Block& block);

}  // namespace ptx
