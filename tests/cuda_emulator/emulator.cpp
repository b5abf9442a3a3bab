// The emulator's scheduler, rendezvous, shared memory and collectives; README.md is the overview.
//
// Never compiled with -fsanitize=thread, not even in the tsan flavour (which defines MOS_EMULATOR_TSAN):
// ThreadSanitizer is to see the accesses of the kernels and what is announced to it below, not the bookkeeping here.
// That is also why nothing on a fiber's path calls malloc or memcpy: their interceptors would see this file after all.
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <iterator>
#include <memory>
#include <utility>
#include <vector>

#include "../../csrc/common/numeric.h"
#include "cuda_emulator.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

Thread* current;
dim3 block_size, grid_size;

namespace {

// ---------------------------------------------------------------------------------------------- sanitizers

#if defined(MOS_EMULATOR_TSAN)
constexpr bool kThreadSanitizer = true;
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_set_fiber_name(void*, const char*);
void __tsan_acquire(void*);
void __tsan_release(void*);
void __tsan_read_range(void*, unsigned long);
void __tsan_write_range(void*, unsigned long);
}
#else
// Without ThreadSanitizer all of these are nothing.
constexpr bool kThreadSanitizer = false;
inline void* __tsan_get_current_fiber() { return nullptr; }
inline void* __tsan_create_fiber(unsigned) { return nullptr; }
inline void __tsan_destroy_fiber(void*) {}
inline void __tsan_switch_to_fiber(void*, unsigned) {}
inline void __tsan_set_fiber_name(void*, const char*) {}
inline void __tsan_acquire(void*) {}
inline void __tsan_release(void*) {}
inline void __tsan_read_range(void*, unsigned long) {}
inline void __tsan_write_range(void*, unsigned long) {}
#endif
// A switch of fibers by itself orders nothing: only barriers do.
constexpr unsigned kSwitchWithoutOrder = 1;

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kAddressSanitizer = true;
void poison(const void* p, size_t bytes) { __asan_poison_memory_region(p, bytes); }
void unpoison(const void* p, size_t bytes) { __asan_unpoison_memory_region(p, bytes); }
const volatile unsigned char* first_poisoned(const void* p, size_t bytes) {
  return static_cast<const volatile unsigned char*>(__asan_region_is_poisoned(const_cast<void*>(p), bytes));
}
#else
constexpr bool kAddressSanitizer = false;
inline void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
inline void poison(const void*, size_t) {}
inline void unpoison(const void*, size_t) {}
inline const volatile unsigned char* first_poisoned(const void*, size_t) { return nullptr; }
#endif

// ---------------------------------------------------------------------------------------------- state

constexpr unsigned kWarp = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxResident = 64;
constexpr unsigned kMaxPending = 8;    // different masks that the lanes of one warp wait with
constexpr unsigned kMaxCopies = 1024;  // cp.async of one thread in flight
constexpr size_t kPage = 4096;
constexpr size_t kArena = 256 * 1024;  // shared memory of a block: at most 227 KiB on any GPU
constexpr size_t kSlack = 1024;        // canaries around what a launch asked for; also the largest alignment
constexpr unsigned char kNan = 0xFF;   // repeated, a NaN in every float format
// ThreadSanitizer takes accesses of one fiber as ordered. Blocks that follow each other in one slot are not, so their
// fibers rotate.
constexpr unsigned kFiberSets = kThreadSanitizer ? 4 : 1;

enum class Schedule { sequential, reverse, random, priority };
const char* const kScheduleNames[] = {"sequential", "reverse", "random", "priority"};

struct Config {
  Schedule schedule = Schedule::priority;
  unsigned long seed = 1;
  unsigned resident_blocks = 2;
  bool shuffle_blocks = true;
  size_t max_shared_bytes = 99 * 1024;  // what compute capability 8.6, 8.9 and 12.0 allow a block
  size_t stack_bytes = 64 * 1024;
  double timeout = 60;  // seconds per launch
  bool early = false;   // launches wait for emulator_synchronize(), which starts them as early as it may
} config;

struct Statistics {  // all uint64_t, in the order of emulator.py
  uint64_t launches, blocks, threads, switches, barriers, warp_collectives, mmas, copies, ldmatrix_matrices,
      ldmatrix_cycles;
} statistics;

// A 16-byte copy on its way to shared memory.
struct Copy {
  uint4* target;
  const uint4* source;  // null: zeros
  uint32_t group;
};

struct Block;
struct Fiber : Thread {
  void* stack_pointer;
  Block* block;
  const char* inside;  // the function below that it waits in, or null; called at `site`, for `lanes` of its warp
  Site site;
  unsigned lanes;
  bool waited;           // for the launch before
  uint32_t copy_groups;  // committed
  unsigned copy_count;
  Copy* copies;
  unsigned char* stack;
  size_t stack_bytes;
  void* tsan_fiber;
  void* asan_stack;
};

// What the lanes of a warp do together: the last to arrive does it for all.
struct Collective {
  const char* name;
  void (*run)(void* const* arguments, unsigned lanes);
  bool whole_warp;  // all 32 lanes, at one place in the code
  bool orders_memory;
};
struct Rendezvous {
  const Collective* collective;
  Site site;
  unsigned mask, arrived;
  char* order;  // what ThreadSanitizer knows it by
  void* arguments[kWarp];
};
struct Warp {
  unsigned ready, exist, exited;  // lanes
  unsigned priority;
  unsigned pending_count;
  Rendezvous pending[kMaxPending];
  // In turns: a lane that wakes up late is not to learn what others did after the rendezvous that it left.
  unsigned order_turn;
  char order[kMaxPending];
};
struct Barrier {
  unsigned arrived;
  unsigned phase;
  bool predicate[2];
  Site site;
  char order[2];  // what ThreadSanitizer knows it by, in turns
};

// A slot for a resident block; its buffers are kept for the next one.
struct Block {
  unsigned slot;
  bool active;
  uint3 index;
  unsigned threads, live, warps;
  unsigned ready_warps;
  Fiber* fibers;
  Warp warp[kMaxThreads / kWarp];
  Barrier barrier;
  // Shared memory ends at the end of the arena, before an inaccessible page.
  unsigned char* arena;
  unsigned char* shared;  // null until dynamic_shared() says with which alignment
  size_t shared_bytes, shared_align;
  unsigned char* stacks;
  unsigned stack_count;
  size_t stack_bytes;
  unsigned fiber_set;
  std::vector<void*> tsan_fibers;

