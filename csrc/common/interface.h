// The number of the operator interface that a library is built for. mos_ext/ops/loader.py looks for this string in the
// file before loading it, so that a library of another version is refused in one sentence instead of failing at its
// first call. Bump it together with INTERFACE in mos_ext/ops/schema.py, whenever a schema changes.
#pragma once

#define MOS_EXT_INTERFACE "mos_ext interface 2."
