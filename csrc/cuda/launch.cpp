#include "launch.h"

namespace mos::cuda {

LaunchRecord& last_launch() {
  static thread_local LaunchRecord record{"nothing", "none", {0, 0, 0}, 0, 0};
  return record;
}

}  // namespace mos::cuda
