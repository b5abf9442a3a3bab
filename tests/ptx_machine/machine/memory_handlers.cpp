// ld, st, cvta, cp.async.
#include <algorithm>
#include <cstring>

#include "handlers.h"
#include "memory.h"
#include "tokens.h"

namespace ptx {
namespace {

uint64_t address_of(Warp& warp, const Instruction& in, int operand, int64_t offset, int lane) {
  if (in.address_64) return lanes_of<uint64_t>(warp, in.operand[operand])[lane] + static_cast<uint64_t>(offset);
  return lanes_of<uint32_t>(warp, in.operand[operand])[lane] + static_cast<uint32_t>(offset);
}

// What `seen` accesses of one instruction cost.
void count_traffic(Space space, const Instruction& in, uint64_t* addresses, int seen, unsigned bytes) {
  if (space == Space::generic) {
    // To one space or the other, lane by lane; parameters cost nothing.
    const auto inside = [](uint64_t window) {
      return [=](uint64_t address) { return (address & kWindowMask) == (window & kWindowMask); };
    };
    uint64_t* shared = std::stable_partition(addresses, addresses + seen, inside(kSharedWindow));
    uint64_t* params = std::stable_partition(shared, addresses + seen, inside(kParamWindow));
    count_traffic(Space::shared, in, addresses, static_cast<int>(shared - addresses), bytes);
    count_traffic(Space::global, in, params, static_cast<int>(addresses + seen - params), bytes);
  }
  if (space == Space::shared) count_shared(in, addresses, seen, bytes);
  if (space == Space::global) count_global(in, addresses, seen, bytes);
}

// `length` values of type T between memory and registers R, which may be wider.
template <bool load, Space space, class T, class R, int length>
void load_or_store(Warp& warp, const Instruction& in, uint32_t lanes) {
  constexpr unsigned kBytes = sizeof(T) * length;
  uint64_t addresses[kLanes];
  int seen = 0;
  for (; lanes; lanes &= lanes - 1) {
    const int lane = __builtin_ctz(lanes);
    const uint64_t address = address_of(warp, in, 0, in.immediate, lane);
    addresses[seen++] = address;
    if (in.non_coherent) require_unwritten(address);
    unsigned char* data = access<space, !load>(warp, address, kBytes, lane);
    T values[length];
    if constexpr (load) {
      std::memcpy(values, data, kBytes);
      for (int k = 0; k < length; ++k) {
        R& target = lanes_of<R>(warp, in.operand[1 + k])[lane];
        // Signed values of a wider register are extended.
        if constexpr (std::is_signed_v<T>) {
          target = static_cast<R>(static_cast<std::make_signed_t<R>>(values[k]));
        } else {
          target = static_cast<R>(values[k]);
        }
      }
    } else {
      for (int k = 0; k < length; ++k) values[k] = static_cast<T>(lanes_of<R>(warp, in.operand[1 + k])[lane]);
      std::memcpy(data, values, kBytes);
    }
  }
  if (config.traffic) count_traffic(space, in, addresses, seen, kBytes);
}

template <bool load, Space space, class T, class R>
Handler with_vector(int count) {
  if constexpr (sizeof(T) <= 8) {
    if (count == 1) return load_or_store<load, space, T, R, 1>;
    if (count == 2) return load_or_store<load, space, T, R, 2>;
    if (count == 4 && sizeof(T) <= 4) return load_or_store<load, space, T, R, 4>;
  }
  return nullptr;
}
template <bool load, Space space, class T>
Handler with_width(int count, int width) {
  if constexpr (sizeof(T) <= 2) {
    if (width == 16) return with_vector<load, space, T, uint16_t>(count);
  }
  if constexpr (sizeof(T) <= 4) {
    if (width == 32) return with_vector<load, space, T, uint32_t>(count);
  }
  return width == 64 ? with_vector<load, space, T, uint64_t>(count) : nullptr;
}
template <bool load, Space space>
Handler with_type(const std::string& type, int count, int width) {
  if (type == "u8" || type == "b8") return with_width<load, space, uint8_t>(count, width);
  if (type == "s8") return with_width<load, space, int8_t>(count, width);
  if (type == "u16" || type == "b16") return with_width<load, space, uint16_t>(count, width);
  if (type == "s16") return with_width<load, space, int16_t>(count, width);
  if (type == "u32" || type == "b32" || type == "f32") return with_width<load, space, uint32_t>(count, width);
  if (type == "s32") return with_width<load, space, int32_t>(count, width);
  if (type == "u64" || type == "b64" || type == "s64" || type == "f64") {
    return with_width<load, space, uint64_t>(count, width);
  }
  return nullptr;
}

// ------------------------------------------------------------------------------------------------ addresses

template <uint64_t window>
void to_generic(Warp& warp, const Instruction& in, uint32_t lanes) {
  uint64_t* d = lanes_of<uint64_t>(warp, in.operand[0]);
  const uint64_t* a = lanes_of<uint64_t>(warp, in.operand[1]);
  for_each_lane(lanes, [&](int lane) { d[lane] = a[lane] + window; });
}
template <uint64_t window>
void from_generic(Warp& warp, const Instruction& in, uint32_t lanes) {
  uint64_t* d = lanes_of<uint64_t>(warp, in.operand[0]);
  const uint64_t* a = lanes_of<uint64_t>(warp, in.operand[1]);
  for_each_lane(lanes, [&](int lane) {
    // A global address of null, or of what nobody will touch, is converted all the same.
    if (window && (a[lane] & kWindowMask) != (window & kWindowMask)) fail("cvta.to of an address elsewhere");
    d[lane] = a[lane] - window;
  });
}

// ------------------------------------------------------------------------------------------------ cp.async

void land(Warp& warp, const Copy& copy) {
  unsigned char* target = shared_bytes(warp, copy.target, copy.bytes);
  std::memset(target, 0, copy.bytes);
  if (copy.read_bytes) {
    std::memcpy(target, global_bytes(warp, copy.source, copy.read_bytes, false, copy.lane), copy.read_bytes);
  }
}

template <unsigned size>
void async_copy(Warp& warp, const Instruction& in, uint32_t lanes) {
  uint64_t targets[kLanes], sources[kLanes];
  int copies = 0, reads = 0;
  for (; lanes; lanes &= lanes - 1) {
    const int lane = __builtin_ctz(lanes);
    const uint32_t target = lanes_of<uint32_t>(warp, in.operand[0])[lane] + static_cast<uint32_t>(in.immediate);
    const uint64_t source = lanes_of<uint64_t>(warp, in.operand[1])[lane] + static_cast<uint64_t>(in.second_immediate);
    const Copy copy{lane, warp.groups[lane], target, source, size, lanes_of<uint32_t>(warp, in.operand[2])[lane]};
    if (copy.read_bytes > size) fail("cp.async reads more than it writes");
    require_aligned(copy.target, size);
    require_aligned(copy.source, size);
    unsigned char* bytes = shared_bytes(warp, copy.target, size);
    if (copy.read_bytes) global_bytes(warp, copy.source, copy.read_bytes, false, lane);
    if (config.race) note_copy_start(warp, copy.target - kSharedBase, size, lane);
    if (config.late) {
      std::memset(bytes, 0xFF, size);  // NaN until it is waited for
    } else {
      land(warp, copy);
    }
    warp.copies.push_back(copy);
    targets[copies++] = copy.target;
    if (copy.read_bytes) sources[reads++] = copy.source;
  }
  if (config.traffic) {
    count_shared(in, targets, copies, size);
    count_global(in, sources, reads, size);
  }
}

// Lands the copies of lanes of which `is_due` says so.
template <class F>
void land_due(Warp& warp, uint32_t lanes, const F& is_due) {
  const auto lands = [&](const Copy& copy) { return (lanes >> copy.lane & 1u) && is_due(copy); };
  for (const Copy& copy : warp.copies) {
    if (!lands(copy)) continue;
    if (config.late) land(warp, copy);
    if (config.race) note_copy_end(warp, copy.target - kSharedBase, copy.bytes, copy.lane);
  }
  warp.copies.erase(std::remove_if(warp.copies.begin(), warp.copies.end(), lands), warp.copies.end());
}

}  // namespace

Handler memory_of(bool load, const std::string& space, const std::string& type, int vector, int width) {
  using enum Space;
  if (space == "global")
    return load ? with_type<true, global>(type, vector, width) : with_type<false, global>(type, vector, width);
  if (space == "shared")
    return load ? with_type<true, shared>(type, vector, width) : with_type<false, shared>(type, vector, width);
  if (space == "param") return load ? with_type<true, param>(type, vector, width) : nullptr;
  return load ? with_type<true, generic>(type, vector, width) : with_type<false, generic>(type, vector, width);
}

Handler address_conversion(const Words& words) {
  const std::string name = join(words);
  if (name == "cvta.global.u64") return to_generic<0>;
  if (name == "cvta.shared.u64") return to_generic<kSharedWindow>;
  if (name == "cvta.param.u64") return to_generic<kParamWindow>;
  if (name == "cvta.to.global.u64") return from_generic<0>;
  if (name == "cvta.to.shared.u64") return from_generic<kSharedWindow>;
  if (name == "cvta.to.param.u64") return from_generic<kParamWindow>;
  return nullptr;
}

Handler async_copy_of(int size) {
  return size == 4 ? async_copy<4> : size == 8 ? async_copy<8> : size == 16 ? async_copy<16> : nullptr;
}
void async_copy_commit(Warp& warp, const Instruction&, uint32_t lanes) {
  for_each_lane(lanes, [&](int lane) { ++warp.groups[lane]; });
}
void async_copy_wait(Warp& warp, const Instruction& in, uint32_t lanes) {
  land_due(warp, lanes, [&](const Copy& copy) {
    return static_cast<int64_t>(copy.group) + in.immediate < static_cast<int64_t>(warp.groups[copy.lane]);
  });
}
void async_copy_wait_all(Warp& warp, const Instruction&, uint32_t lanes) {
  land_due(warp, lanes, [](const Copy&) { return true; });
}

}  // namespace ptx
