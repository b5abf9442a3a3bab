// Blocks, warps and lanes: who runs when, and what they may touch.
#include "machine.h"

#include <algorithm>
#include <bit>
#include <random>

namespace ptx {

Config config;
Stats stats;
std::vector<Range> ranges;

void fail(const std::string& what) { throw std::runtime_error(what); }

namespace {

std::mt19937_64 random_bits;
uint64_t draw(uint64_t below) { return random_bits() % below; }

std::string hex(uint64_t v) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(v));
  return text;
}

}  // namespace

// ------------------------------------------------------------------------------------------------ memory

unsigned char* shared_at(Warp& w, uint64_t address, unsigned bytes) {
  const size_t size = w.block->shared.size();
  if (address < kSharedBase || address - kSharedBase + bytes > size) {
    fail("outside of shared memory: byte " + std::to_string(static_cast<int64_t>(address) - kSharedBase) + " of " +
         std::to_string(size));
  }
  return w.block->shared.data() + (address - kSharedBase);
}

void shared_write(Warp& w, uint64_t address, unsigned bytes, int lane) {
  const int thread = w.number * kLanes + lane;
  for (unsigned k = 0; k < bytes; ++k) {
    Shadow& s = w.block->shadow[address - kSharedBase + k];
    const auto where = [&] {
      return " at byte " + std::to_string(address - kSharedBase + k) + " of shared memory, thread " +
             std::to_string(thread);
    };
    if (s.pending >= 0) fail("race: write over a cp.async in flight of thread " + std::to_string(s.pending) + where());
    if (s.writer >= 0 && s.writer != thread && s.write_block == w.block->epoch) {
      const bool mine = s.writer / kLanes == w.number;
      if (!mine || s.write_warp == w.epoch)
        fail("race: write after write of thread " + std::to_string(s.writer) + where());
    }
    if (s.read_block == w.block->epoch) {
      if (s.read_warps & ~(1u << w.number)) fail("race: write after read of another warp" + where());
      if (s.read_warp == w.epoch && (s.read_lanes & ~(1u << lane)))
        fail("race: write after read of another lane" + where());
    }
    s.writer = static_cast<int16_t>(thread);
    s.write_block = w.block->epoch, s.write_warp = w.epoch;
  }
}

void shared_read(Warp& w, uint64_t address, unsigned bytes, uint32_t lanes) {
  for (unsigned k = 0; k < bytes; ++k) {
    Shadow& s = w.block->shadow[address - kSharedBase + k];
    const auto where = [&] {
      return " at byte " + std::to_string(address - kSharedBase + k) + " of shared memory, warp " +
             std::to_string(w.number);
    };
    if (s.pending >= 0) fail("race: read of a cp.async in flight of thread " + std::to_string(s.pending) + where());
    if (s.writer < 0)
      ++stats.unwritten;  // not an error in itself: it may be thrown away
    else if (s.write_block == w.block->epoch) {
      const bool mine = s.writer / kLanes == w.number;
      if (!mine || (s.write_warp == w.epoch && (lanes & ~(1u << s.writer % kLanes)))) {
        fail("race: read after write of thread " + std::to_string(s.writer) + where());
      }
    }
    if (s.read_block != w.block->epoch) s.read_block = w.block->epoch, s.read_warps = 0, s.read_warp = 0;
    s.read_warps |= 1u << w.number;
    if (s.read_warp != w.epoch || !(s.read_warps == 1u << w.number)) s.read_warp = w.epoch, s.read_lanes = 0;
    s.read_lanes |= lanes;
  }
}

unsigned char* global_at(Warp& w, uint64_t address, unsigned bytes, bool write, int lane) {
  static size_t last = 0;
  if (last >= ranges.size() || address < ranges[last].lo || address + bytes > ranges[last].hi) {
    for (last = 0; last < ranges.size(); ++last) {
      if (address >= ranges[last].lo && address + bytes <= ranges[last].hi) break;
    }
    if (last == ranges.size()) {
      std::string near;
      for (const Range& r : ranges) {
        if (address + 4096 > r.lo && address < r.hi + 4096)
          near += "; a buffer is [" + hex(r.lo) + ", " + hex(r.hi) + ")";
      }
      fail(std::string(write ? "write" : "read") + " outside of every buffer: " + std::to_string(bytes) + " bytes at " +
           hex(address) + near);
    }
  }
  Range& r = ranges[last];
  if (write && !r.writable) fail("write to an input at " + hex(address));
  if (config.race && r.writable) {
    const uint32_t thread = w.block->first_thread + static_cast<uint32_t>(w.number * kLanes + lane) + 1;
    if (r.writer.empty()) r.writer.resize(r.hi - r.lo);
    for (unsigned k = 0; k < bytes; ++k) {
      uint32_t& writer = r.writer[address - r.lo + k];
      if (writer && writer != thread)
        fail(std::string("race: ") + (write ? "write" : "read") +
             " of global memory that another thread of the launch wrote, at " + hex(address));
      if (write) writer = thread;
    }
  }
  return reinterpret_cast<unsigned char*>(address);
}