  unsigned char* arena_end() const { return arena + kArena; }
  size_t used_bytes() const { return (shared_bytes + kSlack + 15) / 16 * 16; }
};

using Slots = Block* [kMaxResident];
Slots slots_of_launches[2];  // of the launch that runs, and of the one after it, if that has started early

struct Launch {
  void (*body)(void*);
  std::shared_ptr<void> arguments;
  dim3 grid, block;
  size_t shared_bytes;
  bool early;

  bool released = false;          // all launches before have ended: nobody waits for them any more
  Block** blocks = nullptr;       // its slots; null until it starts
  unsigned slots = 0;             // that it uses
  std::vector<uint64_t> order{};  // of its blocks
  uint64_t started = 0;           // blocks
  unsigned current_slot = 0;      // the scheduler prefers to stay
  uint64_t ready_blocks = 0;      // slots

  uint64_t count() const { return static_cast<uint64_t>(grid.x) * grid.y * grid.z; }
};
std::vector<Launch> queue;
Launch* launch;  // whose fibers run
Fiber host;      // the caller's own stack
Block* finished_block;

double deadline;
bool failed;
sigjmp_buf signal_return;
// For ThreadSanitizer: the host before its kernels, kernels before the host, a launch before those who waited for it.
char start_order, exit_order, wait_order;

char message[1 << 16];
size_t message_length;

Fiber* self() { return static_cast<Fiber*>(current); }
bool in_kernel() { return current && current != &host; }

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

uint64_t random_state;
uint32_t random_bits() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return static_cast<uint32_t>(random_state >> 16);
}
// One of the set bits; a cheap choice, not a uniform one.
template <class Mask>
unsigned random_bit(Mask mask) {
  constexpr unsigned kBits = sizeof(Mask) * 8;
  const unsigned shift = random_bits() % kBits;
  const Mask rotated = mask >> shift | mask << (kBits - shift) % kBits;
  return (static_cast<unsigned>(__builtin_ctzll(rotated)) + shift) % kBits;
}

// What lies next to buffers: NaN in 16-bit elements and larger ones, and different everywhere, or a kernel that copies
// from behind one array to behind another would leave no trace.
unsigned char canary(const unsigned char* p) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(p);
  const uint32_t hash = static_cast<uint32_t>(address / 2) * 0x9E3779B1u;
  return address % 2 ? 0xFF : static_cast<unsigned char>(0x81 | hash >> 25);
}
void place_canaries(unsigned char* from, const unsigned char* to) {
  for (unsigned char* p = from; p < to; ++p) *p = canary(p);
}
bool intact(const unsigned char* from, const unsigned char* to) {
  return std::all_of(from, to, [](const unsigned char& byte) { return byte == canary(&byte); });
}

// ---------------------------------------------------------------------------------------------- failures

void append_list(const char* format, va_list arguments) {
  const int n = vsnprintf(message + message_length, sizeof(message) - message_length, format, arguments);
  message_length = std::min(message_length + static_cast<size_t>(std::max(n, 0)), sizeof(message) - 1);
}
__attribute__((format(printf, 1, 2))) void append(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  append_list(format, arguments);
  va_end(arguments);
}

void clear_message() {
  message[0] = 0;
  message_length = 0;
}

void begin_message() {
  clear_message();
  failed = true;
  if (!in_kernel()) return;
  const Fiber* t = self();
  append("block (%u,%u,%u) thread (%u,%u,%u) [warp %u lane %u]: ", t->block_index.x, t->block_index.y, t->block_index.z,
         t->index.x, t->index.y, t->index.z, t->warp, t->lane);
}

enum class Activity { runnable, waiting, exited };
Activity activity(const Fiber& t) {
  const Warp& warp = t.block->warp[t.warp];
  if (warp.exited >> t.lane & 1) return Activity::exited;
  return t.inside && !(warp.ready >> t.lane & 1) ? Activity::waiting : Activity::runnable;
}
bool same_place(const Fiber& a, const Fiber& b) {
  if (activity(a) != activity(b) || a.warp != b.warp) return false;
  return activity(a) != Activity::waiting || (a.inside == b.inside && a.site.line == b.site.line && a.lanes == b.lanes);
}
// Where every resident thread is, in runs of neighbours that are in one place.
void append_threads() {
  for (unsigned slot = 0; slot < launch->slots; ++slot) {
    const Block* b = launch->blocks[slot];
    if (!b || !b->active) continue;
    append("\n  block (%u,%u,%u):", b->index.x, b->index.y, b->index.z);
    for (unsigned i = 0, end; i < b->threads; i = end) {
      const Fiber& t = b->fibers[i];
      end = i + 1;
      while (end < b->threads && same_place(t, b->fibers[end])) ++end;
      append("\n    threads %u to %u: ", i, end - 1);
      switch (activity(t)) {
        case Activity::exited:
          append("exited");
          break;
        case Activity::runnable:
          append("runnable");
          break;
        case Activity::waiting:
          append("waiting in %s at %s:%d", t.inside, t.site.file, t.site.line);
          if (t.lanes) append(", mask %08x", t.lanes);
          break;
      }
    }
  }
}

[[noreturn]] void leave_kernel(bool ends);

[[noreturn]] __attribute__((format(printf, 1, 2))) void fail_with_threads(const char* format, ...) {
  begin_message();
  va_list arguments;
  va_start(arguments, format);
  append_list(format, arguments);
  va_end(arguments);
  append_threads();
  leave_kernel(false);
}

}  // namespace

void fail(const char* format, ...) {
  begin_message();
  va_list arguments;
  va_start(arguments, format);
  append_list(format, arguments);
  va_end(arguments);
  leave_kernel(false);
}

