// Launches: one after the other, or, with Config::early, overlapping as far as programmatic dependent launch allows.
#include <algorithm>
#include <deque>
#include <numeric>
#include <utility>

#include "state.h"

namespace ptx {
namespace {

std::deque<Launch> kept;  // by submit, for flush

std::vector<uint64_t> order_of_blocks(uint64_t count) {
  std::vector<uint64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (config.blocks == 1) std::reverse(order.begin(), order.end());
  if (config.blocks == 2) {
    for (uint64_t i = count; i > 1; --i) std::swap(order[i - 1], order[draw(i)]);
  }
  return order;
}

void run_with_place(Block& block) {
  try {
    run(block);
  } catch (const std::runtime_error& error) {
    fail(std::string(error.what()) + " | block " + std::to_string(block.index) + " of " + block.launch->entry->name);
  }
}

// One block after the other, in the memory of the first.
void run_alone(const Launch& launch) {
  Block block;
  for (const uint64_t index : order_of_blocks(launch.grid.count())) {
    start(block, launch, index);
    run_with_place(block);
  }
}

// A launch whose blocks pause: at griddepcontrol.wait until the launch before it is complete, and once where they
// trigger the launch behind it.
struct Grid {
  explicit Grid(const Launch& of) : launch(&of) {}

  void advance(bool may_pass_wait) {
    if (blocks.empty()) {
      const std::vector<uint64_t> order = order_of_blocks(launch->grid.count());
      blocks.resize(order.size());
      for (size_t i = 0; i < order.size(); ++i) start(blocks[i], *launch, order[i]);
    }
    for (Block& block : blocks) {
      if (block.done) continue;
      block.may_pass_wait |= may_pass_wait;
      run_with_place(block);
    }
    if (complete()) {
      for (Block& block : blocks) block.files = {}, block.shared = {};
    }
  }
  bool started() const { return !blocks.empty(); }
  bool complete() const {
    return started() && std::all_of(blocks.begin(), blocks.end(), [](const Block& b) { return b.done; });
  }
  bool triggered() const {
    return started() && std::all_of(blocks.begin(), blocks.end(), [](const Block& b) { return b.done || b.triggered; });
  }
  // Whether advance() would do something.
  bool able(bool may_pass_wait) const {
    return std::any_of(blocks.begin(), blocks.end(), [&](const Block& block) {
      const bool waits = std::all_of(block.warps.begin(), block.warps.end(),
                                     [](const Warp& w) { return !w.live || w.at_wait || w.at_barrier; });
      return !block.done && (!waits || may_pass_wait);
    });
  }

  const Launch* launch;
  std::vector<Block> blocks;
};

}  // namespace

void discard() { kept.clear(); }

void submit(Launch launch) {
  static uint64_t threads = 1;
  if (launch.block.count() % kLanes) fail("a block that is not whole warps");
  ++statistics.launches;
  launch.first_thread = threads;
  threads += launch.grid.count() * launch.block.count();
  if (config.early) {
    kept.push_back(std::move(launch));
    return;
  }
  seed_draws(static_cast<uint64_t>(config.seed));
  run_alone(launch);
}

// The schedule that hurts most: always the last launch that may go on does. What a launch may rely on is only that the
// one before it is complete when its griddepcontrol.wait returns, and that one's own wait, if it had any, before that.
void flush() {
  const std::deque<Launch> launches = std::exchange(kept, {});
  seed_draws(static_cast<uint64_t>(config.seed));
  std::vector<Grid> grids(launches.begin(), launches.end());
  for (;;) {
    size_t complete = 0;  // launches that are, with all before them
    while (complete < grids.size() && grids[complete].complete()) ++complete;
    if (complete == grids.size()) return;
    for (size_t i = grids.size(); i-- > complete;) {
      const bool first = i == complete, before_complete = first || grids[i - 1].complete();
      const bool may_start = first || (launches[i].programmatic && grids[i - 1].triggered());
      if (grids[i].complete() || !(grids[i].started() ? grids[i].able(before_complete) : may_start)) continue;
      statistics.overlapped += !grids[i].started() && !before_complete;
      grids[i].advance(before_complete);
      break;
    }
  }
}

}  // namespace ptx