// ------------------------------------------------------------------------------------------------ traffic

void count_shared(const Ins& in, const uint64_t* address, int n, unsigned bytes) {
  // 4 bytes a lane go in one cycle, 8 in two halves, 16 in four quarters, where every bank serves one word.
  const int lanes = bytes <= 4 ? 32 : static_cast<int>(128 / bytes);
  std::vector<uint64_t> all;
  for (int first = 0; first < n; first += lanes) {
    std::vector<uint64_t> words;
    for (int i = first; i < std::min(n, first + lanes); ++i) {
      for (uint64_t word = address[i] / 4; word <= (address[i] + bytes - 1) / 4; ++word) words.push_back(word);
    }
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    uint64_t bank[32] = {}, most = 0;
    for (const uint64_t word : words) most = std::max(most, ++bank[word % 32]);
    in.cycles += most;
    ++in.ideal;
  }
}

void count_global(const Ins& in, const uint64_t* address, int n, unsigned bytes) {
  std::vector<uint64_t> sectors, all;
  for (int i = 0; i < n; ++i) {
    sectors.push_back(address[i] / 32);
    for (unsigned k = 0; k < bytes; ++k) all.push_back(address[i] + k);
  }
  for (auto* v : {&sectors, &all}) {
    std::sort(v->begin(), v->end());
    v->erase(std::unique(v->begin(), v->end()), v->end());
  }
  in.sectors += sectors.size();
  in.least += (all.size() + 31) / 32;
}

// ------------------------------------------------------------------------------------------------ warps

