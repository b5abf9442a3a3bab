// Errors of launches: as on a GPU, who launches is not told; who asks later is.
#pragma once

#include <string>

namespace ptx {

std::string& pending_error();

}  // namespace ptx
