// The machine for Python (device.py): buffers, schedules, launches by name, what was executed.
#include "interface.h"

#include <cstdio>
#include <cstring>
#include <utility>

#include "machine.h"

namespace ptx {

std::string& pending_error() {
  static std::string error;
  return error;
}

}  // namespace ptx

namespace {

// Runs f; what it throws waits for ptx_error.
template <class F>
int attempt(const F& f) {
  try {
    f();
    return 0;
  } catch (const std::exception& error) {
    ptx::pending_error() = error.what();
    return 1;
  }
}

}  // namespace

extern "C" {

void ptx_ranges(int count, const uint64_t* begin, const uint64_t* end, const int* access) {
  ptx::ranges.clear();
  for (int i = 0; i < count; ++i) ptx::ranges.push_back({begin[i], end[i], static_cast<ptx::Access>(access[i]), {}});
}

// 0 where there is no such option.
int ptx_config(const char* name, int64_t value) {
  const std::pair<const char*, int64_t*> options[] = {
      {"late", &ptx::config.late},     {"warps", &ptx::config.warps},     {"lanes", &ptx::config.lanes},
      {"blocks", &ptx::config.blocks}, {"early", &ptx::config.early},     {"race", &ptx::config.race},
      {"seed", &ptx::config.seed},     {"traffic", &ptx::config.traffic},
  };
  for (const auto& [known, place] : options) {
    if (std::strcmp(name, known) == 0) return *place = value, 1;
  }
  return 0;
}

// What went wrong since the last call, or an empty string.
const char* ptx_error() {
  static std::string error;
  error = std::exchange(ptx::pending_error(), "");
  return error.c_str();
}

void ptx_statistics(uint64_t* out) {
  out[0] = ptx::statistics.launches, out[1] = ptx::statistics.instructions, out[2] = ptx::statistics.never_waited;
  out[3] = ptx::statistics.overlapped;
}

int ptx_load(const char* text) {
  return attempt([&] { ptx::add_module(text); });
}

int ptx_launch(const char* name, const uint32_t* grid, const uint32_t* block, uint64_t shared_bytes,
               const unsigned char* params, uint64_t param_bytes, int programmatic) {
  return attempt([&] {
    const ptx::Entry* entry = ptx::find_entry(name);
    if (!entry) ptx::fail(std::string("no entry ") + name);
    if (entry->param_bytes != param_bytes) ptx::fail("parameters of another size");
    ptx::submit({entry,
                 {grid[0], grid[1], grid[2]},
                 {block[0], block[1], block[2]},
                 shared_bytes,
                 {params, params + param_bytes},
                 programmatic != 0});
  });
}

void ptx_discard() { ptx::discard(); }
int ptx_flush() { return attempt(ptx::flush); }

// Writes "kernel, number, hits, line, cycles, least, sectors, least, text" of every instruction, with tabs.
int ptx_coverage(const char* path) {
  FILE* file = std::fopen(path, "w");
  if (!file) return 1;
  const auto write = [&](const std::string& text, char behind) {
    std::fwrite(text.data(), 1, text.size(), file);
    std::fputc(behind, file);
  };
  for (const auto& [name, entry] : ptx::all_entries()) {
    for (size_t i = 0; i < entry->code.size(); ++i) {
      const ptx::Instruction& in = entry->code[i];
      write(name, '\t');
      for (const uint64_t value :
           {static_cast<uint64_t>(i), in.counts.hits, static_cast<uint64_t>(in.line), in.counts.cycles,
            in.counts.least_cycles, in.counts.sectors, in.counts.least_sectors}) {
        write(std::to_string(value), '\t');
      }
      write(in.text, '\n');
    }
  }
  return std::fclose(file);
}

}  // extern "C"