namespace {

// ---------------------------------------------------------------------------------------------- context switch

extern "C" void mos_emulator_switch_stack(void** save, void* stack_pointer);
asm(R"(
.text
.globl mos_emulator_switch_stack
.hidden mos_emulator_switch_stack
.type mos_emulator_switch_stack,@function
mos_emulator_switch_stack:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size mos_emulator_switch_stack, .-mos_emulator_switch_stack
)");
constexpr int kSavedRegisters = 6;

// `ends`: the running fiber will not come back.
inline void switch_to(Fiber* to, bool ends = false) {
  Fiber* from = self();
  if (to == from) return;
  current = to;
  statistics.switches++;
  __tsan_switch_to_fiber(to->tsan_fiber, kSwitchWithoutOrder);
  __sanitizer_start_switch_fiber(ends ? nullptr : &from->asan_stack, to->stack, to->stack_bytes);
  mos_emulator_switch_stack(&from->stack_pointer, to->stack_pointer);
  __sanitizer_finish_switch_fiber(from->asan_stack, nullptr, nullptr);
}

void leave_kernel(bool ends) {
  switch_to(&host, ends);
  __builtin_unreachable();
}

// ---------------------------------------------------------------------------------------------- scheduler

inline void set_ready(Block* b, unsigned warp, unsigned lanes) {
  if (!lanes) return;
  b->warp[warp].ready |= lanes;
  b->ready_warps |= 1u << warp;
  launch->ready_blocks |= uint64_t{1} << b->slot;
}

// Warps run in the order of weights that change now and then: some starve for a while, which uniform choices never do.
unsigned highest_priority(Block* b) {
  if (random_bits() % 64 == 0) b->warp[random_bits() % b->warps].priority = random_bits() % 65536;
  unsigned best = static_cast<unsigned>(__builtin_ctz(b->ready_warps));
  for (unsigned others = b->ready_warps & (b->ready_warps - 1); others; others &= others - 1) {
    const unsigned warp = static_cast<unsigned>(__builtin_ctz(others));
    if (b->warp[warp].priority > b->warp[best].priority) best = warp;
  }
  return best;
}

template <class Mask>
unsigned choose(Mask ready) {
  switch (config.schedule) {
    case Schedule::sequential:
      return static_cast<unsigned>(__builtin_ctzll(ready));
    case Schedule::reverse:
      return 63 - static_cast<unsigned>(__builtin_clzll(ready));
    default:
      return random_bit(ready);
  }
}

// The thread to run next, no longer ready; null where there is none.
Fiber* pick() {
  Launch& l = *launch;
  if (!l.ready_blocks) return nullptr;
  const bool random = config.schedule == Schedule::random || config.schedule == Schedule::priority;
  const bool stay = l.ready_blocks >> l.current_slot & 1;
  if (!stay || (random && l.slots > 1 && random_bits() % 16 == 0)) l.current_slot = choose(l.ready_blocks);
  Block* b = l.blocks[l.current_slot];
  const unsigned w = config.schedule == Schedule::priority ? highest_priority(b) : choose(b->ready_warps);
  Warp& warp = b->warp[w];
  const unsigned lane = choose(warp.ready);
  warp.ready &= ~(1u << lane);
  if (!warp.ready) {
    b->ready_warps &= ~(1u << w);
    if (!b->ready_warps) l.ready_blocks &= ~(uint64_t{1} << b->slot);
  }
  return &b->fibers[w * kWarp + lane];
}

// Lets others run. The running thread waits for something, is ready again already, or has ended.
void reschedule(bool ends = false) {
  Fiber* next = pick();
  if (!next && !launch->released) next = &host;  // until the launch before has ended
  if (!next) fail_with_threads("deadlock: no thread can run");
  static unsigned calls;
  if (++calls % 4096 == 0 && now() > deadline) fail_with_threads("no end after %g s", config.timeout);
  switch_to(next, ends);
}

const char* const kWaitForLaunch = "wait_for_launch_before";

void wait_in(const char* what, unsigned lanes, Site site) {
  Fiber* t = self();
  t->inside = what;
  t->site = site;
  t->lanes = lanes;
  reschedule();
  t->inside = nullptr;
}

// ---------------------------------------------------------------------------------------------- rendezvous

bool same_site(Site a, Site b) { return a.line == b.line && (a.file == b.file || strcmp(a.file, b.file) == 0); }

// Does what the lanes came for, and lets them go on. `running`: the lane that needs no waking.
void complete(Block* b, unsigned w, Rendezvous* r, unsigned running) {
  Warp& warp = b->warp[w];
  if (r->collective->run) r->collective->run(r->arguments, r->arrived);
  set_ready(b, w, r->arrived & ~running);
  --warp.pending_count;
  if (r != &warp.pending[warp.pending_count]) *r = warp.pending[warp.pending_count];
}

void meet(const Collective& collective, unsigned mask, void* argument, Site site) {
  Fiber* t = self();
  Block* b = t->block;
  Warp& warp = b->warp[t->warp];
  const unsigned lane = 1u << t->lane;
  statistics.warp_collectives++;
  if (!(mask & lane)) {
    fail("%s at %s:%d: mask %08x does not name the calling lane", collective.name, site.file, site.line, mask);
  }
  if (collective.whole_warp && mask & ~warp.exist) {
    fail("%s at %s:%d in a partial warp (block of %u threads)", collective.name, site.file, site.line, b->threads);
  }
  if (collective.whole_warp && mask & warp.exited) {
    fail_with_threads("%s at %s:%d: lanes %08x of the warp have exited", collective.name, site.file, site.line,
                      mask & warp.exited);
  }
  Rendezvous* r = nullptr;
  for (unsigned i = 0; i < warp.pending_count; ++i) {
    if (warp.pending[i].mask == mask) r = &warp.pending[i];
  }
  if (!r) {
    if (warp.pending_count == kMaxPending) fail_with_threads("too many different masks pending in one warp");
    r = &warp.pending[warp.pending_count++];
    r->collective = &collective;
    r->site = site;
    r->mask = mask;
    r->arrived = 0;
    r->order = &warp.order[warp.order_turn++ % kMaxPending];
  } else if (r->collective != &collective || (collective.whole_warp && !same_site(r->site, site))) {
    fail_with_threads("divergent warp: %s at %s:%d, but other lanes of mask %08x wait in %s at %s:%d", collective.name,
                      site.file, site.line, mask, r->collective->name, r->site.file, r->site.line);
  }
  r->arrived |= lane;
  r->arguments[t->lane] = argument;
  char* order = r->order;
  if (collective.orders_memory) __tsan_release(order);
  if ((mask & warp.exist & ~warp.exited) == r->arrived) {
    complete(b, t->warp, r, lane);
  } else {
    wait_in(collective.name, mask, site);
  }
  if (collective.orders_memory) __tsan_acquire(order);
}

// Threads that have exited count as arrived, as on a GPU.
bool open_barrier(Block* b) {
  Barrier& barrier = b->barrier;
  if (!barrier.arrived || barrier.arrived < b->live) return false;
  barrier.arrived = 0;
  barrier.phase ^= 1;
  barrier.predicate[barrier.phase] = false;
  statistics.barriers++;
  for (unsigned w = 0; w < b->warps; ++w) set_ready(b, w, b->warp[w].exist & ~b->warp[w].exited);
  return true;
}

}  // namespace

