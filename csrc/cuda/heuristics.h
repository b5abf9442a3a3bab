// Launch geometry. Pure functions of shapes, so that a machine without a GPU can test them.
#pragma once

#include <cstdint>

namespace mos::cuda {

constexpr int kWarp = 32;

// Threads of a block that walks `elements` contiguous elements, one each: whole warps, 64 to 256. Below 64 a block no
// longer hides the latency of its first load; above 256 the last, partly idle block costs more than the wider ones
// save.
inline int threads_for(int64_t elements) {
  if (elements <= 64) return 64;
  if (elements >= 256) return 256;
  return static_cast<int>((elements + kWarp - 1) / kWarp * kWarp);
}

inline int64_t blocks_for(int64_t elements, int threads) { return (elements + threads - 1) / threads; }

// Bytes that one thread copies at a time: the widest of 16, 8, 4, 2 that divides the segment, the distance between two
// shards and both addresses.
inline int copy_width(int64_t segment_bytes, int64_t pool_stride_bytes, uint64_t source, uint64_t target) {
  const uint64_t all =
      static_cast<uint64_t>(segment_bytes) | static_cast<uint64_t>(pool_stride_bytes) | source | target;
  for (int width = 16; width > 2; width /= 2) {
    if (all % width == 0) return width;
  }
  return 2;
}

}  // namespace mos::cuda
