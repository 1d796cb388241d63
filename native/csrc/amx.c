// fp32 matrix products on Intel's matrix units (AMX), which multiply bf16 only.
//
// An fp32 number x is the sum of three bf16 parts that hold its 24 bits: h = bf16(x),
// m = bf16(x − h), l = bf16(x − h − m). Of the nine products of the parts of two numbers, the six
// hh + hm + mh + hl + lh + mm are summed in fp32; the others are below its last bit.
//
// The file is compiled for AVX-512; what needs more is in functions with a target of their own, and
// dispatch.c checks whether they can be called. Older compilers do not know these targets: without
// `matmul_amx`, the product on AVX-512 remains.

#if __clang_major__ >= 12 || (!defined(__clang__) && __GNUC__ >= 11)

#include "avx512.h"

#define AMX static __attribute__((target("amx-tile,amx-bf16,avx512bf16"), noinline))
#define INLINE_AMX static inline __attribute__((target("amx-tile,amx-bf16,avx512bf16"), always_inline))

#define SIDE 32            // rows and columns of C computed at once: two by two tiles of 16
#define STEP 32            // of the depth, in one tile
#define PART (SIDE * STEP) // numbers of one part (h, m or l) of SIDE lines and a step
#define DEPTH 512          // of the depth, packed at once: partial sums of this many products are added up
#define A_SIZE (1 << 17)   // numbers of A packed at once: they fit into a core's L2 cache
#define B_SIZE (1 << 15)   // numbers of packed B that are used at once: they fit next to them
#define CHUNK_COLUMNS 64   // columns of B packed by one thread at once
#define MAX_COLUMNS 4096   // columns of B packed at once

INLINE_AMX __m512i to_bf16(__m512 x) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)); }
INLINE_AMX __m512 from_bf16(__m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }

// split two vectors into parts; each lane of a part holds a pair, `even` in its lower half
INLINE_AMX void split_pairs(__m512 even, __m512 odd, __m512i parts[3]) {
  UNROLL for (int part = 0; part < 3; part++) {
    const __m512i low = to_bf16(even), high = to_bf16(odd);
    parts[part] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    even = _mm512_sub_ps(even, from_bf16(low));
    odd = _mm512_sub_ps(odd, from_bf16(high));
  }
}

// split 32 consecutive numbers into parts; pairs are neighbors
INLINE_AMX void split_row(__m512 first, __m512 second, __m512i parts[3]) {
  UNROLL for (int part = 0; part < 3; part++) {
    const __m512i x = parts[part] = (__m512i)_mm512_cvtne2ps_pbh(second, first);
    first = _mm512_sub_ps(first, from_bf16(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(x))));
    second = _mm512_sub_ps(second, from_bf16(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(x, 1))));
  }
}

