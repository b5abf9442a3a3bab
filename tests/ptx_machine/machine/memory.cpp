#include "memory.h"

#include <cstdio>

namespace ptx {

Config config;
Statistics statistics;
std::vector<Range> ranges;

namespace {

std::string hex(uint64_t value) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

// The range that holds the bytes. Neighbouring accesses are to the same one.
Range& range_of(uint64_t address, unsigned bytes, const char* what) {
  static size_t last = 0;
  const auto holds = [&](const Range& range) { return address >= range.begin && address + bytes <= range.end; };
  if (last < ranges.size() && holds(ranges[last])) return ranges[last];
  for (last = 0; last < ranges.size(); ++last) {
    if (holds(ranges[last])) return ranges[last];
  }
  std::string near;
  for (const Range& range : ranges) {
    if (address + 4096 > range.begin && address < range.end + 4096) {
      near += "; a buffer is [" + hex(range.begin) + ", " + hex(range.end) + ")";
    }
  }
  fail(std::string(what) + " outside of every buffer: " + std::to_string(bytes) + " bytes at " + hex(address) + near);
}

}  // namespace

void fail_misaligned(uint64_t address, unsigned bytes) {
  fail("misaligned: " + std::to_string(bytes) + " bytes at " + hex(address));
}
void fail_outside_shared(const Warp& warp, uint64_t address) {
  fail("outside of shared memory: byte " + std::to_string(static_cast<int64_t>(address) - kSharedBase) + " of " +
       std::to_string(warp.block->shared.size()));
}

unsigned char* global_bytes(Warp& warp, uint64_t address, unsigned bytes, bool write, int lane) {
  const char* what = write ? "write" : "read";
  Range& range = range_of(address, bytes, what);
  if (write && range.access != Access::output) fail("write to an input at " + hex(address));
  if (warp.dependent && range.access != Access::input) {
    fail(std::string(what) + " of what the launch before may be using, before griddepcontrol.wait, at " + hex(address));
  }
  if (config.race && range.access == Access::output) {
    const Launch& launch = *warp.block->launch;
    const uint64_t of_launch =
        warp.block->index * launch.block.count() + static_cast<uint64_t>(warp.number * kLanes + lane);
    const uint64_t thread = launch.first_thread + of_launch;
    if (range.writer.empty()) range.writer.resize(range.end - range.begin);
    for (unsigned k = 0; k < bytes; ++k) {
      uint64_t& writer = range.writer[address - range.begin + k];
      if (writer >= launch.first_thread && writer != thread) {
        fail(std::string("race: ") + what + " of global memory that another thread of the launch wrote, at " +
             hex(address));
      }
      if (write) writer = thread;
    }
  }
  return reinterpret_cast<unsigned char*>(address);
}

void require_unwritten(uint64_t address) {
  const Range& range = range_of(address, 1, "read");
  if (range.access == Access::output) fail("ld.global.nc of a buffer that the launch may write, at " + hex(address));
}

unsigned char* param_bytes(Warp& warp, uint64_t address, unsigned bytes) {
  // Read only: handlers that store do not know the parameters' space.
  const std::vector<unsigned char>& params = warp.block->launch->params;
  if (address < kParamBase || address - kParamBase + bytes > params.size()) {
    fail("outside of the parameters: byte " + std::to_string(static_cast<int64_t>(address - kParamBase)) + " of " +
         std::to_string(params.size()));
  }
  return const_cast<unsigned char*>(params.data()) + (address - kParamBase);
}

}  // namespace ptx
