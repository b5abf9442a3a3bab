// How a kernel asks for threads without knowing whose they are.
#pragma once

#include <cstdint>
#include <functional>

namespace mos {

// Runs task(i) once for every i in [0, count), in any order, on any thread. Kernels choose `count`
// from shapes alone and give every output element to one task, so results do not depend on the
// number of threads.
using ParallelFor = std::function<void(int64_t count, const std::function<void(int64_t)>& task)>;

}  // namespace mos
