// fp32 products on Intel's matrix units (AMX), which multiply bf16 alone.
//
// A number x in fp32 is the sum of three in bf16: h = bf16(x), m = bf16(x − h), l = bf16(x − h − m), which hold its 24 bits. Of
// the nine products of such sums six matter, hh + hm + mh + hl + lh + mm, summed in fp32; those left out are below its last bit.

#include <stdint.h>

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)

#include "avx512.h"

#include <sys/syscall.h>
#include <unistd.h>

#define SIDE 32              // rows and columns of C computed at once: two by two tiles of 16
#define STEP 32              // of the depth, what a tile holds
#define PART (2 * 16 * STEP) // numbers of one part, h, m or l, in a step of SIDE lines
#define DEPTH 512            // of the depth, what is packed at once
#define TALL (1 << 17)       // numbers of A that are packed at once: they stay in a core's second cache
#define BROAD (1 << 15)      // numbers of B that stay there beside them
#define TOGETHER 64          // columns that a thread packs before it asks for more
#define WIDTH 4096           // columns that are packed at once

// whether this process may use the units
int amx_ready(void) {
  const int request = 0x1023, tile_data = 18; // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
}

INLINE __m512i bits(__m512 x) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)); }
INLINE __m512 number(__m512i half) { return _mm512_castsi512_ps(_mm512_slli_epi32(half, 16)); }

// two vectors as three of pairs: what each lane holds, the first number in its lower half
INLINE void split_pairs(__m512 even, __m512 odd, __m512i parts[3]) {
  UNROLLED for (int part = 0; part < 3; part++) {
    const __m512i low = bits(even), high = bits(odd);
    parts[part] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    even = _mm512_sub_ps(even, number(low));
    odd = _mm512_sub_ps(odd, number(high));
  }
}

// the same of 32 numbers in a row, whose pairs are neighbours
INLINE void split_row(__m512 one, __m512 two, __m512i parts[3]) {
  UNROLLED for (int part = 0; part < 3; part++) {
    const __m512i x = parts[part] = (__m512i)_mm512_cvtne2ps_pbh(two, one);
    one = _mm512_sub_ps(one, number(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(x))));
    two = _mm512_sub_ps(two, number(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(x, 1))));
  }
}

// Lines (rows of A, columns of B) as tiles of 16 lines and a step of the depth, in panels of SIDE lines; zeros where there is
// nothing. A's tiles have a line in each row, B's a pair of the depth. Memory is read along what lies together.
static void pack(const float *from, int64_t line, int64_t deep, int64_t lines, int64_t depth, int by_lines, uint16_t *to) {
  const int64_t panel = 3 * up(depth, STEP) * SIDE, all = up(lines, SIDE);
  __m512i parts[3];
#define TILE(line, k) (to + (line) / SIDE * panel + (k) / STEP * 3 * PART + (line) % SIDE / 16 * 16 * STEP)
  if (deep == 1)
    for (int64_t i = 0; i < all; i++)
      for (int64_t k = 0; k < depth; k += STEP) {
        const int64_t left = i < lines ? depth - k : 0;
        split_row(_mm512_maskz_loadu_ps(first(left), from + i * line + k),
                  _mm512_maskz_loadu_ps(first(left - 16), from + i * line + k + 16), parts);
        UNROLLED for (int part = 0; part < 3; part++)
          _mm512_store_si512(TILE(i, k) + part * PART + i % 16 * STEP, parts[part]);
      }
  else
    for (int64_t k = 0; k < up(depth, STEP); k += 2)
      for (int64_t i = 0; i < all; i += 16) {
        const float *here = from + i + k * deep;
        split_pairs(_mm512_maskz_loadu_ps(first(k < depth ? lines - i : 0), here),
                    _mm512_maskz_loadu_ps(first(k + 1 < depth ? lines - i : 0), here + deep), parts);
        UNROLLED for (int part = 0; part < 3; part++)
          _mm512_store_si512(TILE(i, k) + part * PART + k % STEP / 2 * STEP, parts[part]);
      }
  if (by_lines != (deep == 1))
    for (int64_t i = 0; i < all; i += 16)
      for (int64_t k = 0; k < depth; k += STEP)
        for (int part = 0; part < 3; part++) {
          __m512i *tile = (__m512i *)(TILE(i, k) + part * PART), x[16]; // of pairs
          UNROLLED for (int y = 0; y < 16; y++) x[y] = _mm512_load_si512(tile + y);
          transpose(x);
          UNROLLED for (int y = 0; y < 16; y++) _mm512_store_si512(tile + y, x[y]);
        }
}

