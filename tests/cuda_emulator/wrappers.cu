// Every wrapper of csrc/cuda/device.h against plain C++. Built twice from this one source: by g++ for the emulator
// (tests/test_cuda_emulator.py), where it tests the emulator, and by hand with nvcc for a GPU, where it tests that the
// emulator and the hardware mean the same:
//     nvcc -std=c++17 -arch=native -o wrappers tests/cuda_emulator/wrappers.cu && ./wrappers
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../csrc/cuda/device.h"

namespace {

using namespace mos;
using namespace mos::cuda;

constexpr unsigned kAll = 0xFFFFFFFFu;

// ---------------------------------------------------------------------------------------------- both machines

#if defined(__CUDACC__)
void* allocate(size_t bytes) {
  void* p = nullptr;
  return cudaMalloc(&p, bytes) == cudaSuccess ? p : nullptr;
}
void release(void* p, size_t) { cudaFree(p); }
void copy_in(void* to, const void* from, size_t bytes) { cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice); }
void copy_out(void* to, const void* from, size_t bytes) { cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost); }
const char* explain(cudaError_t error) { return cudaGetErrorString(error); }
cudaError_t finish() { return cudaDeviceSynchronize(); }
#else
extern "C" int emulator_config(const char* options);
extern "C" const char* emulator_last_error();
extern "C" void* emulator_guarded_alloc(size_t bytes, size_t align);
extern "C" int emulator_guarded_free(void* p, size_t bytes, size_t align);
void* allocate(size_t bytes) { return emulator_guarded_alloc(bytes, 16); }
void release(void* p, size_t bytes) {
  if (!emulator_guarded_free(p, bytes, 16)) std::abort();
}
void copy_in(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
void copy_out(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
const char* explain(cudaError_t) { return emulator_last_error(); }
cudaError_t finish() { return cudaSuccess; }
#endif

template <class T>
class Array {
 public:
  explicit Array(const std::vector<T>& values) : size_(values.size()), data_(allocate(bytes())) {
    copy_in(data_, values.data(), bytes());
  }
  explicit Array(size_t size) : Array(std::vector<T>(size)) {}
  Array(const Array&) = delete;
  ~Array() { release(data_, bytes()); }
  T* data() { return static_cast<T*>(data_); }
  std::vector<T> values() const {
    std::vector<T> out(size_);
    copy_out(out.data(), data_, bytes());
    return out;
  }

 private:
  size_t bytes() const { return size_ * sizeof(T); }
  size_t size_;
  void* data_;
};

int failures = 0;
void expect(bool condition, const char* what, int where) {
  if (condition) return;
  if (++failures <= 20) std::printf("FAILED %s at %d\n", what, where);
}

template <class... P, class... A>
void run(const char* what, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, A... arguments) {
  KernelState state;
  const int bytes = static_cast<int>(shared_bytes);
  const SharedBytes shared{bytes, bytes};
  cudaError_t error = start_kernel(state, kernel, grid, block, shared, false, nullptr, static_cast<P>(arguments)...);
  if (error == cudaSuccess) error = finish();
  if (error == cudaSuccess) return;
  ++failures;
  std::printf("FAILED %s: %s\n", what, explain(error));
}

// Small integers: sums of their products are exact in every element type and every order.
std::vector<float> small_integers(size_t count) {
  std::vector<float> out(count);
  for (float& x : out) x = static_cast<float>(std::rand() % 17 - 8);
  return out;
}

// ---------------------------------------------------------------------------------------------- threads

__global__ void number_kernel(int* out) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  out[block * threads + thread] = block * 1000 + thread;
}
void test_numbers() {
  constexpr int kBlocks = 2 * 3 * 2, kThreads = 5 * 3 * 4;
  Array<int> out(kBlocks * kThreads);
  run("numbers", number_kernel, dim3(2, 3, 2), dim3(5, 3, 4), 0, out.data());
  const std::vector<int> got = out.values();
  for (int i = 0; i < kBlocks * kThreads; ++i) expect(got[i] == i / kThreads * 1000 + i % kThreads, "numbers", i);
}

__global__ void rotate_kernel(int* out, int rounds) {
  MOS_DYNAMIC_SHARED(shared);
  int* value = reinterpret_cast<int*>(shared);
  const int i = threadIdx.x, n = blockDim.x;
  value[i] = i;
  for (int round = 0; round < rounds; ++round) {
    __syncthreads();
    const int next = value[(i + 1) % n];
    __syncthreads();
    value[i] = next;
  }
  out[blockIdx.x * n + i] = value[i];
}
void test_barrier() {
  constexpr int kThreads = 80, kBlocks = 3;  // the third warp is partial
  Array<int> out(kBlocks * kThreads);
  run("barrier", rotate_kernel, dim3(kBlocks), dim3(kThreads), kThreads * sizeof(int), out.data(), 5);
  const std::vector<int> got = out.values();
  for (int i = 0; i < kBlocks * kThreads; ++i) expect(got[i] == (i % kThreads + 5) % kThreads, "barrier", i);
}

__global__ void any_kernel(int* out) {
  const int i = threadIdx.x;
  out[i] = (__syncthreads_or(i == 70) != 0) * 4;
  out[i] += (__syncthreads_or(0) != 0) * 2;
  out[i] += __syncthreads_or(i < 3) != 0;
}
void test_any() {
  Array<int> out(96);
  run("__syncthreads_or", any_kernel, dim3(1), dim3(96), 0, out.data());
  for (int value : out.values()) expect(value == 5, "__syncthreads_or", value);
}

constexpr int kWarpResults = 6;
__global__ void warp_kernel(int* out) {
  const int lane = threadIdx.x % 32;
  int* result = out + threadIdx.x * kWarpResults;
  result[0] = __shfl_sync(kAll, lane * 3, (lane + 5) % 32);
  result[1] = static_cast<int>(__shfl_xor_sync(kAll, lane * 0.5, 9) * 2);
  const unsigned thirds = __ballot_sync(kAll, lane % 3 == 0);
  result[2] = static_cast<int>(thirds);
  result[3] = __popc(thirds) * 100 + __ffs(static_cast<int>(thirds & ~1u));
  if (lane < 12) {  // two parts of a warp, each on its own
    result[4] = __shfl_sync(0x00000FFFu, lane, 11 - lane);
  } else {
    result[4] = static_cast<int>(__ballot_sync(0xFFFFF000u, lane & 1));
  }
  __syncwarp();
  result[5] = out[(threadIdx.x ^ 1) * kWarpResults + 4];
}
void test_warp() {
  constexpr int kThreads = 64;
  Array<int> out(kThreads * kWarpResults);
  run("warp", warp_kernel, dim3(1), dim3(kThreads), 0, out.data());
  const std::vector<int> got = out.values();
  for (int i = 0; i < kThreads; ++i) {
    const int lane = i % 32;
    const int* result = &got[i * kWarpResults];
    const auto divided = [](int l) { return l < 12 ? 11 - l : static_cast<int>(0xAAAAA000u); };
    expect(result[0] == (lane + 5) % 32 * 3, "__shfl_sync", i);
    expect(result[1] == (lane ^ 9), "__shfl_xor_sync", i);
    expect(result[2] == 0x49249249, "__ballot_sync", i);
    expect(result[3] == 1104, "__popc, __ffs", i);
    expect(result[4] == divided(lane), "divergent warp", i);
    expect(result[5] == divided(lane ^ 1), "__syncwarp", i);
  }
}

// ---------------------------------------------------------------------------------------------- memory

__global__ void vector_kernel(const uint4* in, uint4* out) {
  MOS_DYNAMIC_SHARED(shared);
  uint4* vector = reinterpret_cast<uint4*>(shared);
  store_16(vector + threadIdx.x, load_16(in + threadIdx.x));
  __syncthreads();
  store_16(out + threadIdx.x, load_16(vector + (threadIdx.x ^ 1)));
}
void test_vectors() {
  constexpr unsigned kThreads = 64;
  std::vector<uint4> in(kThreads);
  for (unsigned i = 0; i < kThreads; ++i) in[i] = {i, i * i, ~i, i << 20};
  Array<uint4> source(in), target(kThreads);
  run("vectors", vector_kernel, dim3(1), dim3(kThreads), kThreads * sizeof(uint4), source.data(), target.data());
  const std::vector<uint4> got = target.values();
  for (unsigned i = 0; i < kThreads; ++i) expect(std::memcmp(&got[i], &in[i ^ 1], 16) == 0, "load_16, store_16", i);
}

// Three stages of a pipeline; every fourth vector is zeros instead of what lies there.
constexpr int kStages = 3;
__global__ void pipeline_kernel(const uint4* in, uint4* out, int tiles) {
  MOS_DYNAMIC_SHARED(shared);
  uint4* vector = reinterpret_cast<uint4*>(shared);
  const int i = threadIdx.x, n = blockDim.x;
  const auto load = [&](int tile) {
    cp_async_16(shared_address(vector + tile % kStages * n + i), in + tile * n + i, i % 4 == 3 ? 0 : 16);
  };
  for (int tile = 0; tile < kStages - 1; ++tile) {
    if (tile < tiles) load(tile);
    cp_async_commit();
  }
  for (int tile = 0; tile < tiles; ++tile) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    if (tile + kStages - 1 < tiles) load(tile + kStages - 1);
    cp_async_commit();
    out[tile * n + i] = vector[tile % kStages * n + (i + 1) % n];
  }
}
void test_pipeline() {
  constexpr unsigned kThreads = 64, kTiles = 7;
  std::vector<uint4> in(kThreads * kTiles);
  for (unsigned i = 0; i < in.size(); ++i) in[i] = {i, i * i, ~i, i << 20};
  Array<uint4> source(in), target(in.size());
  run("cp.async", pipeline_kernel, dim3(1), dim3(kThreads), kStages * kThreads * sizeof(uint4), source.data(),
      target.data(), static_cast<int>(kTiles));
  const std::vector<uint4> got = target.values();
  for (unsigned i = 0; i < in.size(); ++i) {
    const unsigned from = i / kThreads * kThreads + (i + 1) % kThreads;
    const uint4 want = from % 4 == 3 ? uint4{0, 0, 0, 0} : in[from];
    expect(std::memcmp(&got[i], &want, 16) == 0, "cp.async", i);
  }
}