bool block_barrier(bool predicate, Site site) {
  Block* b = self()->block;
  Barrier& barrier = b->barrier;
  if (!barrier.arrived) {
    barrier.site = site;
  } else if (!same_site(barrier.site, site)) {
    fail_with_threads("divergent __syncthreads: this thread is at %s:%d, others wait at %s:%d", site.file, site.line,
                      barrier.site.file, barrier.site.line);
  }
  const unsigned phase = barrier.phase;
  barrier.arrived++;
  barrier.predicate[phase] |= predicate;
  __tsan_release(&barrier.order[phase]);
  open_barrier(b);  // makes everybody ready, this thread too
  wait_in("__syncthreads", 0, site);
  __tsan_acquire(&barrier.order[phase]);
  return barrier.predicate[phase];
}

namespace {

// ---------------------------------------------------------------------------------------------- blocks

void land(const Copy& copy) {
  __tsan_write_range(copy.target, sizeof(uint4));
  *copy.target = copy.source ? *copy.source : uint4{0, 0, 0, 0};
}

void fiber_main() {
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
  __tsan_acquire(&start_order);
  launch->body(launch->arguments.get());
  Fiber* t = self();
  if (launch->early && !t->waited) fail("ends without wait_for_launch_before, though it was launched early");
  Block* b = t->block;
  Warp& warp = b->warp[t->warp];
  for (unsigned i = 0; i < t->copy_count; ++i) land(t->copies[i]);
  __tsan_release(&exit_order);
  b->live--;
  warp.exited |= 1u << t->lane;
  for (unsigned i = 0; i < warp.pending_count;) {
    Rendezvous& r = warp.pending[i];
    if (r.collective->whole_warp) {
      fail_with_threads("exits while other lanes wait in %s at %s:%d", r.collective->name, r.site.file, r.site.line);
    }
    if ((r.mask & warp.exist & ~warp.exited) == r.arrived) {
      complete(b, t->warp, &r, 0);
    } else {
      ++i;
    }
  }
  open_barrier(b);
  if (!b->live) {
    b->active = false;
    finished_block = b;
    leave_kernel(true);
  }
  reschedule(true);
  __builtin_unreachable();
}

unsigned char* map_pages(size_t bytes, void* at = nullptr) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (at ? MAP_FIXED : 0);
  void* p = mmap(at, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (p == MAP_FAILED) {
    perror("CUDA emulator: mmap");
    abort();
  }
  return static_cast<unsigned char*>(p);
}

Block* block_of(unsigned slot, unsigned threads) {
  Block*& b = launch->blocks[slot];
  if (!b) {
    b = new Block{};
    b->slot = slot;
    b->fibers = new Fiber[kMaxThreads]{};
    Copy* copies = reinterpret_cast<Copy*>(map_pages(kMaxThreads * kMaxCopies * sizeof(Copy)));
    for (unsigned i = 0; i < kMaxThreads; ++i) b->fibers[i].copies = copies + i * kMaxCopies;
    unsigned char* pages = map_pages(kPage + kArena + kPage);
    b->arena = pages + kPage;
    mprotect(pages, kPage, PROT_NONE);
    mprotect(b->arena_end(), kPage, PROT_NONE);
  }
  if (b->stack_count < threads || b->stack_bytes != config.stack_bytes) {
    const size_t pitch = config.stack_bytes + kPage;  // below each stack, an inaccessible page
    threads = (threads + 127) / 128 * 128;            // ThreadSanitizer's fibers are slow to make
    if (b->stacks) munmap(b->stacks, kFiberSets * b->stack_count * (b->stack_bytes + kPage));
    b->stacks = map_pages(kFiberSets * threads * pitch);
    b->stack_count = threads;
    b->stack_bytes = config.stack_bytes;
    for (unsigned i = 0; i < kFiberSets * threads; ++i) mprotect(b->stacks + i * pitch, kPage, PROT_NONE);
    for (void* fiber : b->tsan_fibers) __tsan_destroy_fiber(fiber);
    b->tsan_fibers.resize(kFiberSets * threads);
    for (void*& fiber : b->tsan_fibers) fiber = __tsan_create_fiber(0);
  }
  return b;
}

void reset_shared_memory(Block* b, size_t shared_bytes) {
  b->shared = nullptr;
  b->shared_bytes = shared_bytes;
  const size_t bytes = b->used_bytes();
  if (kThreadSanitizer) {
    // Fresh pages: the accesses of an earlier block are forgotten.
    const size_t pages = (bytes + kPage - 1) / kPage * kPage;
    map_pages(pages, b->arena_end() - pages);
  }
  unpoison(b->arena, kArena);
  memset(b->arena_end() - bytes, kNan, bytes);
  poison(b->arena, kArena);
}

// Stacks start with what pops into the saved registers, the address that switch_stack returns to, and an empty slot
// where a call would have left a return address.
void* initial_stack(const Fiber& t, unsigned number) {
  const size_t stagger = 64 + number % 16 * 64;  // or the hot ends of all stacks would share a few cache sets
  void** top = reinterpret_cast<void**>(t.stack + t.stack_bytes - stagger);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(fiber_main);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  return top;
}

uint3 unflatten(uint64_t i, dim3 size) {
  return {static_cast<unsigned>(i % size.x), static_cast<unsigned>(i / size.x % size.y),
          static_cast<unsigned>(i / size.x / size.y)};
}

void start_block(unsigned slot, uint64_t number, size_t shared_bytes) {
  const unsigned threads = block_size.x * block_size.y * block_size.z;
  Block* b = block_of(slot, threads);
  b->active = true;
  b->index = unflatten(number, grid_size);
  b->threads = b->live = threads;
  b->warps = (threads + kWarp - 1) / kWarp;
  b->barrier = {};
  b->fiber_set = (b->fiber_set + 1) % kFiberSets;
  reset_shared_memory(b, shared_bytes);
  for (unsigned w = 0; w < b->warps; ++w) {
    Warp& warp = b->warp[w];
    const unsigned lanes = std::min(kWarp, threads - w * kWarp);
    warp.exist = lanes == kWarp ? 0xFFFFFFFFu : (1u << lanes) - 1;
    warp.ready = warp.exited = 0;
    warp.pending_count = 0;
    warp.priority = random_bits() % 65536;
    set_ready(b, w, warp.exist);
  }
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& t = b->fibers[i];
    t.index = unflatten(i, block_size);
    t.block_index = b->index;
    t.lane = i % kWarp;
    t.warp = i / kWarp;
    t.block = b;
    t.inside = nullptr;
    t.waited = false;
    t.copy_groups = t.copy_count = 0;
    const unsigned stack = b->fiber_set * b->stack_count + i;
    t.stack = b->stacks + stack * (b->stack_bytes + kPage) + kPage;
    t.stack_bytes = b->stack_bytes;
    unpoison(t.stack + t.stack_bytes - kPage, kPage);  // the red zones of fiber_main's frames, which never return
    t.stack_pointer = initial_stack(t, i);
    t.tsan_fiber = b->tsan_fibers[stack];
    if (kThreadSanitizer) {
      char name[64];
      snprintf(name, sizeof(name), "block %u,%u,%u thread %u", b->index.x, b->index.y, b->index.z, i);
      __tsan_set_fiber_name(t.tsan_fiber, name);
    }
  }
  statistics.blocks++;
  statistics.threads += threads;
  __tsan_release(&start_order);
}

