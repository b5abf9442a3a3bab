// A stand-in for the CUDA runtime below objects that nvcc compiled: it takes the PTX out of their fat binaries and
// interprets what is launched. Device pointers are host pointers. What the kernels' host code has not called so far is
// not there (a link error) or stops the process.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "interface.h"
#include "machine.h"

namespace {

// Of sm_86, sm_89 and sm_120, the least of all that the kernels run on.
constexpr int kSharedLimit = 99 * 1024;
constexpr size_t kParamLimit = 4096;

std::map<const void*, ptx::Entry*>& functions() {
  static auto* all = new std::map<const void*, ptx::Entry*>;
  return *all;
}

[[noreturn]] void die(const std::string& what) {
  std::fprintf(stderr, "ptx: %s\n", what.c_str());
  std::abort();
}

template <class T>
T read(const unsigned char* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

ptx::Entry* entry_of(const void* function) {
  const auto found = functions().find(function);
  return found == functions().end() ? nullptr : found->second;
}

int architecture() {
  // One for all modules: toolchain.py compiles them so.
  const auto& entries = ptx::all_entries();
  return entries.empty() ? 0 : entries.begin()->second->architecture;
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared, bool programmatic) {
  const ptx::Entry* entry = entry_of(function);
  if (!entry) return cudaErrorInvalidDeviceFunction;
  const auto legal = [](const dim3& size) { return size.x && size.y && size.z; };
  if (!legal(grid) || grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535) return cudaErrorInvalidConfiguration;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (!legal(block) || threads > entry->max_threads) return cudaErrorInvalidConfiguration;
  if (shared > entry->shared_attribute || entry->param_bytes > kParamLimit) return cudaErrorInvalidValue;
  std::vector<unsigned char> params(entry->param_bytes);
  for (size_t i = 0; i < entry->parameters.size(); ++i) {
    std::memcpy(params.data() + entry->parameters[i].offset, arguments[i], entry->parameters[i].bytes);
  }
  try {
    ptx::submit(
        {entry, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared, std::move(params), programmatic});
  } catch (const std::exception& error) {
    ptx::pending_error() = error.what();
  }
  return cudaSuccess;
}

}  // namespace

extern "C" {

// ------------------------------------------------------------------------------------------------ what nvcc calls

void** __cudaRegisterFatBinary(void* wrapper) {
  const auto* head = static_cast<const unsigned char*>(wrapper);
  if (read<uint32_t>(head) != 0x466243B1u) die("not the wrapper of a fat binary");
  const unsigned char* binary = read<const unsigned char*>(head + 8);
  if (read<uint32_t>(binary) != 0xBA55ED50u) die("not a fat binary");
  const unsigned char* at = binary + read<uint16_t>(binary + 6);
  const unsigned char* end = at + read<uint64_t>(binary + 8);
  int modules = 0;
  while (at < end) {
    const uint32_t header_bytes = read<uint32_t>(at + 4);
    const uint64_t bytes = read<uint64_t>(at + 8);
    if (read<uint16_t>(at) == 1) {
      if (read<uint32_t>(at + 16)) die("compressed PTX: compile with -no-compress");
      ++modules;
      try {
        ptx::add_module({reinterpret_cast<const char*>(at + header_bytes), bytes});
      } catch (const std::exception& error) {
        die(error.what());
      }
    }
    at += header_bytes + bytes;
  }
  if (modules != 1) die("a fat binary with " + std::to_string(modules) + " PTX modules");
  return static_cast<void**>(wrapper);
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  functions()[host] = ptx::find_entry(name);
  if (!functions()[host]) die(std::string("registered, but not in the PTX: ") + name);
}
// Kernels are launched by cudaLaunchKernel and cudaLaunchKernelExC, never by <<<>>>.
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { die("<<<>>>"); }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { die("<<<>>>"); }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { die("<<<>>>"); }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { die("<<<>>>"); }

// ------------------------------------------------------------------------------------------------ what kernels call

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return cudaErrorInvalidDevice;
  if (attribute == cudaDevAttrComputeCapabilityMajor) {
    *value = architecture() / 10;
  } else if (attribute == cudaDevAttrComputeCapabilityMinor) {
    *value = architecture() % 10;
  } else if (attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin) {
    *value = kSharedLimit;
  } else {
    die("cudaDeviceGetAttribute of " + std::to_string(attribute));
  }
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }
cudaError_t cudaGetLastError() { return cudaSuccess; }  // errors of the host have been returned, others come later
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }

// Of what a kernel is: what it was compiled for. The rest is 0.
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  if (!entry_of(function)) return cudaErrorInvalidDeviceFunction;
  *attributes = {};
  attributes->ptxVersion = attributes->binaryVersion = architecture();
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  ptx::Entry* entry = entry_of(function);
  if (!entry) return cudaErrorInvalidDeviceFunction;
  const bool known = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize;
  if (!known || value < 0 || value > kSharedLimit) return cudaErrorInvalidValue;
  entry->shared_attribute = static_cast<size_t>(value);
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t) {
  return launch(function, grid, block, arguments, shared, false);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  bool programmatic = false;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id != cudaLaunchAttributeProgrammaticStreamSerialization || architecture() < 90) {
      return cudaErrorInvalidValue;
    }
    programmatic = attribute.val.programmaticStreamSerializationAllowed != 0;
  }
  return launch(function, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes, programmatic);
}

}  // extern "C"