// ---------------------------------------------------------------------------------------------- conversions

__global__ void convert_kernel(const float* in, uint32_t* bf16, uint32_t* f16, uint32_t* tf32, float* widened) {
  const int i = threadIdx.x;
  const float x = in[i];
  bf16[i] = pack<bf16_t>(x, -x);
  f16[i] = pack<f16_t>(x, -x);
  tf32[i] = round_to_tf32(x);
  widened[2 * i] = to_float(bf16_t{static_cast<uint16_t>(bf16[i])});
  widened[2 * i + 1] = to_float(f16_t{static_cast<uint16_t>(f16[i])});
}
void test_conversions() {
  std::vector<float> in{0.f, -0.f, 1.f, 65504.f, 65519.f, 65520.f, 1e30f, 3e38f, 0x1p-24f, 0x1p-25f, 0x1.8p-25f, 1e-7f};
  in.insert(in.end(), {INFINITY, 1.f + 0x1p-8f, 1.f + 0x1p-9f, 1.f + 0x1p-11f, 1.f + 0x1p-12f, 6.1e-5f});
  while (in.size() < 256)
    in.push_back(std::ldexp(static_cast<float>(std::rand() - RAND_MAX / 2), std::rand() % 60 - 60));
  const int n = static_cast<int>(in.size());
  Array<float> source(in), widened(2 * n);
  Array<uint32_t> bf16(n), f16(n), tf32(n);
  run("conversions", convert_kernel, dim3(1), dim3(n), 0, source.data(), bf16.data(), f16.data(), tf32.data(),
      widened.data());
  const std::vector<uint32_t> got_bf16 = bf16.values(), got_f16 = f16.values(), got_tf32 = tf32.values();
  const std::vector<float> got_widened = widened.values();
  for (int i = 0; i < n; ++i) {
    const auto pair = [](auto low, auto high) { return static_cast<uint32_t>(low.bits) | high.bits << 16; };
    expect(got_bf16[i] == pair(bf16_t::round(in[i]), bf16_t::round(-in[i])), "pack<bf16_t>", i);
    expect(got_f16[i] == pair(f16_t::round(in[i]), f16_t::round(-in[i])), "pack<f16_t>", i);
    expect(got_widened[2 * i] == static_cast<float>(bf16_t::round(in[i])), "to_float(bf16_t)", i);
    expect(got_widened[2 * i + 1] == static_cast<float>(f16_t::round(in[i])), "to_float(f16_t)", i);
    // 10 bits of fraction, ties away from zero.
    int exponent;
    const double fraction = std::frexp(static_cast<double>(in[i]), &exponent);
    const float tf32_want =
        std::isinf(in[i]) ? in[i] : static_cast<float>(std::ldexp(std::round(std::ldexp(fraction, 11)), exponent - 11));
    expect((got_tf32[i] & 0xFFFFE000u) == bit_cast<uint32_t>(tf32_want), "round_to_tf32", i);
  }
}

