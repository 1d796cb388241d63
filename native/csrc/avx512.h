// Shared by the matrix products on AVX-512 and on AMX.

#pragma once

#include <immintrin.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
INLINE __mmask16 mask_first(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (__mmask16)((1 << n) - 1); }

// transpose 16 × 16 numbers of 32 bits
INLINE void transpose(__m512i x[16]) {
#define SWAP(distance, low, high) \
  UNROLL for (int i = 0; i < 16; i++) if (!(i & distance)) { \
    const __m512i one = low, two = high; \
    x[i] = one; \
    x[i + distance] = two; \
  }
#define PICK(indices, distance) _mm512_permutex2var_epi32(x[i], indices, x[i + distance])
  const __m512i low1 = _mm512_setr_epi32(0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
  const __m512i high1 = _mm512_setr_epi32(1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  const __m512i low4 = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
  const __m512i high4 = _mm512_setr_epi32(4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  SWAP(1, PICK(low1, 1), PICK(high1, 1))
  SWAP(2, _mm512_mask_permutex_epi64(x[i], 0xaa, x[i + 2], 0xa0), _mm512_mask_permutex_epi64(x[i + 2], 0x55, x[i], 0xf5))
  SWAP(4, PICK(low4, 4), PICK(high4, 4))
  SWAP(8, _mm512_shuffle_i64x2(x[i], x[i + 8], 0x44), _mm512_shuffle_i64x2(x[i], x[i + 8], 0xee))
#undef SWAP
#undef PICK
}

// Return this thread's workspace with at least `bytes` bytes, or NULL without memory. It is kept for
// the next product.
__attribute__((visibility("hidden"))) void *workspace(int64_t bytes);