// Pack `lines` lines (rows of A, columns of B) into panels of SIDE lines, filled up with zeros. A
// panel holds, for each step of the depth, two tiles of 16 lines for each part. A row of a tile is a
// line of A (`is_a`), or a pair of the depth of B. `line` and `step` are the strides from line to
// line and along a line. Memory is read along the contiguous dimension.
AMX void pack(const float *from, int64_t line, int64_t step, int64_t lines, int64_t depth, int is_a, uint16_t *to) {
  const int64_t panel = 3 * round_up(depth, STEP) * SIDE, padded = round_up(lines, SIDE);
  __m512i parts[3];
#define TILE(i, k) (to + (i) / SIDE * panel + (k) / STEP * 3 * PART + (i) % SIDE / 16 * 16 * STEP)
  if (step == 1)
    for (int64_t i = 0; i < padded; i++)
      for (int64_t k = 0; k < depth; k += STEP) {
        const int64_t rest = i < lines ? depth - k : 0;
        const float *numbers = from + i * line + k;
        split_row(_mm512_maskz_loadu_ps(mask_first(rest), numbers), _mm512_maskz_loadu_ps(mask_first(rest - 16), numbers + 16),
                  parts);
        UNROLL for (int part = 0; part < 3; part++)
          _mm512_store_si512(TILE(i, k) + part * PART + i % 16 * STEP, parts[part]);
      }
  else
    for (int64_t k = 0; k < round_up(depth, STEP); k += 2)
      for (int64_t i = 0; i < padded; i += 16) {
        const float *numbers = from + i + k * step;
        split_pairs(_mm512_maskz_loadu_ps(mask_first(k < depth ? lines - i : 0), numbers),
                    _mm512_maskz_loadu_ps(mask_first(k + 1 < depth ? lines - i : 0), numbers + step), parts);
        UNROLL for (int part = 0; part < 3; part++)
          _mm512_store_si512(TILE(i, k) + part * PART + k % STEP / 2 * STEP, parts[part]);
      }
  if (is_a == (step == 1)) return;
  for (int64_t i = 0; i < padded; i += 16)
    for (int64_t k = 0; k < depth; k += STEP)
      for (int part = 0; part < 3; part++) {
        __m512i *tile = (__m512i *)(TILE(i, k) + part * PART), pairs[16];
        UNROLL for (int y = 0; y < 16; y++) pairs[y] = _mm512_load_si512(tile + y);
        transpose(pairs);
        UNROLL for (int y = 0; y < 16; y++) _mm512_store_si512(tile + y, pairs[y]);
      }
}

// eight tiles of 16 rows of 64 bytes; static, as gcc drops stores that only `_tile_loadconfig` reads
#define EIGHT(x) {x, x, x, x, x, x, x, x}
static const struct { uint8_t palette, start, zero[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } TILES = {
  .palette = 1, .row_bytes = EIGHT(64), .rows = EIGHT(16)
};

AMX void configure_tiles(void) { _tile_loadconfig(&TILES); }

AMX void release_tiles(void) { _tile_release(); }

// C [SIDE, SIDE] = packed A · packed B; rows of C are `c_row` bytes apart
AMX void multiply_block(int64_t steps, const uint16_t *a, const uint16_t *b, float *c, int64_t c_row) {
  __asm__ volatile("" ::: "memory"); // gcc does not know that `_tile_loadd` reads memory
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
#define LOAD_A(part) _tile_loadd(4, a + (part) * PART, 64); _tile_loadd(5, a + (part) * PART + 16 * STEP, 64);
#define LOAD_B(part) _tile_loadd(6, b + (part) * PART, 64); _tile_loadd(7, b + (part) * PART + 16 * STEP, 64);
#define MULTIPLY _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
  for (int64_t step = 0; step < steps; step++, a += 3 * PART, b += 3 * PART) {
    LOAD_A(0) LOAD_B(2) MULTIPLY
    LOAD_B(1) MULTIPLY
    LOAD_B(0) MULTIPLY
    LOAD_A(2) MULTIPLY
    LOAD_A(1) MULTIPLY
    LOAD_B(1) MULTIPLY
  }
  _tile_stored(0, c, c_row);
  _tile_stored(1, c + 16, c_row);
  _tile_stored(2, (char *)c + 16 * c_row, c_row);
  _tile_stored(3, (char *)(c + 16) + 16 * c_row, c_row);
}

// C [rows, columns] = or += `block` [SIDE, SIDE], plus `bias` unless it is NULL
INLINE void add_block(const float *block, float *c, int64_t c_row, int64_t rows, int64_t columns, int accumulate,
                      const float *bias) {
  for (int64_t x = 0; x < columns; x += 16) {
    const __mmask16 mask = mask_first(columns - x);
    const __m512 added = bias ? _mm512_maskz_loadu_ps(mask, bias + x) : _mm512_setzero_ps();
    for (int64_t y = 0; y < rows; y++) {
      float *to = c + y * c_row + x;
      const __m512 before = accumulate ? _mm512_maskz_loadu_ps(mask, to) : _mm512_setzero_ps();
      const __m512 sum = _mm512_add_ps(before, _mm512_load_ps(block + y * SIDE + x));
      _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(sum, added));
    }
  }
}

