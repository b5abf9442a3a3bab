// What lanes may touch: every access goes through here.
#pragma once

#include "state.h"

namespace ptx {

enum class Space { global, shared, param, generic };

// The bytes at an address, after all checks: bounds, alignment, what the launch may do with the buffer, races.
unsigned char* global_bytes(Warp& warp, uint64_t address, unsigned bytes, bool write, int lane);
unsigned char* param_bytes(Warp& warp, uint64_t address, unsigned bytes);
// Of ld.global.nc, which need not see what the launch has written: nobody may write there.
void require_unwritten(uint64_t address);

// Inline: they are a third of the time otherwise.
[[noreturn]] void fail_misaligned(uint64_t address, unsigned bytes);
[[noreturn]] void fail_outside_shared(const Warp& warp, uint64_t address);
inline void require_aligned(uint64_t address, unsigned bytes) {
  if (address % bytes) fail_misaligned(address, bytes);
}
inline unsigned char* shared_bytes(Warp& warp, uint64_t address, unsigned bytes) {
  std::vector<unsigned char>& shared = warp.block->shared;
  if (address < kSharedBase || address - kSharedBase + bytes > shared.size()) fail_outside_shared(warp, address);
  return shared.data() + (address - kSharedBase);
}

template <Space space, bool write>
inline unsigned char* access(Warp& warp, uint64_t address, unsigned bytes, int lane) {
  if constexpr (space == Space::generic) {
    const auto inside = [&](uint64_t window) { return (address & kWindowMask) == (window & kWindowMask); };
    if (inside(kSharedWindow)) return access<Space::shared, write>(warp, address - kSharedWindow, bytes, lane);
    if (inside(kParamWindow) && !write) return access<Space::param, write>(warp, address - kParamWindow, bytes, lane);
    return access<Space::global, write>(warp, address, bytes, lane);
  }
  require_aligned(address, bytes);
  if constexpr (space == Space::param) return param_bytes(warp, address, bytes);
  if constexpr (space == Space::global) return global_bytes(warp, address, bytes, write, lane);
  unsigned char* data = shared_bytes(warp, address, bytes);
  if (config.race) {
    if constexpr (write) {
      note_shared_write(warp, address - kSharedBase, bytes, lane);
    } else {
      note_shared_read(warp, address - kSharedBase, bytes, 1u << lane);
    }
  }
  return data;
}

// With Config::traffic: what `count` accesses of `bytes` each, of one instruction of a warp, cost. traffic.cpp.
void count_shared(const Instruction& instruction, const uint64_t* addresses, int count, unsigned bytes);
void count_global(const Instruction& instruction, const uint64_t* addresses, int count, unsigned bytes);

}  // namespace ptx
