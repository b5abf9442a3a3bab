// What lanes of a warp tell each other: shfl, vote, match, activemask, bar.warp.sync. Always among all 32: a mask of
// fewer is an error.
#include "elementwise.h"

namespace ptx {
namespace {

void require_all(Warp& warp, const Instruction& in, int operand) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (lanes_of<uint32_t>(warp, in.operand[operand])[lane] != kAllLanes) fail("a mask of less than the warp");
  }
}
void give_all(Warp& warp, const Instruction& in, uint32_t bits) {
  for (int lane = 0; lane < kLanes; ++lane) lanes_of<uint32_t>(warp, in.operand[0])[lane] = bits;
}
uint32_t votes(Warp& warp, const Instruction& in) {
  require_all(warp, in, 2);
  return *lanes_of<uint32_t>(warp, in.operand[1]);
}

void warp_sync(Warp& warp, const Instruction& in, uint32_t) {
  require_all(warp, in, 0);
  ++warp.epoch;
}

void active_mask(Warp& warp, const Instruction& in, uint32_t lanes) {
  for_each_lane(lanes, [&](int lane) { lanes_of<uint32_t>(warp, in.operand[0])[lane] = warp.lanes; });
}

void vote_ballot(Warp& warp, const Instruction& in, uint32_t) { give_all(warp, in, votes(warp, in)); }
void vote_all(Warp& warp, const Instruction& in, uint32_t) {
  *lanes_of<uint32_t>(warp, in.operand[0]) = votes(warp, in) == kAllLanes ? kAllLanes : 0;
}
void vote_any(Warp& warp, const Instruction& in, uint32_t) {
  *lanes_of<uint32_t>(warp, in.operand[0]) = votes(warp, in) ? kAllLanes : 0;
}
void vote_uniform(Warp& warp, const Instruction& in, uint32_t) {
  const uint32_t bits = votes(warp, in);
  *lanes_of<uint32_t>(warp, in.operand[0]) = bits == 0 || bits == kAllLanes ? kAllLanes : 0;
}

template <class T>
void match_any(Warp& warp, const Instruction& in, uint32_t) {
  require_all(warp, in, 2);
  const T* a = lanes_of<T>(warp, in.operand[1]);
  uint32_t same[kLanes] = {};
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int other = 0; other < kLanes; ++other) same[lane] |= static_cast<uint32_t>(a[lane] == a[other]) << other;
  }
  for (int lane = 0; lane < kLanes; ++lane) lanes_of<uint32_t>(warp, in.operand[0])[lane] = same[lane];
}
template <class T>
void match_all(Warp& warp, const Instruction& in, uint32_t) {
  require_all(warp, in, 3);
  const T* a = lanes_of<T>(warp, in.operand[2]);
  bool same = true;
  for (int lane = 1; lane < kLanes; ++lane) same &= a[lane] == a[0];
  *lanes_of<uint32_t>(warp, in.operand[1]) = same ? kAllLanes : 0;
  give_all(warp, in, same ? kAllLanes : 0);
}

// Operands: value, predicate "the source was inside of the segment", then a, b, c and the mask. c: the segments, and
// how far b may lead, as the instruction set has it.
enum class Shuffle { up, down, butterfly, index };
template <Shuffle mode>
void shuffle(Warp& warp, const Instruction& in, uint32_t) {
  require_all(warp, in, 5);
  const uint32_t *a = lanes_of<uint32_t>(warp, in.operand[2]), *b = lanes_of<uint32_t>(warp, in.operand[3]);
  const uint32_t* c = lanes_of<uint32_t>(warp, in.operand[4]);
  uint32_t values[kLanes], inside = 0;
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    const uint32_t step = b[lane] & 31, clamp = c[lane] & 31, segment = c[lane] >> 8 & 31;
    const uint32_t last = (lane & segment) | (clamp & ~segment), first = lane & segment;
    // A source below the warp wraps around to something larger than any lane.
    const uint32_t from = mode == Shuffle::up          ? lane - step
                          : mode == Shuffle::down      ? lane + step
                          : mode == Shuffle::butterfly ? lane ^ step
                                                       : first | (step & ~segment);
    const bool valid = mode == Shuffle::up ? static_cast<int32_t>(from) >= static_cast<int32_t>(last) : from <= last;
    values[lane] = a[valid ? from : lane];
    inside |= static_cast<uint32_t>(valid) << lane;
  }
  for (int lane = 0; lane < kLanes; ++lane) lanes_of<uint32_t>(warp, in.operand[0])[lane] = values[lane];
  *lanes_of<uint32_t>(warp, in.operand[1]) = inside;
}

}  // namespace

Signature exchange(const Words& words) {
  const std::string &family = words[0], how = middle(words), &type = words.back();
  const auto whole = [](Handler handler, std::vector<int> targets, std::vector<int> sources, bool optional = false) {
    return Signature{handler, std::move(targets), std::move(sources), optional, Kind::warp};
  };
  if (family == "bar" && how == "warp" && type == "sync") return whole(warp_sync, {}, {32});
  if (family == "activemask" && type == "b32") return {active_mask, {32}, {}};
  if (family == "vote" && how == "sync.ballot" && type == "b32") return whole(vote_ballot, {32}, {1, 32});
  if (family == "vote" && type == "pred") {
    if (how == "sync.all") return whole(vote_all, {1}, {1, 32});
    if (how == "sync.any") return whole(vote_any, {1}, {1, 32});
    if (how == "sync.uni") return whole(vote_uniform, {1}, {1, 32});
  }
  if (family == "match" && how == "any.sync") {
    if (type == "b32") return whole(match_any<uint32_t>, {32}, {32, 32});
    if (type == "b64") return whole(match_any<uint64_t>, {32}, {64, 32});
  }
  if (family == "match" && how == "all.sync") {
    if (type == "b32") return whole(match_all<uint32_t>, {32, 1}, {32, 32}, true);
    if (type == "b64") return whole(match_all<uint64_t>, {32, 1}, {64, 32}, true);
  }
  if (family == "shfl" && type == "b32") {
    const std::vector<int> targets = {32, 1}, sources = {32, 32, 32, 32};
    if (how == "sync.up") return whole(shuffle<Shuffle::up>, targets, sources, true);
    if (how == "sync.down") return whole(shuffle<Shuffle::down>, targets, sources, true);
    if (how == "sync.bfly") return whole(shuffle<Shuffle::butterfly>, targets, sources, true);
    if (how == "sync.idx") return whole(shuffle<Shuffle::index>, targets, sources, true);
  }
  return {};
}

}  // namespace ptx