// ---------------------------------------------------------------------------------------------- matrices

__global__ void ldmatrix_kernel(const uint16_t* in, uint32_t* out, int transposed) {
  MOS_DYNAMIC_SHARED(shared);
  uint16_t* element = reinterpret_cast<uint16_t*>(shared);
  for (int i = threadIdx.x; i < 256; i += 32) element[i] = in[i];
  __syncwarp();
  uint32_t r[4];
  // Rows in another order than they lie in.
  const uint32_t address = shared_address(shared) + (31 - threadIdx.x) * 16;
  if (transposed) {
    ldmatrix_x4_trans(r, address);
  } else {
    ldmatrix_x4(r, address);
  }
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = r[i];
}
void test_ldmatrix() {
  std::vector<uint16_t> in(256);
  for (int i = 0; i < 256; ++i) in[i] = static_cast<uint16_t>(i * 257 + 3);
  Array<uint16_t> source(in);
  Array<uint32_t> out(128);
  for (int transposed = 0; transposed < 2; ++transposed) {
    run("ldmatrix", ldmatrix_kernel, dim3(1), dim3(32), 512, source.data(), out.data(), transposed);
    const std::vector<uint32_t> got = out.values();
    for (int lane = 0; lane < 32; ++lane) {
      for (int m = 0; m < 4; ++m) {
        const auto at = [&](int row, int col) { return in[(31 - (m * 8 + row)) * 8 + col]; };
        const int r = lane / 4, c = lane % 4 * 2;
        const uint32_t low = transposed ? at(c, r) : at(r, c), high = transposed ? at(c + 1, r) : at(r, c + 1);
        expect(got[lane * 4 + m] == (low | high << 16), transposed ? "ldmatrix_x4_trans" : "ldmatrix_x4", lane);
      }
    }
  }
}

