// What a block finds when it starts.
#include <cstring>

#include "state.h"

namespace ptx {
namespace {

uint32_t special_value(const std::string& name, const Launch& launch, uint64_t block, uint32_t thread) {
  const auto component = [](const Dim& size, uint64_t index, char axis) {
    const uint64_t all[] = {index % size.x, index / size.x % size.y, index / size.x / size.y};
    return static_cast<uint32_t>(all[axis - 'x']);
  };
  const auto size = [](const Dim& of, char axis) { return axis == 'x' ? of.x : axis == 'y' ? of.y : of.z; };
  const std::string stem = name.substr(0, name.find('.'));
  const char axis = name.back();
  const uint32_t lane = thread % kLanes, bit = 1u << lane;
  if (stem == "%tid") return component(launch.block, thread, axis);
  if (stem == "%ntid") return size(launch.block, axis);
  if (stem == "%ctaid") return component(launch.grid, block, axis);
  if (stem == "%nctaid") return size(launch.grid, axis);
  if (name == "%laneid") return lane;
  if (name == "%lanemask_eq") return bit;
  if (name == "%lanemask_lt") return bit - 1;
  if (name == "%lanemask_le") return bit | (bit - 1);
  if (name == "%lanemask_gt") return ~(bit | (bit - 1));
  if (name == "%lanemask_ge") return ~(bit - 1);
  fail("no value for " + name);
}

// Registers start as something conspicuous, NaN if floats.
void fill_with_garbage(unsigned char* file, size_t bytes) {
  constexpr uint32_t kGarbage = 0xFFFEBABE;
  for (size_t at = 0; at < bytes; at += sizeof kGarbage) std::memcpy(file + at, &kGarbage, sizeof kGarbage);
}

void set_constants(Warp& warp, const Entry& entry) {
  for (const Constant& constant : entry.constants) {
    for (int lane = 0; lane < constant.lanes; ++lane) {
      std::memcpy(warp.registers + constant.offset + lane * constant.bytes, &constant.bits,
                  static_cast<size_t>(constant.bytes));
    }
  }
}

}  // namespace

void start(Block& block, const Launch& launch, uint64_t index) {
  const Entry& entry = *launch.entry;
  const uint32_t warps = static_cast<uint32_t>(launch.block.count() / kLanes);
  const bool fresh = block.files.empty();
  block.launch = &launch;
  block.index = index;
  block.shared.assign(launch.shared_bytes, 0xFF);
  block.races.assign(config.race ? launch.shared_bytes : 0, SharedByte{});
  block.epoch = 1;
  block.triggered = block.done = false;
  block.may_pass_wait = !launch.programmatic || !config.early;
  block.files.resize(size_t{entry.file_bytes} * warps + kFileAlignment);
  const uintptr_t misaligned = reinterpret_cast<uintptr_t>(block.files.data()) % kFileAlignment;
  unsigned char* files = block.files.data() + (kFileAlignment - misaligned) % kFileAlignment;
  block.warps.assign(warps, Warp{});
  for (uint32_t i = 0; i < warps; ++i) {
    Warp& warp = block.warps[i];
    warp.registers = files + size_t{entry.file_bytes} * i;
    warp.block = &block;
    warp.number = static_cast<int>(i);
    warp.lanes = warp.live = kAllLanes;
    warp.dependent = launch.programmatic;
    if (fresh) {
      fill_with_garbage(warp.registers, entry.file_bytes);
      set_constants(warp, entry);
    }
    for (const auto& [name, offset] : entry.special) {
      for (uint32_t lane = 0; lane < kLanes; ++lane) {
        lanes_of<uint32_t>(warp, offset)[lane] = special_value(name, launch, index, i * kLanes + lane);
      }
    }
  }
}

}  // namespace ptx
