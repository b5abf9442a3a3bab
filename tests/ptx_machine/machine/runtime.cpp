// A stand-in for the CUDA runtime under objects that nvcc compiled: it takes the PTX out of their fat binaries and
// interprets what is launched. Device pointers are host pointers.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

#include "ptx.h"

namespace {

std::map<std::string, std::unique_ptr<ptx::Entry>>& entries() {
  static auto* all = new std::map<std::string, std::unique_ptr<ptx::Entry>>;
  return *all;
}
std::map<const void*, std::string>& names() {
  static auto* all = new std::map<const void*, std::string>;
  return *all;
}
std::string last_error;

[[noreturn]] void die(const std::string& what) {
  std::fprintf(stderr, "ptx: %s\n", what.c_str());
  std::abort();
}

ptx::Entry* entry_of(const void* function) {
  const auto n = names().find(function);
  if (n == names().end()) return nullptr;
  const auto e = entries().find(n->second);
  return e == entries().end() ? nullptr : e->second.get();
}

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void* wrapper) {
  struct Wrapper {
    uint32_t magic, version;
    const unsigned char* data;
  };
  const auto* w = static_cast<const Wrapper*>(wrapper);
  if (w->magic != 0x466243B1u) die("not the wrapper of a fat binary");
  const unsigned char* p = w->data;
  uint32_t magic;
  uint16_t header;
  uint64_t size;
  std::memcpy(&magic, p, 4), std::memcpy(&header, p + 6, 2), std::memcpy(&size, p + 8, 8);
  if (magic != 0xBA55ED50u) die("not a fat binary");
  int found = 0;
  for (const unsigned char *at = p + header, *end = at + size; at < end;) {
    uint16_t kind;
    uint32_t header_bytes, compressed;
    uint64_t bytes;
    std::memcpy(&kind, at, 2), std::memcpy(&header_bytes, at + 4, 4), std::memcpy(&bytes, at + 8, 8),
        std::memcpy(&compressed, at + 16, 4);
    if (kind == 1) {
      if (compressed) die("compressed PTX: compile with -no-compress");
      const std::string text(reinterpret_cast<const char*>(at + header_bytes), bytes);
      try {
        for (auto& e : ptx::parse(text)) {
          const std::string name = e->name;
          if (!entries().emplace(name, std::move(e)).second) die("two kernels " + name);
        }
      } catch (const std::exception& error) {
        die(error.what());
      }
      ++found;
    }
    at += header_bytes + bytes;
  }
  if (found != 1) die("a fat binary with " + std::to_string(found) + " PTX modules");
  return static_cast<void**>(wrapper);
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  if (!entries().count(name)) die(std::string("registered, but not in the PTX: ") + name);
  names()[host] = name;
}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { die("<<<>>>"); }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { die("<<<>>>"); }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { die("__cudaGetKernel"); }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { die("__cudaLaunchKernel"); }

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  ptx::Entry* e = entry_of(function);
  if (!e) return cudaErrorInvalidDeviceFunction;
  // 227 KiB of sm_90 and sm_100; sm_86, sm_89 and sm_120 have 99, which the kernels promise to keep.
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || value > 99 * 1024)
    return cudaErrorInvalidValue;
  e->shared_attribute = static_cast<size_t>(value);
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t) {
  ptx::Entry* e = entry_of(function);
  if (!e) return cudaErrorInvalidDeviceFunction;
  const auto legal = [](const dim3& d) { return d.x && d.y && d.z; };
  if (!legal(grid) || !legal(block) || grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  if (static_cast<uint64_t>(block.x) * block.y * block.z > static_cast<uint64_t>(e->max_threads))
    return cudaErrorInvalidConfiguration;
  if (shared > e->shared_attribute) return cudaErrorInvalidValue;
  if (e->param_bytes > 4096) return cudaErrorInvalidValue;
  try {
    ptx::launch(*e, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared, arguments[0]);
  } catch (const std::exception& error) {
    last_error = error.what();  // as on a GPU, the launch itself succeeds
  }
  return cudaSuccess;
}

// ------------------------------------------------------------------------------------------------ for check.py

void ptx_ranges(int count, const uint64_t* lo, const uint64_t* hi, const int* writable) {
  ptx::ranges.clear();
  for (int i = 0; i < count; ++i) ptx::ranges.push_back({lo[i], hi[i], writable[i] != 0, {}});
}
void ptx_config(const int64_t* v) { ptx::config = {v[0], v[1], v[2], v[3], v[4], v[5], v[6]}; }
// What went wrong since the last call, or an empty string.
const char* ptx_error() {
  static std::string error;
  error.swap(last_error);
  last_error.clear();
  return error.c_str();
}
void ptx_stats(uint64_t* out) {
  out[0] = ptx::stats.launches, out[1] = ptx::stats.instructions, out[2] = ptx::stats.unwaited,
  out[3] = ptx::stats.unwritten;
}
// Writes "kernel, index, hits, line, cycles, ideal, sectors, least, text" of every instruction, with tabs.
void ptx_coverage(const char* path) {
  FILE* f = std::fopen(path, "w");
  const auto count = [](uint64_t v) { return static_cast<unsigned long long>(v); };
  for (const auto& [name, e] : entries()) {
    for (size_t i = 0; i < e->code.size(); ++i) {
      const ptx::Ins& in = e->code[i];
      std::fprintf(f, "%s\t%zu\t%llu\t%d\t%llu\t%llu\t%llu\t%llu\t%s\n", name.c_str(), i, count(in.hits), in.line,
                   count(in.cycles), count(in.ideal), count(in.sectors), count(in.least), in.text.c_str());
    }
  }
  std::fclose(f);
}

}  // extern "C"