enum Element { kBf16, kF16, kTf32 };
template <int kElement>
constexpr int kDepth = kElement == kTf32 ? 8 : 16;

// d (16, 8) = a (16, depth) b (depth, 8) + c, all row-major.
template <int kElement>
__global__ void mma_kernel(const float* a, const float* b, const float* c, float* d) {
  constexpr int kK = kDepth<kElement>;
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  float sum[4];
  uint32_t a_word[4], b_word[2];
  for (int i = 0; i < 4; ++i) sum[i] = c[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2];
  if constexpr (kElement == kTf32) {
    for (int i = 0; i < 4; ++i) a_word[i] = round_to_tf32(a[(g + 8 * (i % 2)) * kK + t + 4 * (i / 2)]);
    for (int i = 0; i < 2; ++i) b_word[i] = round_to_tf32(b[(t + 4 * i) * 8 + g]);
    mma_tf32(sum, a_word, b_word);
  } else {
    using E = std::conditional_t<kElement == kBf16, bf16_t, f16_t>;
    for (int i = 0; i < 4; ++i) {
      const float* pair = a + (g + 8 * (i % 2)) * kK + 2 * t + 8 * (i / 2);
      a_word[i] = pack<E>(pair[0], pair[1]);
    }
    for (int i = 0; i < 2; ++i) {
      const float* pair = b + (2 * t + 8 * i) * 8 + g;
      b_word[i] = pack<E>(pair[0], pair[8]);
    }
    if constexpr (kElement == kBf16) {
      mma_bf16(sum, a_word, b_word);
    } else {
      mma_f16(sum, a_word, b_word);
    }
  }
  for (int i = 0; i < 4; ++i) d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = sum[i];
}
template <int kElement>
void test_mma(const char* what) {
  constexpr int kK = kDepth<kElement>;
  const std::vector<float> a = small_integers(16 * kK), b = small_integers(kK * 8), c = small_integers(16 * 8);
  Array<float> a_array(a), b_array(b), c_array(c), d_array(16 * 8);
  run(what, mma_kernel<kElement>, dim3(1), dim3(32), 0, a_array.data(), b_array.data(), c_array.data(), d_array.data());
  const std::vector<float> d = d_array.values();
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      float want = c[i * 8 + j];
      for (int k = 0; k < kK; ++k) want += a[i * kK + k] * b[k * 8 + j];
      expect(d[i * 8 + j] == want, what, i * 8 + j);
    }
  }
}

