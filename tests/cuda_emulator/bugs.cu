// Small kernels with one classical bug each, and correct ones: what tests/test_cuda_emulator.py measures the emulator
// with. For the emulator only.
//     bugs list                 names
//     bugs NAME [SEEDS]         "NAME detected 17/20: first message"; a sanitizer adds its own reports
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "../../csrc/cuda/device.h"

extern "C" int emulator_config(const char* options);
extern "C" const char* emulator_last_error();
extern "C" int emulator_synchronize();
extern "C" void* emulator_guarded_alloc(size_t bytes, size_t align);
extern "C" int emulator_guarded_free(void* p, size_t bytes, size_t align);

namespace {

using namespace mos::cuda;

constexpr unsigned kAll = 0xFFFFFFFFu;
constexpr int kThreads = 64;  // of every block: two warps
constexpr int kTiles = 6;     // of one vector per thread
constexpr int kInputs = kTiles * kThreads * 4;

// ---------------------------------------------------------------------------------------------- reductions

// out[i] = the sum of the first kThreads inputs, a part of each in every round.
enum class Reduction { correct, shared_reused, never_written, written_past_the_end, written_before_the_start };
template <Reduction kBug>
__global__ void reduction(const float* x, float* out) {
  MOS_DYNAMIC_SHARED(shared);
  float* partial = reinterpret_cast<float*>(shared);  // one per warp
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float total = 0.f;
  for (int round = 0; round < 4; ++round) {
    float sum = x[threadIdx.x] * (round == 0 ? 0.125f : 0.0625f * (1 << round));  // weights of 1 in all
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAll, sum, distance);
    if (kBug != Reduction::shared_reused) __syncthreads();
    if (lane == 0 && (kBug != Reduction::never_written || warp == 0)) partial[warp] = sum;
    if (kBug == Reduction::written_past_the_end && threadIdx.x < 3) partial[threadIdx.x] = sum;
    if (kBug == Reduction::written_before_the_start && threadIdx.x == 0) partial[-1] = sum;
    __syncthreads();
    total += partial[0] + partial[1];
  }
  out[threadIdx.x] = total;
}

