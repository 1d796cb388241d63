// fp32 products on AVX-512, for processors on which the default library does not use the whole width of their units (Zen 5).

#include <stdint.h>

#if defined(__AVX512F__)

#include "avx512.h"

#include <pthread.h>
#include <stdlib.h>

#define TALL 14          // rows and
#define WIDE 32          // columns of C computed at once: 28 vectors of sums, 2 of B and 1 of A are registers
#define DEPTH 256        // of the depth, what is packed at once: sums of so many numbers, then those of these sums
#define BLOCK (1 << 17)  // numbers of B that are packed at once: they stay in a core's second cache
#define HIGH (8 * TALL)  // rows of A that are packed at once, and
#define BROAD (4 * WIDE) // at most columns of B: of lines that lie far apart more is read of each

int avx512_ready(void) { return 1; }

// what is fetched anew lies in no cache
typedef struct { void *memory; int64_t bytes; } Room;
static pthread_key_t rooms;
static pthread_once_t rooms_begun = PTHREAD_ONCE_INIT;
static void end_rooms(void *given) {
  Room *of_thread = given;
  free(of_thread[0].memory);
  free(of_thread[1].memory);
  free(of_thread);
}
static void begin_rooms(void) { pthread_key_create(&rooms, end_rooms); }

void *room(int which, int64_t bytes) {
  pthread_once(&rooms_begun, begin_rooms);
  Room *kept = pthread_getspecific(rooms);
  if (!kept) {
    kept = calloc(2, sizeof(Room));
    if (!kept || pthread_setspecific(rooms, kept)) return 0;
  }
  if (kept[which].bytes < bytes) {
    free(kept[which].memory);
    kept[which].memory = aligned_alloc(64, up(bytes, 64));
    kept[which].bytes = kept[which].memory ? bytes : 0;
  }
  return kept[which].memory;
}

// Lines (rows of A, columns of B) in panels of `side` lines, each [depth, side], zeros where there is nothing; the depth may be
// rounded up to 16. Memory is read along what lies together, and of all panels while it is there.
INLINE void pack(const float *from, int64_t line, int64_t deep, int64_t lines, int64_t depth, const int side, float *to) {
  const int64_t panel = up(depth, 16) * side;
#define TO(k) (to + i / side * panel + (k) * side + x), first(side - x)
  if (line == 1)
    for (int64_t k = 0; k < depth; k++)
      for (int64_t i = 0; i < lines; i += side)
        UNROLLED for (int x = 0; x < side; x += 16)
          _mm512_mask_storeu_ps(TO(k), _mm512_maskz_loadu_ps(first(lines - i - x), from + k * deep + i + x));
  else
    for (int64_t i = 0; i < lines; i += side)
      for (int64_t k = 0; k < depth; k += 16)
        for (int x = 0; x < side; x += 16) {
          __m512i tile[16];
          UNROLLED for (int y = 0; y < 16; y++)
            tile[y] = i + x + y < lines ? _mm512_maskz_loadu_epi32(first(depth - k), from + (i + x + y) * line + k)
                                        : _mm512_setzero_si512();
          transpose(tile);
          UNROLLED for (int y = 0; y < 16; y++) _mm512_mask_storeu_epi32(TO(k + y), tile[y]);
        }
}

// C [down, across] = A B of packed A and B, plus C where `more`, plus `bias` where there is one. A function of its own, so that
// no register holds anything else.
static __attribute__((noinline)) void block(int64_t depth, const float *a, const float *b, float *c, int64_t row, int64_t down,
                                            int64_t across, int more, const float *bias) {
  __m512 sum[TALL][2];
  for (int64_t y = 0; y < down; y++) { // by the time they are written to, they are there
    __builtin_prefetch(c + y * row, 1);
    __builtin_prefetch(c + y * row + 16, 1);
  }
  UNROLLED for (int y = 0; y < TALL; y++) sum[y][0] = sum[y][1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < depth; k++, a += TALL, b += WIDE) {
    const __m512 one = _mm512_load_ps(b), two = _mm512_load_ps(b + 16);
    UNROLLED for (int y = 0; y < TALL; y++) {
      const __m512 x = _mm512_set1_ps(a[y]);
      sum[y][0] = _mm512_fmadd_ps(x, one, sum[y][0]);
      sum[y][1] = _mm512_fmadd_ps(x, two, sum[y][1]);
    }
  }
  UNROLLED for (int half = 0; half < 2; half++) {
    const __mmask16 here = first(across - 16 * half);
    const __m512 beside = bias ? _mm512_maskz_loadu_ps(here, bias + 16 * half) : _mm512_setzero_ps();
    UNROLLED for (int y = 0; y < TALL; y++) if (y < down) {
      float *place = c + y * row + 16 * half;
      const __m512 there = more ? _mm512_maskz_loadu_ps(here, place) : _mm512_setzero_ps();
      _mm512_mask_storeu_ps(place, here, _mm512_add_ps(_mm512_add_ps(there, sum[y][half]), beside));
    }
  }
}

// C [rows, columns] = A [rows, depth] B [depth, columns] + bias [columns] where there is one. Of A's two strides one is 1, and of
// B's; C is contiguous. Returns 0, or 1 where there was no memory to work in.
int avx512_product(int64_t rows, int64_t columns, int64_t depth, const float *a, int64_t a_row, int64_t a_column, const float *b,
                   int64_t b_row, int64_t b_column, const float *bias, float *c, int threads) {
  const int64_t width = up(BLOCK / up(least(depth, DEPTH), 16), WIDE), share = up((rows + threads - 1) / threads, TALL);
  const int64_t broad = least(BROAD, up((width + threads - 1) / threads, WIDE)); // something for each thread
  float *right = room(0, up(least(columns, width), WIDE) * up(least(depth, DEPTH), 16) * sizeof(float));
  if (!right) return 1;
#pragma omp parallel num_threads(threads)
  {
    float left[HIGH * DEPTH] __attribute__((aligned(64)));
    for (int64_t k = 0; k < depth; k += DEPTH)
      for (int64_t n = 0; n < columns; n += width) {
        const int64_t deep = least(DEPTH, depth - k), wide = least(width, columns - n), packed = up(deep, 16);
        const float *beside = bias && k + deep == depth ? bias + n : 0;
#pragma omp for schedule(static)
        for (int64_t j = 0; j < wide; j += broad)
          pack(b + k * b_row + (n + j) * b_column, b_column, b_row, least(broad, wide - j), deep, WIDE, right + j * packed);
#pragma omp for schedule(static, 1)
        for (int64_t part = 0; part < threads; part++) {
          const int64_t end = least(rows, (part + 1) * share);
          for (int64_t high = part * share; high < end; high += HIGH) {
            const int64_t tall = least(HIGH, end - high);
            pack(a + high * a_row + k * a_column, a_row, a_column, tall, deep, TALL, left);
            for (int64_t i = 0; i < tall; i += TALL)
              for (int64_t j = 0; j < wide; j += WIDE)
                block(deep, left + i * packed, right + j * packed, c + (high + i) * columns + n + j, columns,
                      least(TALL, tall - i), least(WIDE, wide - j), k > 0, beside ? beside + j : 0);
          }
        }
      }
  }
  return 0;
}

#else

int avx512_ready(void) { return 0; }

#endif