// ---------------------------------------------------------------------------------------------- errors

__global__ void trap_kernel(int lane) {
  if (static_cast<int>(threadIdx.x) == lane) trap();
}
// Last: a GPU takes no launches after it.
void test_trap() {
  KernelState state;
  cudaError_t error = start_kernel(state, trap_kernel, dim3(1), dim3(32), SharedBytes{}, false, nullptr, 40);
  if (error == cudaSuccess) error = finish();
  expect(error == cudaSuccess, "no trap", 0);
  error = start_kernel(state, trap_kernel, dim3(1), dim3(32), SharedBytes{}, false, nullptr, 5);
  if (error == cudaSuccess) error = finish();
  expect(error == cudaErrorLaunchFailure, "trap", static_cast<int>(error));
}

void test_all() {
  test_numbers();
  test_barrier();
  test_any();
  test_warp();
  test_vectors();
  test_pipeline();
  test_conversions();
  test_ldmatrix();
  test_mma<kBf16>("mma_bf16");
  test_mma<kF16>("mma_f16");
  test_mma<kTf32>("mma_tf32");
}

}  // namespace

// wrappers [seeds per schedule of the emulator]
int main(int argc, char** argv) {
#if defined(__CUDACC__)
  (void)argc;
  (void)argv;
  test_all();
#else
  const int seeds = argc > 1 ? std::atoi(argv[1]) : 10;
  for (const char* schedule : {"sequential", "reverse", "random", "priority"}) {
    for (int seed = 0; seed < seeds; ++seed) {
      char options[96];
      std::snprintf(options, sizeof(options), "schedule=%s,seed=%d,resident_blocks=%d", schedule, seed, 1 + seed % 3);
      if (emulator_config(options) != 0) std::abort();
      test_all();
    }
  }
#endif
  test_trap();
  std::printf(failures ? "wrappers: %d failures\n" : "wrappers: ok\n", failures);
  return failures != 0;
}