namespace {

// Brings splits at the same instruction together and chooses one to go on. False: none can.
bool choose(Warp& w, bool keep_waiting) {
  if (w.mask) w.others.push_back({w.pc, w.mask, keep_waiting});
  w.mask = 0;
  auto& o = w.others;
  for (size_t i = 0; i < o.size(); ++i) {
    for (size_t k = i + 1; k < o.size();) {
      if (o[k].pc == o[i].pc) {
        o[i].mask |= o[k].mask;
        o[i].waiting = (o[i].waiting || o[k].waiting) && o[i].mask != w.live;
        o[k] = o.back();
        o.pop_back();
      } else {
        ++k;
      }
    }
    // Others may have left since it started to wait.
    if (o[i].mask == w.live) o[i].waiting = false;
  }
  int best = -1, runnable = 0;
  for (size_t i = 0; i < o.size(); ++i) {
    if (o[i].waiting) continue;
    ++runnable;
    const bool better = best < 0 || (config.lanes == 0   ? o[i].pc < o[best].pc
                                     : config.lanes == 1 ? o[i].pc > o[best].pc
                                                         : draw(runnable) == 0);
    if (better) best = static_cast<int>(i);
  }
  if (best < 0) return false;
  w.pc = o[best].pc;
  w.mask = o[best].mask;
  o[best] = o.back();
  o.pop_back();
  return true;
}

[[noreturn]] void stuck(const Warp& w, const std::vector<Ins>& code) {
  std::string text = "lanes of a warp wait for each other at different instructions:";
  for (const Split& s : w.others)
    text += " [" + hex(s.mask) + " at line " + std::to_string(code[s.pc].line) + ": " + code[s.pc].text + "]";
  fail(text + " of lanes " + hex(w.live));
}

// Every lane alone, from here to the next instruction that wants them all.
void scatter(Warp& w) {
  for (uint32_t m = w.mask; m; m &= m - 1) w.others.push_back({w.pc, m & -m, false});
  const size_t pick = draw(w.others.size());
  w.mask = w.others[pick].mask;
  w.others[pick] = w.others.back();
  w.others.pop_back();
}
// As choose, but without bringing together those that do not wait.
bool choose_alone(Warp& w, bool waits) {
  auto& o = w.others;
  if (w.mask && waits) {
    bool found = false;
    for (Split& s : o) {
      if (s.waiting && s.pc == w.pc) s.mask |= w.mask, found = true;
    }
    if (!found) o.push_back({w.pc, w.mask, true});
  } else if (w.mask) {
    o.push_back({w.pc, w.mask, false});
  }
  w.mask = 0;
  for (size_t i = 0; i < o.size(); ++i) {
    if (o[i].waiting && o[i].mask == w.live) o[i].waiting = false;
  }
  std::vector<size_t> able;
  for (size_t i = 0; i < o.size(); ++i) {
    if (!o[i].waiting) able.push_back(i);
  }
  if (able.empty()) return false;
  const size_t pick = able[draw(able.size())];
  w.pc = o[pick].pc, w.mask = o[pick].mask;
  o[pick] = o.back();
  o.pop_back();
  return true;
}

// Until the warp waits at a barrier, is done, or has had its slice.
void run(Warp& w, int64_t slice) {
  const std::vector<Ins>& code = w.block->entry->code;
  uint64_t done = 0;
  const bool alone = config.lanes == 3;
  const auto next = [&](bool waits) { return alone ? choose_alone(w, waits) : choose(w, waits); };
  if (alone && w.pc == 0 && w.others.empty()) scatter(w);
  try {
    while (slice-- > 0) {
      const Ins& in = code[static_cast<size_t>(w.pc)];
      ++done;
      ++in.hits;
      uint32_t m = w.mask;
      if (in.guard >= 0) {
        const uint32_t p = *reinterpret_cast<const uint32_t*>(w.regs + in.guard);
        m &= in.negated ? ~p : p;
      }
      switch (in.kind) {
        case Kind::normal:
          if (m) in.fn(w, in, m);
          ++w.pc;
          break;
        case Kind::branch:
          if (m == w.mask) {
            w.pc = in.target;
          } else if (!m) {
            ++w.pc;
          } else {
            w.others.push_back({in.target, m, false});
            w.mask &= ~m;
            ++w.pc;
            if (config.lanes && !next(false)) stuck(w, code);
          }
          break;
        case Kind::together:
        case Kind::barrier:
          if (w.mask != w.live) {
            if (!next(true)) stuck(w, code);
            --done, --in.hits;
            continue;
          }
          if (in.kind == Kind::barrier) {
            ++w.pc;
            w.at_barrier = true;
            stats.instructions += done;
            return;
          }
          if (w.live != kAll) fail("an instruction of the whole warp after lanes have left");
          in.fn(w, in, kAll);
          ++w.pc;
          if (alone) scatter(w);
          continue;
        case Kind::exit:
          w.live &= ~m;
          w.mask &= ~m;
          ++w.pc;
          if (!w.live) {
            for (const Copy& c : w.copies) stats.unwaited += c.bytes > 0;
            stats.instructions += done;
            return;
          }
          if (!w.mask && !next(false)) stuck(w, code);
          continue;
        case Kind::trap:
          if (m) fail("trap");
          ++w.pc;
          break;
      }
      if (!w.others.empty() && !alone) {
        // Go on alone for as long as no other is at the same place or, lowest first, behind.
        bool change = false;
        for (const Split& s : w.others)
          change |= s.pc == w.pc || (config.lanes == 0 && !s.waiting && s.pc < w.pc) ||
                    (config.lanes == 1 && !s.waiting && s.pc > w.pc);
        if (config.lanes == 2) change |= draw(8) == 0;
        if (change && !choose(w, false)) stuck(w, code);
      }
    }
  } catch (const std::runtime_error& error) {
    const Ins& in = code[std::min(static_cast<size_t>(w.pc), code.size() - 1)];
    fail(std::string(error.what()) + " | warp " + std::to_string(w.number) + " lanes " + hex(w.mask) + " line " +
         std::to_string(in.line) + ": " + in.text);
  }
  stats.instructions += done;
}

void run_block(Block& b) {
  const size_t n = b.warps.size();
  for (;;) {
    bool all_gone = true, all_wait = true;
    std::vector<size_t> able;
    for (size_t i = 0; i < n; ++i) {
      Warp& w = b.warps[i];
      if (!w.live) continue;
      all_gone = false;
      if (!w.at_barrier) all_wait = false, able.push_back(i);
    }
    if (all_gone) return;
    if (all_wait) {
      ++b.epoch;
      for (Warp& w : b.warps) {
        w.at_barrier = false, ++w.epoch;
        if (config.lanes == 3 && w.live) scatter(w);
      }
      continue;
    }
    const size_t pick = config.warps == 0 ? able.front() : config.warps == 1 ? able.back() : able[draw(able.size())];
    run(b.warps[pick], config.warps == 2 ? static_cast<int64_t>(1 + draw(60)) : INT64_MAX);
  }
}

}  // namespace