// C [rows, columns] = A [rows, depth] B [depth, columns] + bias [columns] unless it is NULL. One of
// the two strides of A is 1, and one of B's; C is contiguous. Return 0, or 1 without memory for a
// workspace.
int matmul_amx(int64_t rows, int64_t columns, int64_t depth, const float *a, int64_t a_row, int64_t a_column, const float *b,
               int64_t b_row, int64_t b_column, const float *bias, float *c, int threads) {
  const int64_t max_depth = round_up(min(depth, DEPTH), STEP), line = 3 * max_depth; // numbers of a packed line
  const int64_t a_rows = A_SIZE / max_depth / SIDE * SIDE, b_columns = B_SIZE / max_depth / SIDE * SIDE;
  const int64_t rows_per_thread = round_up((rows + threads - 1) / threads, SIDE);
  const int64_t packed_rows = min(a_rows, rows_per_thread);
  const int packs_a_once = rows_per_thread <= a_rows; // then columns of B are packed as they are needed
  const int64_t width = packs_a_once ? b_columns : MAX_COLUMNS;
  const int64_t b_size = round_up(min(columns, width), SIDE) * line, a_size = packed_rows * line;
  uint16_t *packed_b = workspace((b_size + threads * a_size) * sizeof(uint16_t)), *packed_a = packed_b + b_size;
  if (!packed_b) return 1;
#pragma omp parallel num_threads(threads)
  {
    configure_tiles();
    float block[SIDE * SIDE] __attribute__((aligned(64)));
    for (int64_t k = 0; k < depth; k += DEPTH)
      for (int64_t n = 0; n < columns; n += width) {
        const int64_t block_depth = min(DEPTH, depth - k), block_columns = min(width, columns - n);
        const int64_t steps = round_up(block_depth, STEP) / STEP, packed_line = 3 * steps * STEP;
        const float *block_bias = bias && k + block_depth == depth ? bias + n : 0; // added last: small sums are more exact
#pragma omp for schedule(static)
        for (int64_t j = 0; j < block_columns; j += CHUNK_COLUMNS)
          pack(b + k * b_row + (n + j) * b_column, b_column, b_row, min(CHUNK_COLUMNS, block_columns - j), block_depth, 0,
               packed_b + j * packed_line);
#pragma omp for schedule(static, 1)
        for (int64_t part = 0; part < threads; part++) {
          const int64_t end = min(rows, (part + 1) * rows_per_thread);
          for (int64_t first = part * rows_per_thread; first < end; first += a_rows) {
            uint16_t *left = packed_a + part * a_size;
            const int64_t block_rows = min(a_rows, end - first);
            if (!packs_a_once || n == 0)
              pack(a + first * a_row + k * a_column, a_row, a_column, block_rows, block_depth, 1, left);
            for (int64_t jj = 0; jj < block_columns; jj += b_columns)
              for (int64_t i = 0; i < block_rows; i += SIDE)
                for (int64_t j = jj; j < min(block_columns, jj + b_columns); j += SIDE) {
                  const int64_t tile_rows = min(SIDE, block_rows - i), tile_columns = min(SIDE, block_columns - j);
                  const float *tile_bias = block_bias ? block_bias + j : 0;
                  float *to = c + (first + i) * columns + n + j;
                  for (int64_t y = 0; y < tile_rows; y++) { // they are in the cache when they are written
                    __builtin_prefetch(to + y * columns, 1);
                    __builtin_prefetch(to + y * columns + 16, 1);
                  }
                  const int direct = k == 0 && !tile_bias && tile_rows == SIDE && tile_columns == SIDE;
                  multiply_block(steps, left + i * packed_line, packed_b + j * packed_line, direct ? to : block,
                                 (direct ? columns : SIDE) * sizeof(float));
                  if (!direct) add_block(block, to, columns, tile_rows, tile_columns, k > 0, tile_bias);
                }
          }
        }
      }
    release_tiles();
  }
  return 0;
}

#endif
