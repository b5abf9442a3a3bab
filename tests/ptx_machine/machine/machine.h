// The machine: how it runs, what it may touch, launches.
#pragma once

#include "program.h"

namespace ptx {

// A schedule and what to look for. interface.cpp gives the fields their names.
struct Config {
  int64_t late = 1;     // cp.async: 1 lands when it is waited for (NaN until then), 0 at once
  int64_t warps = 0;    // 0 in order, 1 backwards, 2 in random slices
  int64_t lanes = 0;    // diverged lanes: 0 lowest address first, 1 highest first, 2 at random, 3 each lane alone
  int64_t blocks = 0;   // 0 in order, 1 backwards, 2 at random
  int64_t early = 0;    // 1: launches wait for flush(), then programmatic ones begin as early as they may
  int64_t race = 0;     // look for races in shared and global memory
  int64_t traffic = 0;  // count cycles of shared and sectors of global memory
  int64_t seed = 1;     // of all that is random
};
extern Config config;

struct Statistics {
  uint64_t launches = 0, instructions = 0;
  uint64_t never_waited = 0;  // cp.async in flight when a kernel ended
  uint64_t overlapped = 0;    // launches that began before the one before them was complete
};
extern Statistics statistics;

// What a launch may do with a buffer. `produced` is an input that the launch before may still be writing: a
// programmatic launch has to wait before it reads it.
enum class Access : int { input = 0, output = 1, produced = 2 };

// Global memory is what these ranges cover; anything else is out of bounds.
struct Range {
  uint64_t begin, end;
  Access access;
  std::vector<uint64_t> writer;  // with Config::race, of each byte: the thread, counted from Launch::first_thread
};
extern std::vector<Range> ranges;

struct Dim {
  uint32_t x, y, z;
  uint64_t count() const { return uint64_t{x} * y * z; }
};
struct Launch {
  const Entry* entry;
  Dim grid, block;
  size_t shared_bytes;
  std::vector<unsigned char> params;
  bool programmatic = false;  // may begin before the launch before it has ended
  uint64_t first_thread = 0;  // the number of its first thread, among those of all launches
};

// Runs a launch; with Config::early, keeps it for flush(). Throws what went wrong, with place and instruction.
void submit(Launch launch);
// Runs what submit() kept, or forgets it.
void flush();
void discard();

// The entry of a name, or null; and adding those of a module. modules.cpp.
Entry* find_entry(const std::string& name);
std::vector<std::string> add_module(const std::string& text);
const std::map<std::string, std::unique_ptr<Entry>>& all_entries();

}  // namespace ptx
