// fp32 matrix products on AVX-512, for processors whose full width the default library does not use
// (Zen 5). Compiled for the variant avx512 only.

#include "avx512.h"

#include <pthread.h>
#include <stdlib.h>

#define TILE_ROWS 14     // of C per tile, and
#define TILE_COLUMNS 32  // columns: 28 vectors of sums, 2 of B and 1 of A are registers
#define DEPTH 256        // of the depth, packed at once: partial sums of this many products are added up
#define B_SIZE (1 << 17) // numbers of B packed at once: they fit into a core's L2 cache
#define A_ROWS (8 * TILE_ROWS)       // rows of A packed at once
#define B_COLUMNS (4 * TILE_COLUMNS) // columns of B packed by one thread at once, at most

// Each calling thread keeps its workspace: newly allocated memory would be in no cache.
typedef struct { void *memory; int64_t bytes; } Workspace;
static pthread_key_t workspace_key;
static pthread_once_t workspace_once = PTHREAD_ONCE_INIT;
static void free_workspace(void *given) {
  free(((Workspace *)given)->memory);
  free(given);
}
static void create_workspace_key(void) { pthread_key_create(&workspace_key, free_workspace); }

void *workspace(int64_t bytes) {
  pthread_once(&workspace_once, create_workspace_key);
  Workspace *kept = pthread_getspecific(workspace_key);
  if (!kept) {
    kept = calloc(1, sizeof(Workspace));
    if (!kept || pthread_setspecific(workspace_key, kept)) return 0;
  }
  if (kept->bytes < bytes) {
    free(kept->memory);
    kept->memory = aligned_alloc(64, round_up(bytes, 64));
    kept->bytes = kept->memory ? bytes : 0;
  }
  return kept->memory;
}

// Pack `lines` lines (rows of A, columns of B) into panels of `side` lines, each [depth, side] and
// filled up with zeros; the depth may be rounded up to 16. `line` and `step` are the strides from
// line to line and along a line. Memory is read along the contiguous dimension.
INLINE void pack(const float *from, int64_t line, int64_t step, int64_t lines, int64_t depth, const int side, float *to) {
  const int64_t panel = round_up(depth, 16) * side;
#define PLACE(k) (to + i / side * panel + (k) * side + x), mask_first(side - x)
  if (line == 1)
    for (int64_t k = 0; k < depth; k++)
      for (int64_t i = 0; i < lines; i += side)
        UNROLL for (int x = 0; x < side; x += 16)
          _mm512_mask_storeu_ps(PLACE(k), _mm512_maskz_loadu_ps(mask_first(lines - i - x), from + k * step + i + x));
  else
    for (int64_t i = 0; i < lines; i += side)
      for (int64_t k = 0; k < depth; k += 16)
        for (int x = 0; x < side; x += 16) {
          __m512i tile[16];
          UNROLL for (int y = 0; y < 16; y++)
            tile[y] = i + x + y < lines ? _mm512_maskz_loadu_epi32(mask_first(depth - k), from + (i + x + y) * line + k)
                                        : _mm512_setzero_si512();
          transpose(tile);
          UNROLL for (int y = 0; y < 16; y++) _mm512_mask_storeu_epi32(PLACE(k + y), tile[y]);
        }
}

