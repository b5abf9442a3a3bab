// Races: two threads touch a byte, one of them writes, and nothing orders them. In shared memory barriers do, and
// within a warp bar.warp.sync; nothing else, not even that lanes have run in step. In global memory nothing orders the
// threads of a launch.
#pragma once

#include <cstdint>

namespace ptx {

struct Warp;

// Who touched a byte of shared memory. Epochs are counted from 1 by barriers (of the block) and by bar.warp.sync.
struct SharedByte {
  uint32_t write_block_epoch = 0, write_warp_epoch = 0;
  uint32_t read_block_epoch = 0, read_warp_epoch = 0;
  uint32_t read_warps = 0;  // since the barrier
  uint32_t read_lanes = 0;  // of the only reading warp, since its bar.warp.sync
  int16_t writer = -1;      // thread
  int16_t copier = -1;      // thread whose cp.async is in flight
};

// All throw where there is a race. `offset` is from the start of shared memory.
void note_shared_write(Warp& warp, uint64_t offset, unsigned bytes, int lane);
void note_shared_read(Warp& warp, uint64_t offset, unsigned bytes, uint32_t lanes);
// A cp.async starts, or has landed: in between nobody may touch its bytes.
void note_copy_start(Warp& warp, uint64_t offset, unsigned bytes, int lane);
void note_copy_end(Warp& warp, uint64_t offset, unsigned bytes, int lane);

}  // namespace ptx