void launch(Entry& e, Dim grid, Dim block, size_t shared_bytes, const void* params) {
  random_bits.seed(static_cast<uint64_t>(config.seed));
  ++stats.launches;
  const uint32_t threads = block.x * block.y * block.z, warps = (threads + kLanes - 1) / kLanes;
  if (threads % kLanes) fail("a block that is not whole warps");
  for (Range& r : ranges) r.writer.clear();
  Block b;
  b.entry = &e;
  b.params.assign(static_cast<const unsigned char*>(params), static_cast<const unsigned char*>(params) + e.param_bytes);
  b.files.resize(size_t{e.file_bytes} * warps + 64);
  unsigned char* files = b.files.data() + (64 - reinterpret_cast<uintptr_t>(b.files.data()) % 64) % 64;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  std::vector<uint64_t> order;
  if (config.blocks == 2) {
    for (uint64_t i = 0; i < blocks; ++i) order.push_back(i);
    std::shuffle(order.begin(), order.end(), random_bits);
  }
  for (uint64_t k = 0; k < blocks; ++k) {
    const uint64_t n = config.blocks == 0 ? k : config.blocks == 1 ? blocks - 1 - k : order[k];
    const uint32_t id[3] = {static_cast<uint32_t>(n % grid.x), static_cast<uint32_t>(n / grid.x % grid.y),
                            static_cast<uint32_t>(n / grid.x / grid.y)};
    b.shared.assign(shared_bytes, 0xFF);
    if (config.race) b.shadow.assign(shared_bytes, Shadow{});
    b.epoch = 1;
    b.first_thread = static_cast<uint32_t>(n * threads);
    b.warps.assign(warps, Warp{});
    for (uint32_t i = 0; i < warps; ++i) {
      Warp& w = b.warps[i];
      w.regs = files + size_t{e.file_bytes} * i;
      w.block = &b;
      w.number = static_cast<int>(i);
      w.mask = w.live = kAll;
      if (i == 0 && k == 0) {
        // Registers start as something conspicuous.
        for (size_t at = 0; at + 4 <= size_t{e.file_bytes} * warps; at += 4)
          std::memcpy(files + at, "\xBE\xBA\xFE\xFF", 4);
      }
      for (const Constant& c : e.constants) {
        for (int l = 0; l < c.lanes; ++l)
          std::memcpy(w.regs + c.at + l * c.bytes, &c.bits, static_cast<size_t>(c.bytes));
      }
      for (const auto& [name, at] : e.special) {
        for (uint32_t l = 0; l < kLanes; ++l) {
          const uint32_t t = i * kLanes + l;
          const uint32_t tid[3] = {t % block.x, t / block.x % block.y, t / block.x / block.y};
          const uint32_t sizes[3] = {block.x, block.y, block.z}, grids[3] = {grid.x, grid.y, grid.z};
          const int axis = name.back() - 'x';
          const uint32_t v = name == "%laneid"                   ? l
                             : name.compare(0, 4, "%tid") == 0   ? tid[axis]
                             : name.compare(0, 5, "%ntid") == 0  ? sizes[axis]
                             : name.compare(0, 6, "%ctaid") == 0 ? id[axis]
                                                                 : grids[axis];
          std::memcpy(w.regs + at + l * 4, &v, 4);
        }
      }
    }
    try {
      run_block(b);
    } catch (const std::runtime_error& error) {
      fail(std::string(error.what()) + " | block " + std::to_string(id[0]) + ", " + std::to_string(id[1]) + ", " +
           std::to_string(id[2]) + " of " + e.name);
    }
  }
}

}  // namespace ptx
