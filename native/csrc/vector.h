// Vectors of fp32 numbers and elementary functions on them, for all kernels.
//
// They are GCC's vector extensions, which clang has too, so that one source serves every processor.
// Each file is compiled once per variant (avx512, avx2, generic) with the flags in setup.py;
// VARIANT is the suffix of its exported functions. dispatch.c tells which variants can be used.

#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define JOIN_EXPANDED(name, suffix) name##_##suffix
#define JOIN(name, suffix) JOIN_EXPANDED(name, suffix)
#define KERNEL(name) JOIN(name, VARIANT)

#ifdef __AVX512F__
#include <immintrin.h>
#define LANES 16
#define FOR_LANES(F, x) F(0, x), F(1, x), F(2, x), F(3, x), F(4, x), F(5, x), F(6, x), F(7, x), \
                        F(8, x), F(9, x), F(10, x), F(11, x), F(12, x), F(13, x), F(14, x), F(15, x)
#else
#define LANES 8
#define FOR_LANES(F, x) F(0, x), F(1, x), F(2, x), F(3, x), F(4, x), F(5, x), F(6, x), F(7, x)
#endif
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t IntVector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#if !defined(__clang__) && __GNUC__ < 12
#define __builtin_shufflevector(x, y, ...) __builtin_shuffle(x, y, (IntVector){__VA_ARGS__})
#endif

INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t round_up(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

INLINE Vector load(const float *from) { return *(const Vector *)from; }
INLINE void store(float *to, Vector x) { *(Vector *)to = x; }
INLINE Vector broadcast(float x) { return (Vector){0} + x; }
INLINE Vector blend(IntVector mask, Vector x, Vector otherwise) {
  return (Vector)(((IntVector)x & mask) | ((IntVector)otherwise & ~mask));
}
// elementwise maximum and minimum; the second argument where either is NaN
#ifdef __AVX512F__
INLINE Vector vector_max(Vector a, Vector b) { return (Vector)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE Vector vector_min(Vector a, Vector b) { return (Vector)_mm512_min_ps((__m512)a, (__m512)b); }
#else
INLINE Vector vector_max(Vector a, Vector b) { return blend(a > b, a, b); }
INLINE Vector vector_min(Vector a, Vector b) { return blend(a < b, a, b); }
#endif

// reductions over lanes by a butterfly; every lane holds the result
#define PARTNER(lane, distance) ((lane) ^ (distance))
#define EXCHANGE(x, distance) __builtin_shufflevector(x, x, FOR_LANES(PARTNER, distance))
INLINE Vector reduce_sum(Vector x) {
#if LANES == 16
  x += EXCHANGE(x, 8);
#endif
  x += EXCHANGE(x, 4);
  x += EXCHANGE(x, 2);
  return x + EXCHANGE(x, 1);
}
INLINE Vector reduce_max(Vector x) {
#if LANES == 16
  x = vector_max(x, EXCHANGE(x, 8));
#endif
  x = vector_max(x, EXCHANGE(x, 4));
  x = vector_max(x, EXCHANGE(x, 2));
  return vector_max(x, EXCHANGE(x, 1));
}

// e^x within 2 ulp for x up to 88; 0 below -87, NaN for NaN
INLINE Vector exp_up_to_88(Vector given) {
  const Vector magic = broadcast(12582912.0f); // adding it rounds to an integer, which is in the lowest bits
  const Vector x = vector_max(broadcast(-87.0f), given);
  Vector n = x * 1.44269504f + magic;
  const IntVector exponent = (IntVector)n << 23;
  n -= magic;
  const Vector r = x - n * 0.693359375f - n * -2.12194440e-4f;
  Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  p = (Vector)((IntVector)p + exponent) + (x - x);
  return blend(given < broadcast(-87.0f), broadcast(0), p);
}

// e^x; infinity above 88
INLINE Vector vector_exp(Vector given) {
  return blend(given > broadcast(88.0f), broadcast(INFINITY), exp_up_to_88(vector_min(broadcast(88.0f), given)));
}

INLINE Vector sigmoid(Vector x) { return 1.0f / (1.0f + vector_exp(-x)); }