// Fails where the bytes around the block's shared memory are not what they were.
void check_canaries(const Block* b) {
  if (kAddressSanitizer || !b->shared) return;  // it has seen every access
  const unsigned char* end = b->arena_end();
  const bool before = intact(end - b->used_bytes(), b->shared), after = intact(b->shared + b->shared_bytes, end);
  if (before && after) return;
  begin_message();
  append("block (%u,%u,%u): shared memory written %s the %zu bytes of the launch", b->index.x, b->index.y, b->index.z,
         before ? "after" : "before", b->shared_bytes);
}

// ---------------------------------------------------------------------------------------------- launches

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE};
struct sigaction old_actions[std::size(kSignals)];

void restore_signals() {
  for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &old_actions[i], nullptr);
}

void on_signal(int signal, siginfo_t* info, void*) {
  if (!in_kernel()) return restore_signals();  // not ours: once more, to whom it concerns
  const Fiber* t = self();
  const Block* b = t->block;
  const unsigned char* p = static_cast<const unsigned char*>(info->si_addr);
  begin_message();
  if (signal == SIGFPE) {
    append("division by zero");
    siglongjmp(signal_return, 1);
  }
  append("invalid address %p", info->si_addr);
  if (t->inside) append(" in %s at %s:%d", t->inside, t->site.file, t->site.line);
  if (p >= b->arena - kPage && p < b->arena) append(", below shared memory");
  if (p >= b->arena_end() && p < b->arena_end() + kPage) {
    append(", past the %zu bytes of shared memory", b->shared_bytes);
  }
  if (p >= t->stack - kPage && p < t->stack) append(", stack overflow");
  siglongjmp(signal_return, 1);
}

// While it exists, invalid accesses of kernels end the launch and not the process. The sanitizers have their own.
class SignalHandler {
 public:
  SignalHandler() {
    if (kThreadSanitizer || kAddressSanitizer) return;
    static char stack[64 * 1024];
    stack_t handler_stack{};
    handler_stack.ss_sp = stack;
    handler_stack.ss_size = sizeof(stack);
    sigaltstack(&handler_stack, &old_stack_);
    struct sigaction action{};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &action, &old_actions[i]);
  }
  ~SignalHandler() {
    if (kThreadSanitizer || kAddressSanitizer) return;
    restore_signals();
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  stack_t old_stack_{};
};

struct Stack {
  void* bottom;
  size_t bytes;
};
Stack own_stack() {
  Stack stack{};
  pthread_attr_t attributes;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &stack.bottom, &stack.bytes);
  pthread_attr_destroy(&attributes);
  return stack;
}

void describe_host() {
  host.tsan_fiber = __tsan_get_current_fiber();
  if (kAddressSanitizer) {
    static thread_local const Stack stack = own_stack();  // it costs as much as a launch
    host.stack = static_cast<unsigned char*>(stack.bottom);
    host.stack_bytes = stack.bytes;
  }
}

std::vector<uint64_t> block_order(uint64_t count) {
  std::vector<uint64_t> order(count);
  for (uint64_t i = 0; i < count; ++i) order[i] = i;
  for (uint64_t i = count - 1; config.shuffle_blocks && i > 0; --i) {
    const uint64_t bits = static_cast<uint64_t>(random_bits()) << 32 | random_bits();
    std::swap(order[i], order[bits % (i + 1)]);
  }
  return order;
}

// Runs fibers until a block has finished, all wait for the launch before, or the launch has failed.
void run_fibers() {
  if (sigsetjmp(signal_return, 0) != 0) {
    current = &host;
    return;
  }
  if (Fiber* next = pick()) {
    switch_to(next);
  } else {  // the other blocks have finished, and nobody is left to let these go on
    begin_message();
    append("deadlock: no thread can run");
    append_threads();
  }
}

// Fills the slots with blocks.
void start_blocks() {
  Launch& l = *launch;
  for (unsigned slot = 0; slot < l.slots && l.started < l.order.size(); ++slot) {
    if (!l.blocks[slot] || !l.blocks[slot]->active) start_block(slot, l.order[l.started++], l.shared_bytes);
  }
}

// The launch `number` of the queue is the one whose fibers run from here on.
void enter(size_t number) {
  Launch& l = queue[number];
  launch = &l;
  grid_size = l.grid;
  block_size = l.block;
  deadline = now() + config.timeout;
  if (l.blocks) return;
  l.blocks = slots_of_launches[number % 2];
  random_state = 0x9E3779B97F4A7C15ull * (config.seed + 1);
  for (int i = 0; i < 8; ++i) random_bits();
  l.order = block_order(l.count());
  l.slots = static_cast<unsigned>(std::min<uint64_t>(l.count(), std::clamp(config.resident_blocks, 1u, kMaxResident)));
  statistics.launches++;
}

// As far as it comes while the launch before has not begun.
void run_prologue() {
  start_blocks();
  run_fibers();
}

void run_to_the_end() {
  Launch& l = *launch;
  l.released = true;
  __tsan_release(&wait_order);
  for (unsigned slot = 0; slot < l.slots; ++slot) {
    Block* b = l.blocks[slot];
    for (unsigned i = 0; b && b->active && i < b->threads; ++i) {
      if (b->fibers[i].inside == kWaitForLaunch) set_ready(b, b->fibers[i].warp, 1u << b->fibers[i].lane);
    }
  }
  for (uint64_t finished = 0; finished < l.count(); ++finished) {
    start_blocks();
    run_fibers();
    if (!failed) check_canaries(finished_block);
    if (failed) return;
  }
  __tsan_acquire(&exit_order);
}

