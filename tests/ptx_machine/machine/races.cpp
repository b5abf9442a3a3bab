#include "races.h"

#include "state.h"

namespace ptx {
namespace {

[[noreturn]] void race(const std::string& what, const Warp& warp, uint64_t offset) {
  fail("race: " + what + " at byte " + std::to_string(offset) + " of shared memory by warp " +
       std::to_string(warp.number));
}
std::string thread(int number) { return "thread " + std::to_string(number); }

}  // namespace

void note_shared_write(Warp& warp, uint64_t offset, unsigned bytes, int lane) {
  const uint32_t block_epoch = warp.block->epoch, others = ~(1u << warp.number), other_lanes = ~(1u << lane);
  const int16_t self = static_cast<int16_t>(warp.number * kLanes + lane);
  for (const uint64_t end = offset + bytes; offset < end; ++offset) {
    SharedByte& byte = warp.block->races[offset];
    if (byte.copier >= 0) race("write over a cp.async in flight of " + thread(byte.copier), warp, offset);
    if (byte.writer >= 0 && byte.writer != self && byte.write_block_epoch == block_epoch) {
      const bool same_warp = byte.writer / kLanes == warp.number;
      if (!same_warp || byte.write_warp_epoch == warp.epoch) {
        race("write after write of " + thread(byte.writer), warp, offset);
      }
    }
    if (byte.read_block_epoch == block_epoch) {
      if (byte.read_warps & others) race("write after read of another warp", warp, offset);
      if (byte.read_warp_epoch == warp.epoch && byte.read_lanes & other_lanes) {
        race("write after read of another lane", warp, offset);
      }
    }
    byte.writer = self;
    byte.write_block_epoch = block_epoch;
    byte.write_warp_epoch = warp.epoch;
  }
}

void note_shared_read(Warp& warp, uint64_t offset, unsigned bytes, uint32_t lanes) {
  const uint32_t block_epoch = warp.block->epoch, self = 1u << warp.number;
  for (const uint64_t end = offset + bytes; offset < end; ++offset) {
    SharedByte& byte = warp.block->races[offset];
    if (byte.copier >= 0) race("read of a cp.async in flight of " + thread(byte.copier), warp, offset);
    if (byte.writer >= 0 && byte.write_block_epoch == block_epoch) {
      const bool same_warp = byte.writer / kLanes == warp.number;
      const bool other_lane = lanes & ~(1u << byte.writer % kLanes);
      if (!same_warp || (byte.write_warp_epoch == warp.epoch && other_lane)) {
        race("read after write of " + thread(byte.writer), warp, offset);
      }
    }
    if (byte.read_block_epoch != block_epoch) {
      byte.read_block_epoch = block_epoch;
      byte.read_warps = byte.read_warp_epoch = 0;
    }
    byte.read_warps |= self;
    if (byte.read_warp_epoch != warp.epoch || byte.read_warps != self) {
      byte.read_warp_epoch = warp.epoch;
      byte.read_lanes = 0;
    }
    byte.read_lanes |= lanes;
  }
}

void note_copy_start(Warp& warp, uint64_t offset, unsigned bytes, int lane) {
  note_shared_write(warp, offset, bytes, lane);
  for (unsigned k = 0; k < bytes; ++k) {
    warp.block->races[offset + k].copier = static_cast<int16_t>(warp.number * kLanes + lane);
  }
}
void note_copy_end(Warp& warp, uint64_t offset, unsigned bytes, int lane) {
  for (unsigned k = 0; k < bytes; ++k) warp.block->races[offset + k].copier = -1;
  note_shared_write(warp, offset, bytes, lane);
}

}  // namespace ptx