// C [SIDE, SIDE] = A B of packed A and B; rows of C are `c_row` bytes apart
INLINE void block(int64_t steps, const uint16_t *a, const uint16_t *b, float *c, int64_t c_row) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
#define LEFT(part) _tile_loadd(4, a + (part) * PART, 64); _tile_loadd(5, a + (part) * PART + 16 * STEP, 64);
#define RIGHT(part) _tile_loadd(6, b + (part) * PART, 64); _tile_loadd(7, b + (part) * PART + 16 * STEP, 64);
#define MULTIPLY _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
  for (int64_t step = 0; step < steps; step++, a += 3 * PART, b += 3 * PART) {
    LEFT(0) RIGHT(2) MULTIPLY
    RIGHT(1) MULTIPLY
    RIGHT(0) MULTIPLY
    LEFT(2) MULTIPLY
    LEFT(1) MULTIPLY
    RIGHT(1) MULTIPLY
  }
  _tile_stored(0, c, c_row);
  _tile_stored(1, c + 16, c_row);
  _tile_stored(2, (char *)c + 16 * c_row, c_row);
  _tile_stored(3, (char *)(c + 16) + 16 * c_row, c_row);
}

// C [rows, columns] = A [rows, depth] B [depth, columns] + bias [columns] where there is one. Of A's two strides one is 1, and of
// B's; C is contiguous. Returns 0, or 1 where there was no memory to work in.
int amx_product(int64_t rows, int64_t columns, int64_t depth, const float *a, int64_t a_row, int64_t a_column, const float *b,
                int64_t b_row, int64_t b_column, const float *bias, float *c, int threads) {
  const int64_t deepest = up(least(depth, DEPTH), STEP), line = 3 * deepest; // numbers that pack a line
  const int64_t tallest = TALL / deepest / SIDE * SIDE, broadest = BROAD / deepest / SIDE * SIDE;
  const int64_t share = up((rows + threads - 1) / threads, SIDE), row_bytes = columns * sizeof(float);
  const int once = share <= tallest; // a thread packs its rows once, then columns as they are needed
  const int64_t width = once ? broadest : WIDTH;
  uint16_t *right = room(0, up(least(columns, width), SIDE) * line * sizeof(uint16_t));
  uint16_t *lefts = room(1, threads * least(tallest, share) * line * sizeof(uint16_t)); // of each part of the rows
  if (!right || !lefts) return 1;
#pragma omp parallel num_threads(threads)
  {
    struct { uint8_t palette, start, zero[14]; uint16_t bytes[16]; uint8_t lines[16]; } tiles = {.palette = 1};
    for (int i = 0; i < 8; i++) tiles.bytes[i] = 64, tiles.lines[i] = 16;
    _tile_loadconfig(&tiles);
    float made[SIDE * SIDE] __attribute__((aligned(64)));
    for (int64_t k = 0; k < depth; k += DEPTH)
      for (int64_t n = 0; n < columns; n += width) {
        const int64_t deep = least(DEPTH, depth - k), wide = least(width, columns - n);
        const int64_t steps = up(deep, STEP) / STEP, packed = 3 * steps * STEP;
#pragma omp for schedule(static)
        for (int64_t j = 0; j < wide; j += TOGETHER)
          pack(b + k * b_row + (n + j) * b_column, b_column, b_row, least(TOGETHER, wide - j), deep, 0, right + j * packed);
#pragma omp for schedule(static, 1)
        for (int64_t part = 0; part < threads; part++)
          for (int64_t high = part * share; high < least(rows, (part + 1) * share); high += tallest) {
            uint16_t *left = lefts + part * least(tallest, share) * line;
            const int64_t tall = least(least(tallest, rows - high), (part + 1) * share - high);
            if (!once || n == 0) pack(a + high * a_row + k * a_column, a_row, a_column, tall, deep, 1, left);
            for (int64_t broad = 0; broad < wide; broad += broadest)
              for (int64_t i = 0; i < tall; i += SIDE)
                for (int64_t j = broad; j < least(wide, broad + broadest); j += SIDE) {
                  const int64_t down = least(SIDE, tall - i), across = least(SIDE, wide - j);
                  float *to = c + (high + i) * columns + n + j;
                  const float *added = bias && k + deep == depth ? bias + n + j : 0;
                  for (int64_t y = 0; y < down; y++) { // by the time they are written to, they are there
                    __builtin_prefetch(to + y * columns, 1);
                    __builtin_prefetch(to + y * columns + 16, 1);
                  }
                  const int direct = k == 0 && !added && down == SIDE && across == SIDE;
                  block(steps, left + i * packed, right + j * packed, direct ? to : made, direct ? row_bytes : SIDE * 4);
                  if (direct) continue;
                  // sums of few numbers are the more exact ones: those over the depth are added up here, the bias comes last
                  for (int64_t x = 0; x < across; x += 16) {
                    const __mmask16 here = first(across - x);
                    const __m512 beside = added ? _mm512_maskz_loadu_ps(here, added + x) : _mm512_setzero_ps();
                    for (int64_t y = 0; y < down; y++) {
                      float *place = to + y * columns + x;
                      const __m512 there = k ? _mm512_maskz_loadu_ps(here, place) : _mm512_setzero_ps();
                      const __m512 sum = _mm512_add_ps(there, _mm512_load_ps(made + y * SIDE + x));
                      _mm512_mask_storeu_ps(place, here, _mm512_add_ps(sum, beside));
                    }
                  }
                }
          }
      }
    _tile_release();
  }
  return 0;
}

#else

int amx_ready(void) { return 0; }

#endif