// The same without shuffles: lanes read what others of their warp have just written.
__global__ void missing_syncwarp(const float* x, float* out) {
  MOS_DYNAMIC_SHARED(shared);
  float* value = reinterpret_cast<float*>(shared);
  const int i = threadIdx.x;
  value[i] = x[i];
  for (int distance = 16; distance > 0; distance /= 2) value[i] = value[i] + value[i ^ distance];
  __syncthreads();
  out[i] = value[0] + value[32];
}
__global__ void lost_update(const float* x, float* out) {
  MOS_DYNAMIC_SHARED(shared);
  float* total = reinterpret_cast<float*>(shared);
  if (threadIdx.x == 0) *total = 0.f;
  __syncthreads();
  const float before = *total;
  __syncwarp();  // somebody is between the read and the write, as on a GPU
  *total = before + x[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = *total;
}

// ---------------------------------------------------------------------------------------------- pipelines

// out[i] = the sum of the vectors i + 33 of all tiles, brought by cp.async two stages deep.
enum class Pipeline {
  correct,
  no_wait,
  wait_for_one_too_few,
  no_commit,
  no_barrier_before_reading,
  no_barrier_before_overwriting,
  read_past_the_end,
};
template <Pipeline kBug>
__global__ void pipeline(const float* x, float* out) {
  MOS_DYNAMIC_SHARED(shared);
  const int i = threadIdx.x;
  const auto load = [&](int tile) {
    cp_async_16(shared_address(shared + (tile % 2 * kThreads + i) * 16), x + (tile * kThreads + i) * 4, 16);
    if (kBug != Pipeline::no_commit) cp_async_commit();
  };
  const int last = kBug == Pipeline::read_past_the_end ? kTiles : kTiles - 1;
  float sum = 0.f;
  load(0);
  for (int tile = 0; tile < kTiles; ++tile) {
    if (tile < last) {
      load(tile + 1);
    } else {
      cp_async_commit();
    }
    if (kBug == Pipeline::wait_for_one_too_few) {
      cp_async_wait<2>();
    } else if (kBug != Pipeline::no_wait) {
      cp_async_wait<1>();
    }
    if (kBug != Pipeline::no_barrier_before_reading) __syncthreads();
    const float* vector = reinterpret_cast<const float*>(shared) + (tile % 2 * kThreads + (i + 33) % kThreads) * 4;
    sum += vector[0] + vector[1] + vector[2] + vector[3];
    if (kBug != Pipeline::no_barrier_before_overwriting) __syncthreads();
  }
  out[i] = sum;
}

// ---------------------------------------------------------------------------------------------- divergence

__global__ void shuffle_in_branch(const float* x, float* out) {
  float value = x[threadIdx.x];
  if (threadIdx.x % 32 < 16) value += __shfl_xor_sync(kAll, value, 1);
  __syncthreads();
  out[threadIdx.x] = value;
}
__global__ void shuffle_without_caller(const float* x, float* out) {
  out[threadIdx.x] = __shfl_xor_sync(0x0000FFFFu, x[threadIdx.x], 1);
}
__global__ void shuffle_from_exited(const float* x, float* out) {
  if (threadIdx.x % 32 >= 20) return;
  out[threadIdx.x] = __shfl_sync(kAll, x[threadIdx.x], 25);
}
__global__ void barrier_in_branch(const float* x, float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = x[threadIdx.x];
}
__global__ void barrier_in_loop(const float* x, float* out) {
  float sum = 0.f;
  for (unsigned i = 0; i < 2 + threadIdx.x / 32; ++i) {
    sum += x[i];
    __syncthreads();
  }
  __syncthreads();
  out[threadIdx.x] = sum;
}

// Deadlocks: lane 0 waits for lane 1, which waits for everybody.
__global__ void deadlock(const float* x, float* out) {
  if (threadIdx.x == 0) __syncwarp(3u);
  __syncthreads();
  out[threadIdx.x] = x[threadIdx.x];
}

// One of the blocks; the others end.
__global__ void deadlock_of_a_block(const float* x, float* out) {
  if (blockIdx.x == 1) deadlock(x, out);
}

enum class Matrices { correct, half_warp, after_exit, uninitialised, row_outside };
template <Matrices kBug>
__global__ void matrices(const float*, float* out) {
  MOS_DYNAMIC_SHARED(shared);
  if (threadIdx.x < 32) store_16(shared + threadIdx.x * 16, {0, 0, 0, 0});
  __syncthreads();
  const unsigned lane = threadIdx.x % 32;
  float sum[4];
  uint32_t a[4];
  const uint32_t b[2] = {0, 0};
  if (kBug != Matrices::uninitialised) sum[0] = sum[1] = sum[2] = sum[3] = 0.f;
  ldmatrix_x4(a, shared_address(shared) + (lane + (kBug == Matrices::row_outside ? 1 : 0)) * 16);
  if (kBug == Matrices::after_exit && threadIdx.x == 40) return;
  if (kBug != Matrices::half_warp || lane < 16) mma_bf16(sum, a, b);
  out[threadIdx.x] = sum[0];
}

// ---------------------------------------------------------------------------------------------- chains

// out[i] = x[i + 1], three times: each launch reads what the one before has written, and all but the first are early.
enum class Chain { correct, no_wait, reads_too_early, copies_too_early, waits_in_half, lets_next_start_too_early };
template <Chain kBug>
__global__ void chain(const float* x, float* out) {
  MOS_DYNAMIC_SHARED(shared);
  float* copied = reinterpret_cast<float*>(shared);
  const int i = threadIdx.x, next = (i + 1) % kThreads;
  float value = 0.f;
  if (kBug == Chain::reads_too_early) value = x[next];
  if (kBug == Chain::copies_too_early && i % 4 == 0) cp_async_16(shared_address(copied + i), x + i, 16);
  if (kBug == Chain::lets_next_start_too_early) let_next_launch_start();
  if (kBug != Chain::no_wait && i < 32) wait_for_launch_before();
  __syncthreads();  // for which one half waits while the other waits for the launch before
  if (kBug != Chain::no_wait && kBug != Chain::waits_in_half) wait_for_launch_before();
  if (kBug != Chain::no_wait && kBug != Chain::waits_in_half) let_next_launch_start();
  if (kBug != Chain::reads_too_early) value = x[next];
  if (kBug == Chain::copies_too_early) {
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    value = copied[next];
  }
  out[i] = value;
}

// ---------------------------------------------------------------------------------------------- memory

__global__ void read_past_the_end(const float* x, float* out) { out[threadIdx.x] = x[kInputs - 63 + threadIdx.x]; }
__global__ void write_past_the_end(const float* x, float* out) { out[threadIdx.x + 1] = x[threadIdx.x]; }
__global__ void misaligned_vector(const float* x, float* out) {
  out[threadIdx.x] = static_cast<float>(load_16(x + 2 * threadIdx.x).x);
}
__global__ void blocks_race(const float* x, float* out) { out[threadIdx.x] = x[threadIdx.x] + 0.f * blockIdx.x; }
__global__ void stack_overflow(const float* x, float* out) {
  volatile float large[40000];
  large[threadIdx.x] = x[0];
  large[39999] = x[1];
  out[threadIdx.x] = large[threadIdx.x];
}
__global__ void overflowing_index(const float* x, float* out) {
  const int row = 70000 + static_cast<int>(threadIdx.x), pitch = 70000;
  out[threadIdx.x] = static_cast<float>(row * pitch) + x[0];
}
__global__ void division_by_zero(const float* x, float* out) {
  out[threadIdx.x] = static_cast<float>(7 / static_cast<int>(x[threadIdx.x]));
}
__global__ void endless(const float* x, float* out) {
  while (x[threadIdx.x] >= 0) __syncthreads();
  out[0] = 0;
}

// ---------------------------------------------------------------------------------------------- the table

enum class Result { sum, vectors, zero, chain, any };
struct Case {
  const char* name;
  void (*kernel)(const float*, float*);
  Result result;
  size_t shared_bytes = 0;
  unsigned blocks = 1;
};
constexpr size_t kPartials = 2 * sizeof(float), kStages = 2 * kThreads * 16;
const Case kCases[] = {
    {"correct_reduction", reduction<Reduction::correct>, Result::sum, kPartials},
    {"correct_pipeline", pipeline<Pipeline::correct>, Result::vectors, kStages},
    {"correct_matrices", matrices<Matrices::correct>, Result::zero, 512},
    {"correct_chain", chain<Chain::correct>, Result::chain, kPartials},
    {"launch_without_a_wait", chain<Chain::no_wait>, Result::chain, kPartials},
    {"read_before_the_wait", chain<Chain::reads_too_early>, Result::chain, kPartials},
    {"copy_before_the_wait", chain<Chain::copies_too_early>, Result::chain, kThreads * sizeof(float)},
    {"wait_in_half_the_threads", chain<Chain::waits_in_half>, Result::chain, kPartials},
    {"next_launch_before_the_wait", chain<Chain::lets_next_start_too_early>, Result::chain, kPartials},
    {"shared_reused", reduction<Reduction::shared_reused>, Result::sum, kPartials},
    {"never_written", reduction<Reduction::never_written>, Result::sum, kPartials},
    {"shared_written_past_the_end", reduction<Reduction::written_past_the_end>, Result::any, kPartials},
    {"shared_written_before_the_start", reduction<Reduction::written_before_the_start>, Result::any, kPartials},
    {"missing_syncwarp", missing_syncwarp, Result::sum, kThreads * sizeof(float)},
    {"lost_update", lost_update, Result::sum, sizeof(float)},
    {"no_wait", pipeline<Pipeline::no_wait>, Result::vectors, kStages},
    {"wait_for_one_too_few", pipeline<Pipeline::wait_for_one_too_few>, Result::vectors, kStages},
    {"no_commit", pipeline<Pipeline::no_commit>, Result::vectors, kStages},
    {"no_barrier_before_reading", pipeline<Pipeline::no_barrier_before_reading>, Result::vectors, kStages},
    {"no_barrier_before_overwriting", pipeline<Pipeline::no_barrier_before_overwriting>, Result::vectors, kStages},
    {"copy_past_the_end", pipeline<Pipeline::read_past_the_end>, Result::vectors, kStages},
    {"shuffle_in_branch", shuffle_in_branch, Result::any},
    {"shuffle_without_caller", shuffle_without_caller, Result::any},
    {"shuffle_from_exited", shuffle_from_exited, Result::sum},
    {"barrier_in_branch", barrier_in_branch, Result::any},
    {"barrier_in_loop", barrier_in_loop, Result::any},
    {"deadlock", deadlock, Result::any},
    {"deadlock_of_a_block", deadlock_of_a_block, Result::any, 0, 4},
    {"half_warp_mma", matrices<Matrices::half_warp>, Result::any, 512},
    {"mma_after_exit", matrices<Matrices::after_exit>, Result::any, 512},
    {"uninitialised_sum", matrices<Matrices::uninitialised>, Result::zero, 512},
    {"ldmatrix_row_outside", matrices<Matrices::row_outside>, Result::any, 512},
    {"read_past_the_end", read_past_the_end, Result::any},
    {"write_past_the_end", write_past_the_end, Result::any},
    {"misaligned_vector", misaligned_vector, Result::any},
    {"blocks_race", blocks_race, Result::any, 0, 4},
    {"stack_overflow", stack_overflow, Result::any},
    {"overflowing_index", overflowing_index, Result::any},
    {"division_by_zero", division_by_zero, Result::any},
    {"endless", endless, Result::any},
};

float expected(Result result, const float* x, int thread) {
  float sum = 0.f;
  if (result == Result::sum) {
    for (int i = 0; i < kThreads; ++i) sum += x[i];
  }
  if (result == Result::vectors) {
    for (int tile = 0; tile < kTiles; ++tile) {
      for (int i = 0; i < 4; ++i) sum += x[(tile * kThreads + (thread + 33) % kThreads) * 4 + i];
    }
  }
  return result == Result::chain ? x[(thread + 3) % kThreads] : sum;
}

// What is wrong with one execution; empty where nothing was seen.
std::string problem(const Case& test) {
  constexpr size_t kInBytes = kInputs * sizeof(float), kOutBytes = kThreads * sizeof(float);
  const int launches = test.result == Result::chain ? 3 : 1;
  float* x = static_cast<float*>(emulator_guarded_alloc(kInBytes, 16));
  std::vector<float*> outs(launches);
  for (float*& out : outs) out = static_cast<float*>(emulator_guarded_alloc(kOutBytes, 16));
  for (int i = 0; i < kInputs; ++i) x[i] = static_cast<float>(i % 7);
  std::string text;
  const dim3 grid(test.blocks), block(kThreads);
  KernelState state;
  const int bytes = static_cast<int>(test.shared_bytes);
  const SharedBytes shared{bytes, bytes};
  bool failed = false;
  for (int i = 0; i < launches; ++i) {
    const float* in = i ? outs[i - 1] : x;
    failed |= start_kernel(state, test.kernel, grid, block, shared, i > 0, nullptr, in, outs[i]) != cudaSuccess;
  }
  if (launches > 1) failed |= emulator_synchronize() != cudaSuccess;
  if (failed) text = emulator_last_error();
  const float* out = outs.back();
  for (int i = 0; i < kThreads && text.empty() && test.result != Result::any; ++i) {
    const float want = expected(test.result, x, i);
    if (out[i] == want) continue;
    text =
        "result " + std::to_string(out[i]) + " of thread " + std::to_string(i) + " instead of " + std::to_string(want);
  }
  bool intact = emulator_guarded_free(x, kInBytes, 16);
  for (float* buffer : outs) intact &= emulator_guarded_free(buffer, kOutBytes, 16);
  return intact || !text.empty() ? text : "written outside a buffer";
}

void examine(const Case& test, int seeds) {
  int detected = 0;
  std::string first;
  for (int seed = 0; seed < seeds; ++seed) {
    const char* const schedules[] = {"sequential", "reverse", "random", "priority"};
    const std::string options = "timeout=0.05,seed=" + std::to_string(seed) + ",schedule=" + schedules[seed % 4] +
                                ",resident_blocks=2,early=" + (test.result == Result::chain ? "1" : "0");
    if (emulator_config(options.c_str()) != 0) std::abort();
    const std::string text = problem(test);
    if (text.empty()) continue;
    ++detected;
    if (first.empty()) first = text;
  }
  std::printf("%s detected %d/%d: %s\n", test.name, detected, seeds, first.c_str());
}

}  // namespace

int main(int argc, char** argv) {
  const std::string name = argc > 1 ? argv[1] : "list";
  const int seeds = argc > 2 ? std::atoi(argv[2]) : 20;
  bool found = name == "list";
  for (const Case& test : kCases) {
    if (name == "list") std::puts(test.name);
    if (name != test.name && name != "all") continue;
    found = true;
    examine(test, seeds);
  }
  return found ? 0 : 2;
}