// Each launch in order, from its end of a wait on; before it, what the next one does until it waits, if it is early.
// Hardware allows that only once every block of this one has said so, which is after all launches before it have ended:
// none does before its own wait (let_next_launch_start).
void run_queue() {
  for (size_t i = 0; i < queue.size() && !failed; ++i) {
    if (i + 1 < queue.size() && queue[i + 1].early) {
      enter(i + 1);
      run_prologue();
      if (failed) return;
    }
    enter(i);
    run_to_the_end();
  }
}

// What a failure has left behind: fibers come before what the host does next, and may have red zones anywhere.
void abandon_fibers() {
  for (Slots& slots : slots_of_launches) {
    for (Block* b : slots) {
      if (!b || !b->active) continue;
      b->active = false;
      b->ready_warps = 0;
      unpoison(b->stacks, kFiberSets * b->stack_count * (b->stack_bytes + kPage));
      for (unsigned i = 0; kThreadSanitizer && i < b->threads; ++i) {
        __tsan_switch_to_fiber(b->fibers[i].tsan_fiber, kSwitchWithoutOrder);
        __tsan_release(&exit_order);
        __tsan_switch_to_fiber(host.tsan_fiber, kSwitchWithoutOrder);
      }
    }
  }
  __tsan_acquire(&exit_order);
}

}  // namespace

cudaError_t execute(void (*body)(void*), std::shared_ptr<void> arguments, dim3 grid, dim3 block, size_t shared_bytes,
                    bool early) {
  clear_message();
  const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64 || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
      grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535) {
    append("invalid launch: grid (%u,%u,%u) of blocks (%u,%u,%u)", grid.x, grid.y, grid.z, block.x, block.y, block.z);
    return cudaErrorInvalidConfiguration;
  }
  if (shared_bytes > config.max_shared_bytes) {
    append("invalid launch: %zu bytes of shared memory, of at most %zu", shared_bytes, config.max_shared_bytes);
    return cudaErrorInvalidValue;
  }
  queue.push_back({body, std::move(arguments), grid, block, shared_bytes, early});
  return config.early ? cudaSuccess : synchronize();
}

cudaError_t synchronize() {
  clear_message();
  failed = false;
  describe_host();
  current = &host;
  {
    const SignalHandler handler;
    run_queue();
  }
  if (failed) abandon_fibers();
  current = nullptr;
  queue.clear();
  return failed ? cudaErrorLaunchFailure : cudaSuccess;
}

void wait_for_launch_before(Site site) {
  Fiber* t = self();
  t->waited = true;
  if (!launch->released) {
    // What is on its way may arrive as early as now.
    for (unsigned i = 0; i < t->copy_count; ++i) land(t->copies[i]);
    t->copy_count = 0;
    wait_in(kWaitForLaunch, 0, site);
  }
  __tsan_acquire(&wait_order);
}

void let_next_launch_start(Site site) {
  if (!launch->early || self()->waited) return;
  fail("let_next_launch_start at %s:%d before its own wait_for_launch_before", site.file, site.line);
}

// ---------------------------------------------------------------------------------------------- shared memory

unsigned char* dynamic_shared(size_t align, Site site) {
  Block* b = self()->block;
  if (!b->shared) {
    if (align > kSlack / 2) fail("%s:%d: alignment of %zu bytes", site.file, site.line, align);
    b->shared_align = align;
    uintptr_t start = (reinterpret_cast<uintptr_t>(b->arena_end()) - b->shared_bytes) & ~(align - 1);
    // With odd seeds not aligned to more than was asked for.
    if (config.seed % 2 && !(start & align)) start -= align;
    b->shared = reinterpret_cast<unsigned char*>(start);
    unpoison(b->shared, b->shared_bytes);
    if (!kAddressSanitizer) {
      place_canaries(b->arena_end() - b->used_bytes(), b->shared);
      place_canaries(b->shared + b->shared_bytes, b->arena_end());
    }
  }
  if (b->shared_align != align) fail("%s:%d: a second alignment of shared memory", site.file, site.line);
  return b->shared;
}

uint32_t shared_address(const void* p, Site site) {
  const Block* b = self()->block;
  const unsigned char* byte = static_cast<const unsigned char*>(p);
  if (byte < b->arena || byte > b->arena_end()) {
    fail("shared_address at %s:%d: %p is not in this block's shared memory", site.file, site.line, p);
  }
  return static_cast<uint32_t>(byte - b->arena);
}

void misaligned(const char* what, const void* p, Site site) {
  fail("%s at %s:%d: address %p is not a multiple of 16", what, site.file, site.line, p);
}

namespace {

// The 16 bytes at a shared address.
unsigned char* shared_vector(const char* what, uint32_t address, Site site) {
  const Block* b = self()->block;
  if (address % 16) {
    fail("%s at %s:%d: shared address %#x is not a multiple of 16", what, site.file, site.line, address);
  }
  unsigned char* p = b->arena + address;
  if (!b->shared || p < b->shared || p + 16 > b->shared + b->shared_bytes) {
    fail("%s at %s:%d: byte %td is outside the %zu bytes of shared memory", what, site.file, site.line, p - b->shared,
         b->shared_bytes);
  }
  return p;
}

}  // namespace

void cp_async_16(uint32_t target, const void* source, int bytes, Site site) {
  Fiber* t = self();
  Copy copy{reinterpret_cast<uint4*>(shared_vector("cp.async", target, site)), nullptr, t->copy_groups};
  check_alignment("cp.async", source, site);
  if (bytes != 0 && bytes != 16) fail("cp.async at %s:%d of %d bytes", site.file, site.line, bytes);
  if (t->copy_count == kMaxCopies) fail("cp.async at %s:%d: too many in flight", site.file, site.line);
  __tsan_write_range(copy.target, sizeof(uint4));
  if (bytes) {
    copy.source = static_cast<const uint4*>(source);
    __tsan_read_range(const_cast<void*>(source), sizeof(uint4));
    // What cannot be read is reported here, not where the copy lands.
    t->inside = "cp.async";
    t->site = site;
    const volatile unsigned char* poisoned = first_poisoned(source, sizeof(uint4));
    (void)(poisoned ? *poisoned : *static_cast<const volatile unsigned char*>(source));
    t->inside = nullptr;
  }
  *copy.target = {~0u, ~0u, ~0u, ~0u};  // NaN until it lands
  t->copies[t->copy_count++] = copy;
  statistics.copies++;
}

