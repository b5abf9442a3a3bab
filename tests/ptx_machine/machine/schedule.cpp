// Who runs when: the warps of a block, the lanes of a warp.
#include <algorithm>
#include <random>

#include "state.h"

namespace ptx {
namespace {

std::mt19937_64 generator;

// config.lanes
enum { kLowestFirst, kHighestFirst, kRandomLanes, kLanesAlone };

template <class T>
T take(std::vector<T>& from, size_t index) {
  T taken = from[index];
  from[index] = from.back();
  from.pop_back();
  return taken;
}

void go_on_with(Warp& warp, size_t party) {
  const Party chosen = take(warp.others, party);
  warp.at = chosen.at;
  warp.lanes = chosen.lanes;
}

// Parties at the same instruction become one. With lanes alone, only those that wait do.
void merge(Warp& warp) {
  auto& others = warp.others;
  for (size_t i = 0; i < others.size(); ++i) {
    for (size_t k = i + 1; k < others.size();) {
      const bool both_wait = others[i].waiting && others[k].waiting;
      if (others[k].at == others[i].at && (both_wait || config.lanes != kLanesAlone)) {
        others[i].waiting = both_wait;
        others[i].lanes |= take(others, k).lanes;
      } else {
        ++k;
      }
    }
    // Those that it waited for may have left since.
    if (others[i].lanes == warp.live) others[i].waiting = false;
  }
}

[[noreturn]] void fail_stuck(const Warp& warp) {
  std::string text = "lanes of a warp wait for each other at different instructions:";
  for (const Party& party : warp.others) {
    const Instruction& at = warp.block->launch->entry->code[static_cast<size_t>(party.at)];
    text += " [" + std::to_string(__builtin_popcount(party.lanes)) + " at line " + std::to_string(at.line) + ": " +
            at.text + "]";
  }
  fail(text + " of " + std::to_string(__builtin_popcount(warp.live)) + " lanes");
}

// The lanes that run step back, and a party is chosen to go on.
void choose(Warp& warp, bool waits) {
  if (warp.lanes) warp.others.push_back({warp.at, warp.lanes, waits});
  warp.lanes = 0;
  merge(warp);
  int best = -1;
  uint64_t able = 0;
  for (size_t i = 0; i < warp.others.size(); ++i) {
    const Party& party = warp.others[i];
    if (party.waiting) continue;
    ++able;
    const bool better = best < 0 || (config.lanes == kLowestFirst    ? party.at < warp.others[best].at
                                     : config.lanes == kHighestFirst ? party.at > warp.others[best].at
                                                                     : draw(able) == 0);
    if (better) best = static_cast<int>(i);
  }
  if (best < 0) fail_stuck(warp);
  go_on_with(warp, static_cast<size_t>(best));
}

// Every lane for itself, until the next instruction that wants them all.
void scatter(Warp& warp) {
  for (uint32_t lanes = warp.lanes; lanes; lanes &= lanes - 1) warp.others.push_back({warp.at, lanes & -lanes, false});
  go_on_with(warp, draw(warp.others.size()));
}

// Whether others are where this party is, or should go first.
bool should_choose(const Warp& warp) {
  if (warp.others.empty() || config.lanes == kLanesAlone) return false;
  if (config.lanes == kRandomLanes && draw(8) == 0) return true;
  return std::any_of(warp.others.begin(), warp.others.end(), [&](const Party& other) {
    if (other.at == warp.at) return true;
    if (other.waiting) return false;
    return config.lanes == kLowestFirst ? other.at < warp.at : config.lanes == kHighestFirst && other.at > warp.at;
  });
}

uint32_t lanes_for(Warp& warp, const Instruction& instruction) {
  if (instruction.guard < 0) return warp.lanes;
  const uint32_t predicate = *lanes_of<uint32_t>(warp, static_cast<uint32_t>(instruction.guard));
  return warp.lanes & (instruction.guard_negated ? ~predicate : predicate);
}

void branch(Warp& warp, const Instruction& instruction, uint32_t lanes) {
  if (lanes == warp.lanes) {
    warp.at = instruction.target;
    return;
  }
  ++warp.at;
  if (!lanes) return;
  warp.others.push_back({instruction.target, lanes, false});
  warp.lanes &= ~lanes;
  if (config.lanes != kLowestFirst) choose(warp, false);
}

// One instruction of the lanes that run. False: the warp cannot go on for now, or for ever.
bool step(Warp& warp) {
  Block& block = *warp.block;
  const Instruction& instruction = block.launch->entry->code[static_cast<size_t>(warp.at)];
  const bool wants_all =
      instruction.kind == Kind::warp || instruction.kind == Kind::barrier || instruction.kind == Kind::wait;
  if (wants_all && warp.lanes != warp.live) {
    choose(warp, true);
    return true;
  }
  if (instruction.kind == Kind::wait && !block.may_pass_wait) {
    warp.at_wait = true;
    return false;
  }
  ++instruction.counts.hits;
  ++statistics.instructions;
  const uint32_t lanes = lanes_for(warp, instruction);
  switch (instruction.kind) {
    case Kind::lanes:
      if (lanes) instruction.handler(warp, instruction, lanes);
      ++warp.at;
      break;
    case Kind::branch:
      branch(warp, instruction, lanes);
      break;
    case Kind::warp:
      if (warp.live != kAllLanes) fail("an instruction of the whole warp after lanes have left");
      instruction.handler(warp, instruction, kAllLanes);
      ++warp.at;
      if (config.lanes == kLanesAlone) scatter(warp);
      return true;
    case Kind::barrier:
      ++warp.at;
      warp.at_barrier = true;
      return false;
    case Kind::exit:
      ++warp.at;
      warp.live &= ~lanes;
      warp.lanes &= ~lanes;
      if (!warp.live) {
        for (const Copy& copy : warp.copies) statistics.never_waited += copy.bytes > 0;
        return false;
      }
      if (!warp.lanes) choose(warp, false);
      return true;
    case Kind::trap:
      if (lanes) fail("trap");
      ++warp.at;
      break;
    case Kind::wait:
      ++warp.at;
      warp.dependent = false;
      break;
    case Kind::trigger: {
      // device.h's rule: before its wait the next launch may read what any launch before this one has written.
      if (lanes && warp.dependent) fail("launch_dependents before griddepcontrol.wait");
      ++warp.at;
      const bool pause = lanes && config.early && !block.triggered;
      block.triggered |= lanes != 0;
      if (pause) return false;
      break;
    }
  }
  if (should_choose(warp)) choose(warp, false);
  return true;
}

// Until the warp cannot go on, or has had its slice.
void run(Warp& warp, uint64_t slice) {
  if (config.lanes == kLanesAlone && warp.at == 0 && warp.others.empty()) scatter(warp);
  try {
    while (slice-- > 0 && step(warp)) {
    }
  } catch (const std::runtime_error& error) {
    const Instruction& at = warp.block->launch->entry->code[static_cast<size_t>(warp.at)];
    fail(std::string(error.what()) + " | warp " + std::to_string(warp.number) + " line " + std::to_string(at.line) +
         ": " + at.text);
  }
}

void release_barrier(Block& block) {
  ++block.epoch;
  // Who has waited for the launch before has waited for all that meet here.
  const bool dependent = std::all_of(block.warps.begin(), block.warps.end(), [](Warp& w) { return w.dependent; });
  for (Warp& warp : block.warps) {
    warp.at_barrier = false;
    warp.dependent = dependent;
    ++warp.epoch;
    if (config.lanes == kLanesAlone && warp.live) scatter(warp);
  }
}

}  // namespace

void seed_draws(uint64_t seed) { generator.seed(seed); }
uint64_t draw(uint64_t below) { return generator() % below; }

void run(Block& block) {
  for (;;) {
    std::vector<size_t> able;
    bool all_left = true, all_at_barrier = true;
    for (size_t i = 0; i < block.warps.size(); ++i) {
      Warp& warp = block.warps[i];
      if (!warp.live) continue;
      all_left = false;
      if (warp.at_barrier) continue;
      all_at_barrier = false;
      if (block.may_pass_wait) warp.at_wait = false;
      if (!warp.at_wait) able.push_back(i);
    }
    block.done = all_left;
    if (all_left) return;
    if (all_at_barrier) {
      release_barrier(block);
      continue;
    }
    if (able.empty()) return;  // until the launch before is complete
    const size_t chosen = config.warps == 0 ? able.front() : config.warps == 1 ? able.back() : able[draw(able.size())];
    const bool before = block.triggered;
    run(block.warps[chosen], config.warps == 2 ? 1 + draw(60) : UINT64_MAX);
    if (config.early && block.triggered != before) return;
  }
}

}  // namespace ptx
