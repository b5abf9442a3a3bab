// The geometry of csrc/cuda/heuristics.h with C linkage: for its tests, for the gates and for the model of times. A
// library of its own too, which compiles in a second.
#include "../../csrc/cuda/heuristics.h"

using namespace mos;
using namespace mos::cuda;

extern "C" {

void mos_shrink_geometry(int64_t rows, int64_t cols, int64_t rank, int size, int64_t* out) {
  const ShrinkGeometry g = shrink_geometry(rows, cols, rank, size);
  const int64_t all[] = {g.ranks, g.row_tiles, g.columns.count, g.columns.tiles, g.rank_blocks};
  for (int i = 0; i < 5; ++i) out[i] = all[i];
}
void mos_expand_geometry(int64_t rows, int64_t cols, int64_t rank, int size, int64_t* out) {
  const ExpandGeometry g = expand_geometry(rows, cols, rank, size);
  const int64_t all[] = {g.ranks, g.column_tiles, g.column_blocks, g.rows.count, g.rows.tiles};
  for (int i = 0; i < 5; ++i) out[i] = all[i];
}
void mos_backward_geometry(int64_t rows, int64_t cols, int64_t rank, int size, int64_t* out) {
  const BackwardGeometry g = backward_geometry(rows, cols, rank, size);
  const int64_t all[] = {g.ranks, g.column_blocks, g.rows.count, g.rows.tiles, g.rank_blocks, g.column_tiles};
  for (int i = 0; i < 6; ++i) out[i] = all[i];
}
// The most shared memory of a kernel's blocks: of shrink with a float pool, of expand with all its column tiles.
int mos_shared_bytes(int kernel, int size, int ranks) {
  return kernel == 0   ? shrink_shared(size, ranks, max_pool_bytes(size))
         : kernel == 1 ? expand_shared(size, ranks, max_expand_tiles(size))
                       : backward_shared(size, ranks);
}
uint32_t mos_divide(uint32_t n, uint32_t d) { return divide(n, divider(d)); }
int mos_few_sums(int64_t elements) { return few_sums(elements); }
int mos_sum_first(int64_t planes, int64_t readers, int64_t elements, int shared) {
  return sum_first(planes, readers, elements, shared != 0);
}

// How a kernel (0 shrink, 1 expand, 2 backward) goes through a matrix (rows, cols), for benchmarks/kernel_model.py:
// ranks of a block, threads of a block, rows and columns of a tile, row and column tiles of a block, and blocks by
// rows, columns and ranks.
void mos_tiling(int kernel, int64_t rows, int64_t cols, int64_t rank, int size, int64_t* out) {
  const auto tell = [out](auto... values) {
    const int64_t all[] = {static_cast<int64_t>(values)...};
    for (int i = 0; i < 9; ++i) out[i] = all[i];
  };
  if (kernel == 0) {
    const ShrinkGeometry g = shrink_geometry(rows, cols, rank, size);
    tell(g.ranks, kThreads, shrink_rows(size, g.ranks), shrink_cols(size, g.ranks), 1, g.columns.tiles, g.row_tiles,
         g.columns.count, g.rank_blocks);
  } else if (kernel == 1) {
    const ExpandGeometry g = expand_geometry(rows, cols, rank, size);
    tell(g.ranks, kThreads, kTileRows, kExpandCols, g.rows.tiles, g.column_tiles, g.rows.count, g.column_blocks, 1);
  } else {
    const BackwardGeometry g = backward_geometry(rows, cols, rank, size);
    tell(g.ranks, kThreads, kTileRows, backward_cols(size), g.rows.tiles, g.column_tiles, g.rows.count, g.column_blocks,
         g.rank_blocks);
  }
}

}  // extern "C"