void cp_async_commit() { self()->copy_groups++; }

void wait_for_copies(unsigned pending) {
  Fiber* t = self();
  unsigned kept = 0;
  for (unsigned i = 0; i < t->copy_count; ++i) {
    const Copy copy = t->copies[i];
    if (t->copy_groups - copy.group > pending) {
      land(copy);
    } else {
      t->copies[kept++] = copy;
    }
  }
  t->copy_count = kept;
}

// ---------------------------------------------------------------------------------------------- collectives

namespace {

struct BallotArgument {
  bool predicate;
  unsigned result;
};
void run_ballot(void* const* arguments, unsigned lanes) {
  unsigned result = 0;
  for (unsigned rest = lanes; rest; rest &= rest - 1) {
    const unsigned lane = static_cast<unsigned>(__builtin_ctz(rest));
    result |= static_cast<unsigned>(static_cast<BallotArgument*>(arguments[lane])->predicate) << lane;
  }
  for (unsigned rest = lanes; rest; rest &= rest - 1) {
    static_cast<BallotArgument*>(arguments[__builtin_ctz(rest)])->result = result;
  }
}

struct ShuffleArgument {
  uint64_t value, result;
  unsigned source;
};
void run_shuffle(void* const* arguments, unsigned lanes) {
  for (unsigned rest = lanes; rest; rest &= rest - 1) {
    ShuffleArgument* mine = static_cast<ShuffleArgument*>(arguments[__builtin_ctz(rest)]);
    // Undefined from a lane that does not take part: a NaN.
    const bool present = lanes >> mine->source & 1;
    mine->result = present ? static_cast<ShuffleArgument*>(arguments[mine->source])->value : ~uint64_t{0};
  }
}

struct MatrixArgument {
  uint32_t* words;
  const uint16_t* row;
};
// Of each 8 x 8 matrix, lane i receives elements 2 * (i % 4) and the next of row (transposed: column) i / 4.
template <bool kTransposed>
void run_ldmatrix(void* const* arguments, unsigned) {
  for (int m = 0; m < 4; ++m) {
    const uint16_t* row[8];
    unsigned char rows_in_bank[8] = {};  // eight groups of four banks, 16 bytes wide
    unsigned char cycles = 0;
    for (int r = 0; r < 8; ++r) {
      row[r] = static_cast<const MatrixArgument*>(arguments[8 * m + r])->row;
      cycles = std::max(cycles, ++rows_in_bank[reinterpret_cast<uintptr_t>(row[r]) / 16 % 8]);
    }
    statistics.ldmatrix_matrices++;
    statistics.ldmatrix_cycles += cycles;
    for (int lane = 0; lane < 32; ++lane) {
      const int r = lane / 4, c = lane % 4 * 2;
      const uint32_t low = kTransposed ? row[c][r] : row[r][c];
      const uint32_t high = kTransposed ? row[c + 1][r] : row[r][c + 1];
      static_cast<MatrixArgument*>(arguments[lane])->words[m] = low | high << 16;
    }
  }
}

struct MmaArgument {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};
// Elements as the fragments hold them: a word of kPerWord consecutive ones of the summed index.
struct Bf16 {
  static constexpr int kPerWord = 2;
  static void convert(const uint32_t* word, double* out) {
    out[0] = mos::bit_cast<float>(*word << 16);
    out[1] = mos::bit_cast<float>(*word & 0xFFFF0000u);
  }
};
struct F16 {
  static constexpr int kPerWord = 2;
  static void convert(const uint32_t* word, double* out) {
    out[0] = mos::f16_t{static_cast<uint16_t>(*word)};
    out[1] = mos::f16_t{static_cast<uint16_t>(*word >> 16)};
  }
};
struct Tf32 {
  static constexpr int kPerWord = 1;
  static void convert(const uint32_t* word, double* out) { out[0] = mos::bit_cast<float>(*word & 0xFFFFE000u); }
};

// d (16, 8) += a (16, k) b (k, 8), summed in double and rounded once. With g = lane / 4 and t = lane % 4, in words
// along k: a[i] is row g + 8 * (i % 2), word t + 4 * (i / 2); b[i] is column g, word t + 4 * i; d[i] is row
// g + 8 * (i / 2), column 2 * t + i % 2.
template <class Element>
void run_mma(void* const* arguments, unsigned) {
  constexpr int kWords = 8, kDepth = kWords * Element::kPerWord;
  uint32_t a_word[16][kWords], b_word[8][kWords];
  double d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const MmaArgument* argument = static_cast<const MmaArgument*>(arguments[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      a_word[g + 8 * (i % 2)][t + 4 * (i / 2)] = argument->a[i];
      d[g + 8 * (i / 2)][2 * t + i % 2] = argument->d[i];
    }
    for (int i = 0; i < 2; ++i) b_word[g][t + 4 * i] = argument->b[i];
  }
  double a[16][kDepth], b_column[8][kDepth], b[kDepth][8];
  for (int i = 0; i < 16 * kWords; ++i) Element::convert(&a_word[0][0] + i, &a[0][0] + i * Element::kPerWord);
  for (int i = 0; i < 8 * kWords; ++i) Element::convert(&b_word[0][0] + i, &b_column[0][0] + i * Element::kPerWord);
  for (int k = 0; k < kDepth; ++k) {
    for (int j = 0; j < 8; ++j) b[k][j] = b_column[j][k];
  }
  for (int i = 0; i < 16; ++i) {
    double sum[8] = {};
    for (int k = 0; k < kDepth; ++k) {
      for (int j = 0; j < 8; ++j) sum[j] += a[i][k] * b[k][j];
    }
    for (int j = 0; j < 8; ++j) d[i][j] += sum[j];
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* out = static_cast<const MmaArgument*>(arguments[lane])->d;
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) out[i] = static_cast<float>(d[g + 8 * (i / 2)][2 * t + i % 2]);
  }
  statistics.mmas++;
}

constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr Collective kSyncwarp{"__syncwarp", nullptr, false, true};
constexpr Collective kBallot{"__ballot_sync", run_ballot, false, false};
constexpr Collective kShuffle{"__shfl_sync", run_shuffle, false, false};
constexpr Collective kLdmatrix{"ldmatrix", run_ldmatrix<false>, true, false};
constexpr Collective kLdmatrixTrans{"ldmatrix.trans", run_ldmatrix<true>, true, false};
constexpr Collective kMmaBf16{"mma.bf16", run_mma<Bf16>, true, false};
constexpr Collective kMmaF16{"mma.f16", run_mma<F16>, true, false};
constexpr Collective kMmaTf32{"mma.tf32", run_mma<Tf32>, true, false};

void ldmatrix(const Collective& collective, uint32_t* words, uint32_t address, Site site) {
  const unsigned char* row = shared_vector(collective.name, address, site);
  __tsan_read_range(const_cast<unsigned char*>(row), 16);
  MatrixArgument argument{words, reinterpret_cast<const uint16_t*>(row)};
  meet(collective, kAllLanes, &argument, site);
}

}  // namespace

void warp_barrier(unsigned mask, Site site) { meet(kSyncwarp, mask, nullptr, site); }

unsigned ballot(unsigned mask, bool predicate, Site site) {
  BallotArgument argument{predicate, 0};
  meet(kBallot, mask, &argument, site);
  return argument.result;
}

uint64_t shuffle(unsigned mask, uint64_t value, unsigned source, Site site) {
  ShuffleArgument argument{value, 0, source};
  meet(kShuffle, mask, &argument, site);
  return argument.result;
}

void ldmatrix_x4(uint32_t (&r)[4], uint32_t address, Site site) { ldmatrix(kLdmatrix, r, address, site); }
void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address, Site site) { ldmatrix(kLdmatrixTrans, r, address, site); }

void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site) {
  MmaArgument argument{d, a, b};
  meet(kMmaBf16, kAllLanes, &argument, site);
}
void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site) {
  MmaArgument argument{d, a, b};
  meet(kMmaF16, kAllLanes, &argument, site);
}
void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site) {
  MmaArgument argument{d, a, b};
  meet(kMmaTf32, kAllLanes, &argument, site);
}

namespace {

// ---------------------------------------------------------------------------------------------- configuration

bool set_option(const char* key, const char* value) {
  char* end = nullptr;
  const double number = strtod(value, &end);
  const auto is = [&](const char* name) { return strcmp(key, name) == 0; };
  if (is("schedule")) {
    for (int i = 0; i < 4; ++i) {
      if (strcmp(value, kScheduleNames[i]) != 0) continue;
      config.schedule = static_cast<Schedule>(i);
      return true;
    }
    return false;
  }
  if (end == value || *end || number < 0) return false;
  if (is("seed")) {
    config.seed = static_cast<unsigned long>(number);
  } else if (is("resident_blocks")) {
    config.resident_blocks = static_cast<unsigned>(number);
  } else if (is("shuffle_blocks")) {
    config.shuffle_blocks = number != 0;
  } else if (is("max_shared_bytes")) {
    config.max_shared_bytes = std::min(static_cast<size_t>(number), kArena - 2 * kSlack);
  } else if (is("stack_bytes")) {
    config.stack_bytes = (static_cast<size_t>(number) + kPage - 1) / kPage * kPage;
  } else if (is("timeout")) {
    config.timeout = number;
  } else if (is("early")) {
    config.early = number != 0;
  } else {
    return false;
  }
  return true;
}

// ---------------------------------------------------------------------------------------------- guarded buffers

constexpr bool kSanitizedHeap = kThreadSanitizer || kAddressSanitizer;

size_t buffer_pages(size_t bytes, size_t align) { return (bytes + align + kPage - 1) / kPage * kPage; }

}  // namespace

}  // namespace emulator

// ---------------------------------------------------------------------------------------------- for ctypes

#define MOS_EMULATOR_API extern "C" __attribute__((visibility("default")))

// "key=value,..."; 0, or 1 for what it does not understand.
MOS_EMULATOR_API int emulator_config(const char* options) {
  char key[32], value[32];
  int length = 0;
  while (*options) {
    if (sscanf(options, "%31[a-z_]=%31[^,]%n", key, value, &length) != 2) return 1;
    if (!emulator::set_option(key, value)) return 1;
    options += length;
    if (*options == ',') ++options;
  }
  return 0;
}

// Of the last launch; empty where it succeeded.
MOS_EMULATOR_API const char* emulator_last_error() { return emulator::message; }
// Runs what has been launched under the option `early`; a cudaError_t.
MOS_EMULATOR_API int emulator_synchronize() { return emulator::synchronize(); }
MOS_EMULATOR_API void emulator_clear_error() { emulator::clear_message(); }

MOS_EMULATOR_API void emulator_stats(uint64_t* out) {
  memcpy(out, &emulator::statistics, sizeof(emulator::statistics));
}

// Memory full of NaN, aligned to `align` bytes, that ends where an inaccessible page begins (up to the alignment: the
// bytes between are canaries). With a sanitizer it is the sanitizer's.
MOS_EMULATOR_API void* emulator_guarded_alloc(size_t bytes, size_t align) {
  using namespace emulator;
  if (kSanitizedHeap) {
    void* p = nullptr;
    if (posix_memalign(&p, std::max(align, sizeof(void*)), bytes) == 0) memset(p, kNan, bytes);
    return p;
  }
  const size_t size = buffer_pages(bytes, align);
  unsigned char* pages = map_pages(kPage + size + kPage);
  unsigned char* end = pages + kPage + size;
  mprotect(pages, kPage, PROT_NONE);
  mprotect(end, kPage, PROT_NONE);
  unsigned char* buffer = reinterpret_cast<unsigned char*>(reinterpret_cast<uintptr_t>(end - bytes) & ~(align - 1));
  place_canaries(pages + kPage, end);
  memset(buffer, kNan, bytes);
  return buffer;
}

// Whether the bytes around the buffer are as they were.
MOS_EMULATOR_API int emulator_guarded_free(void* buffer, size_t bytes, size_t align) {
  using namespace emulator;
  if (kSanitizedHeap) {
    free(buffer);
    return 1;
  }
  const size_t size = buffer_pages(bytes, align);
  unsigned char* first = static_cast<unsigned char*>(buffer);
  unsigned char* last = first + bytes;
  unsigned char* end =
      reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(last) + kPage - 1) / kPage * kPage);
  const bool whole = intact(end - size, first) && intact(last, end);
  munmap(end - size - kPage, kPage + size + kPage);
  return whole;
}
