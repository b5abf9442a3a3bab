// What accesses cost, by the rules that NVIDIA documents; counted, not timed.
#include <algorithm>

#include "memory.h"

namespace ptx {
namespace {

void make_unique(std::vector<uint64_t>& values) {
  std::sort(values.begin(), values.end());
  values.erase(std::unique(values.begin(), values.end()), values.end());
}

}  // namespace

void count_shared(const Instruction& instruction, const uint64_t* addresses, int count, unsigned bytes) {
  // 32 lanes of up to 4 bytes are served together, 16 of 8, 8 of 16; each of the 32 banks gives one word of 4 bytes a
  // cycle, to any number of lanes.
  const int together = bytes <= 4 ? kLanes : static_cast<int>(128 / bytes);
  for (int first = 0; first < count; first += together) {
    std::vector<uint64_t> words;
    for (int i = first; i < std::min(count, first + together); ++i) {
      for (uint64_t word = addresses[i] / 4; word <= (addresses[i] + bytes - 1) / 4; ++word) words.push_back(word);
    }
    make_unique(words);
    uint64_t of_bank[32] = {}, most = 0;
    for (const uint64_t word : words) most = std::max(most, ++of_bank[word % 32]);
    instruction.counts.cycles += most;
    ++instruction.counts.least_cycles;
  }
}

void count_global(const Instruction& instruction, const uint64_t* addresses, int count, unsigned bytes) {
  std::vector<uint64_t> sectors, touched;
  for (int i = 0; i < count; ++i) {
    sectors.push_back(addresses[i] / 32);
    for (unsigned k = 0; k < bytes; ++k) touched.push_back(addresses[i] + k);
  }
  make_unique(sectors);
  make_unique(touched);
  instruction.counts.sectors += sectors.size();
  instruction.counts.least_sectors += (touched.size() + 31) / 32;
}

}  // namespace ptx