// C [rows, columns] = or += packed A · packed B, plus `bias` unless it is NULL. Not inlined, so
// that all registers are free for it.
static __attribute__((noinline)) void matmul_tile(int64_t depth, const float *a, const float *b, float *c, int64_t c_row,
                                                  int64_t rows, int64_t columns, int accumulate, const float *bias) {
  __m512 sum[TILE_ROWS][2];
  for (int64_t y = 0; y < rows; y++) { // they are in the cache when they are written
    __builtin_prefetch(c + y * c_row, 1);
    __builtin_prefetch(c + y * c_row + 16, 1);
  }
  UNROLL for (int y = 0; y < TILE_ROWS; y++) sum[y][0] = sum[y][1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < depth; k++, a += TILE_ROWS, b += TILE_COLUMNS) {
    const __m512 b0 = _mm512_load_ps(b), b1 = _mm512_load_ps(b + 16);
    UNROLL for (int y = 0; y < TILE_ROWS; y++) {
      const __m512 x = _mm512_set1_ps(a[y]);
      sum[y][0] = _mm512_fmadd_ps(x, b0, sum[y][0]);
      sum[y][1] = _mm512_fmadd_ps(x, b1, sum[y][1]);
    }
  }
  UNROLL for (int half = 0; half < 2; half++) {
    const __mmask16 mask = mask_first(columns - 16 * half);
    const __m512 added = bias ? _mm512_maskz_loadu_ps(mask, bias + 16 * half) : _mm512_setzero_ps();
    UNROLL for (int y = 0; y < TILE_ROWS; y++) if (y < rows) {
      float *to = c + y * c_row + 16 * half;
      const __m512 before = accumulate ? _mm512_maskz_loadu_ps(mask, to) : _mm512_setzero_ps();
      _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(_mm512_add_ps(before, sum[y][half]), added));
    }
  }
}

// C [rows, columns] = A [rows, depth] B [depth, columns] + bias [columns] unless it is NULL. One of
// the two strides of A is 1, and one of B's; C is contiguous. Return 0, or 1 without memory for a
// workspace.
int matmul_avx512(int64_t rows, int64_t columns, int64_t depth, const float *a, int64_t a_row, int64_t a_column, const float *b,
                  int64_t b_row, int64_t b_column, const float *bias, float *c, int threads) {
  const int64_t width = round_up(B_SIZE / round_up(min(depth, DEPTH), 16), TILE_COLUMNS);
  const int64_t rows_per_thread = round_up((rows + threads - 1) / threads, TILE_ROWS);
  const int64_t chunk = min(B_COLUMNS, round_up((width + threads - 1) / threads, TILE_COLUMNS)); // work for each thread
  float *packed_b = workspace(round_up(min(columns, width), TILE_COLUMNS) * round_up(min(depth, DEPTH), 16) * sizeof(float));
  if (!packed_b) return 1;
#pragma omp parallel num_threads(threads)
  {
    float packed_a[A_ROWS * DEPTH] __attribute__((aligned(64)));
    for (int64_t k = 0; k < depth; k += DEPTH)
      for (int64_t n = 0; n < columns; n += width) {
        const int64_t block_depth = min(DEPTH, depth - k), block_columns = min(width, columns - n);
        const int64_t panel_depth = round_up(block_depth, 16);
        const float *block_bias = bias && k + block_depth == depth ? bias + n : 0;
#pragma omp for schedule(static)
        for (int64_t j = 0; j < block_columns; j += chunk)
          pack(b + k * b_row + (n + j) * b_column, b_column, b_row, min(chunk, block_columns - j), block_depth, TILE_COLUMNS,
               packed_b + j * panel_depth);
#pragma omp for schedule(static, 1)
        for (int64_t part = 0; part < threads; part++) {
          const int64_t end = min(rows, (part + 1) * rows_per_thread);
          for (int64_t first = part * rows_per_thread; first < end; first += A_ROWS) {
            const int64_t block_rows = min(A_ROWS, end - first);
            pack(a + first * a_row + k * a_column, a_row, a_column, block_rows, block_depth, TILE_ROWS, packed_a);
            for (int64_t i = 0; i < block_rows; i += TILE_ROWS)
              for (int64_t j = 0; j < block_columns; j += TILE_COLUMNS)
                matmul_tile(block_depth, packed_a + i * panel_depth, packed_b + j * panel_depth,
                            c + (first + i) * columns + n + j, columns, min(TILE_ROWS, block_rows - i),
                            min(TILE_COLUMNS, block_columns - j), k > 0, block_bias ? block_bias + j : 0);
          }
        }
      }
  }
  return 0;
}
