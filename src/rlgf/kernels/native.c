// What torch takes many passes over memory for, in one: attention within texts, activations, log-probabilities. fp32, on a CPU.
//
// Vectors are GCC's, which clang has too: one source for every processor. `native.py` compiles it for the machine it
// runs on and says what is handed over. Nothing here keeps anything, and nothing allocates but what a thread works in.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
#include <immintrin.h>
#define LANES 16
#define FOR_LANES(W, x) W(0, x), W(1, x), W(2, x), W(3, x), W(4, x), W(5, x), W(6, x), W(7, x), \
                        W(8, x), W(9, x), W(10, x), W(11, x), W(12, x), W(13, x), W(14, x), W(15, x)
#else
#define LANES 8
#define FOR_LANES(W, x) W(0, x), W(1, x), W(2, x), W(3, x), W(4, x), W(5, x), W(6, x), W(7, x)
#endif
#define INLINE static inline __attribute__((always_inline))
#define UNROLLED _Pragma("GCC unroll 16")

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#if !defined(__clang__) && __GNUC__ < 12
#define __builtin_shufflevector(x, y, ...) __builtin_shuffle(x, y, (Integers){__VA_ARGS__})
#endif

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t up(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

INLINE Vector load(const float *from) { return *(const Vector *)from; }
INLINE void store(float *to, Vector what) { *(Vector *)to = what; }
INLINE Vector all(float x) { return (Vector){0} + x; }
INLINE Vector choose(Integers where, Vector x, Vector otherwise) {
  return (Vector)(((Integers)x & where) | ((Integers)otherwise & ~where));
}
// the greater or the smaller one; the second one where either is no number
#if defined(__AVX512F__) && LANES == 16
INLINE Vector greater(Vector a, Vector b) { return (Vector)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE Vector smaller(Vector a, Vector b) { return (Vector)_mm512_min_ps((__m512)a, (__m512)b); }
#else
INLINE Vector greater(Vector a, Vector b) { return choose(a > b, a, b); }
INLINE Vector smaller(Vector a, Vector b) { return choose(a < b, a, b); }
#endif

// lanes with those `by` places away; the sum or the greatest of all lanes, in every lane
#define AWAY(lane, by) ((lane) ^ (by))
#define ACROSS(x, by) __builtin_shufflevector(x, x, FOR_LANES(AWAY, by))
INLINE Vector total(Vector x) {
#if LANES == 16
  x += ACROSS(x, 8);
#endif
  x += ACROSS(x, 4);
  x += ACROSS(x, 2);
  return x + ACROSS(x, 1);
}
INLINE Vector greatest(Vector x) {
#if LANES == 16
  x = greater(x, ACROSS(x, 8));
#endif
  x = greater(x, ACROSS(x, 4));
  x = greater(x, ACROSS(x, 2));
  return greater(x, ACROSS(x, 1));
}

// e^x within 2 units in the last place for x up to 88; 0 below -87, NaN of NaN
INLINE Vector exponential_to_88(Vector given) {
  const Vector magic = all(12582912.0f); // adding it rounds to a whole number, whose bits are the lowest ones
  const Vector x = greater(all(-87.0f), given);
  Vector n = x * 1.44269504f + magic;
  const Integers power = (Integers)n << 23;
  n -= magic;
  const Vector r = x - n * 0.693359375f - n * -2.12194440e-4f;
  Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  p = (Vector)((Integers)p + power) + (x - x);
  return choose(given < all(-87.0f), all(0), p);
}

// the same, and infinite above 88
INLINE Vector exponential(Vector given) {
  return choose(given > all(88.0f), all(INFINITY), exponential_to_88(smaller(all(88.0f), given)));
}

INLINE Vector logistic(Vector x) { return 1.0f / (1.0f + exponential(-x)); }

// ---------------------------------------------------------------------------------------------------------------- products

#define ROWS 6    // of a tile, which has up to 4 vectors in each: as many sums as registers hold

// C [rows, vectors × LANES] = or += A [rows, depth] B [depth, …]; A lies in any order, rows of B and C are contiguous
INLINE void tile(const int rows, const int vectors, int64_t depth, const float *a, int64_t a_row, int64_t a_column,
                 const float *b, int64_t b_row, float *c, int64_t c_row, const int add) {
  Vector sums[ROWS][4];
  UNROLLED for (int i = 0; i < rows; i++)
    UNROLLED for (int j = 0; j < vectors; j++) sums[i][j] = add ? load(c + i * c_row + j * LANES) : all(0);
  for (int64_t k = 0; k < depth; k++) {
    Vector right[4];
    UNROLLED for (int j = 0; j < vectors; j++) right[j] = load(b + k * b_row + j * LANES);
    UNROLLED for (int i = 0; i < rows; i++) {
      const float left = a[i * a_row + k * a_column];
      UNROLLED for (int j = 0; j < vectors; j++) sums[i][j] += left * right[j];
    }
  }
  UNROLLED for (int i = 0; i < rows; i++)
    UNROLLED for (int j = 0; j < vectors; j++) store(c + i * c_row + j * LANES, sums[i][j]);
}

#define TILE(rows, vectors) tile(rows, vectors, depth, a, a_row, a_column, b, b_row, c, c_row, add); break
#define TILES(rows) switch (vectors) { case 4: TILE(rows, 4); case 3: TILE(rows, 3); case 2: TILE(rows, 2); default: TILE(rows, 1); }

// the same for up to ROWS rows and any number of columns, a multiple of LANES
static void product(int64_t rows, int64_t columns, int64_t depth, const float *a, int64_t a_row, int64_t a_column,
                    const float *b, int64_t b_row, float *c, int64_t c_row, int add) {
  for (int64_t vectors, left = columns / LANES; left > 0; left -= vectors, b += vectors * LANES, c += vectors * LANES) {
    vectors = left == 5 ? 3 : least(left, 4);
    switch (rows) {
      case 6: TILES(6) break;
      case 5: TILES(5) break;
      case 4: TILES(4) break;
      case 3: TILES(3) break;
      case 2: TILES(2) break;
      default: TILES(1)
    }
  }
}

#define LOW(lane, by) ((lane) & (by) ? LANES + (lane) - (by) : (lane))
#define HIGH(lane, by) ((lane) & (by) ? LANES + (lane) : (lane) + (by))
#define SWAP(by) \
  UNROLLED for (int i = 0; i < LANES; i++) if (!(i & (by))) { \
    const Vector low = __builtin_shufflevector(x[i], x[i + by], FOR_LANES(LOW, by)); \
    x[i + by] = __builtin_shufflevector(x[i], x[i + by], FOR_LANES(HIGH, by)); \
    x[i] = low; \
  }

// `from` [rows, columns] the other way round, [columns, width], with zeros behind the rows
static void transpose(const float *from, int64_t row, int64_t rows, int64_t columns, float *to, int64_t width) {
  for (int64_t r = 0; r < rows; r += LANES)
    for (int64_t c = 0; c < columns; c += LANES) {
      Vector x[LANES];
      UNROLLED for (int i = 0; i < LANES; i++) x[i] = r + i < rows ? load(from + (r + i) * row + c) : all(0);
      SWAP(1) SWAP(2) SWAP(4)
#if LANES == 16
      SWAP(8)
#endif
      UNROLLED for (int i = 0; i < LANES; i++) store(to + (c + i) * width + r, x[i]);
    }
}

// --------------------------------------------------------------------------------------------------------------- attention

#define BLOCK 48 // queries whose weights are held at once on the way back

// Heads of `size` numbers within the texts of lines; shapes as [tokens, heads, size] with the strides given, the last one 1.
typedef struct {
  int64_t texts, heads, groups, size; // `groups` heads of queries share one of keys
  int64_t asking, asked;              // tokens of the two lines, what fills them up included
  int64_t causal, width, seen_width;  // of the bias
  const int64_t *starts, *idle, *lengths, *asked_starts, *asked_lengths; // of each text; the idle tokens come first
  const float *query, *key, *value, *bias;                               // bias [heads, width, seen_width] or none
  int64_t query_token, query_head, key_token, key_head, value_token, value_head;
  float *out, *normalisers; // [asking, heads, size]; [asking, heads, 2], the greatest score and 1 / Σ e^(score − it)
  const float *gradient;    // of `out`; what follows is made of it
  int64_t gradient_token, gradient_head;
  float *for_query, *for_key, *for_value, *for_bias; // [asking, heads, size], [asked, heads / groups, size] twice; like bias
  float scale;
} Attention;

// one head of one text
typedef struct {
  int64_t length, idle, seen, width;
  const float *query, *key, *value, *bias, *gradient;
  float *out, *normalisers, *for_query, *for_key, *for_value, *for_bias;
} Head;

static Head head_of(const Attention *a, int64_t text, int64_t head) {
  const int64_t start = a->starts[text], from = a->asked_starts[text], shared = head / a->groups, size = a->size;
  const int64_t own = (start * a->heads + head) * size, other = (from * (a->heads / a->groups) + shared) * size;
  const int64_t bias = head * a->width * a->seen_width;
  return (Head){
      .length = a->lengths[text], .idle = a->idle[text], .seen = a->asked_lengths[text], .width = up(a->asked_lengths[text]),
      .query = a->query + start * a->query_token + head * a->query_head,
      .key = a->key + from * a->key_token + shared * a->key_head,
      .value = a->value + from * a->value_token + shared * a->value_head,
      .bias = a->bias ? a->bias + bias : 0,
      .gradient = a->gradient ? a->gradient + start * a->gradient_token + head * a->gradient_head : 0,
      .out = a->out + own, .normalisers = a->normalisers + 2 * (start * a->heads + head),
      .for_query = a->for_query ? a->for_query + own : 0, .for_key = a->for_key ? a->for_key + other : 0,
      .for_value = a->for_value ? a->for_value + other : 0, .for_bias = a->for_bias ? a->for_bias + bias : 0,
  };
}

// how many tokens are seen by the query before `next`
INLINE int64_t seen_before(const Attention *a, const Head *h, int64_t next) { return a->causal ? least(next, h->seen) : h->seen; }

// scores of one query at lanes `j`, −∞ where it must not look
INLINE Vector score(const Attention *a, const float *row, const float *bias, int64_t j, int64_t columns) {
  Vector x = load(row + j) * a->scale;
  if (bias) x += load(bias + j);
  if (j + LANES > columns) {
#define NUMBER(lane, x) (lane)
    const Integers lanes = {FOR_LANES(NUMBER, 0)};
    x = choose(lanes < (int32_t)(columns - j), x, all(-INFINITY));
  }
  return x;
}

static void attend(const Attention *a, const Head *h, float *room) {
  const int64_t size = a->size, width = h->width, line = a->heads * size;
  float *keys = room, *weights = keys + size * width;
  transpose(h->key, a->key_token, h->seen, size, keys, width);
  for (int64_t i = 0; i < h->idle; i++) memset(h->out + i * line, 0, size * sizeof(float));
  for (int64_t first = h->idle; first < h->length; first += ROWS) {
    const int64_t rows = least(ROWS, h->length - first), visible = seen_before(a, h, first + rows);
    product(rows, up(visible), size, h->query + first * a->query_token, a->query_token, 1, keys, width, weights, width, 0);
    for (int64_t i = 0; i < rows; i++) {
      const int64_t columns = seen_before(a, h, first + i + 1);
      float *row = weights + i * width, *normalisers = h->normalisers + 2 * a->heads * (first + i);
      const float *bias = h->bias ? h->bias + (first + i) * a->seen_width : 0;
      Vector top = all(-INFINITY), sum = all(0);
      for (int64_t j = 0; j < columns; j += LANES) {
        const Vector x = score(a, row, bias, j, columns);
        store(row + j, x);
        top = greater(x, top);
      }
      top = greatest(top);
      for (int64_t j = 0; j < columns; j += LANES) {
        const Vector x = exponential_to_88(load(row + j) - top);
        store(row + j, x);
        sum += x;
      }
      const Vector inverse = 1.0f / total(sum);
      for (int64_t j = 0; j < columns; j += LANES) store(row + j, load(row + j) * inverse);
      for (int64_t j = up(columns); j < visible; j += LANES) store(row + j, all(0));
      normalisers[0] = top[0];
      normalisers[1] = inverse[0];
    }
    product(rows, size, visible, weights, width, 1, h->value, a->value_token, h->out + first * line, line, 0);
  }
}

static void attend_back(const Attention *a, const Head *h, float *room) {
  const int64_t size = a->size, width = h->width, line = a->heads * size, asked_line = line / a->groups;
  float *keys = room, *values = keys + size * width, *weights = values + size * width, *slopes = weights + BLOCK * width;
  transpose(h->key, a->key_token, h->seen, size, keys, width);
  transpose(h->value, a->value_token, h->seen, size, values, width);
  for (int64_t i = 0; i < h->idle; i++) memset(h->for_query + i * line, 0, size * sizeof(float));
  for (int64_t block = h->idle; block < h->length; block += BLOCK) {
    const int64_t queries = least(BLOCK, h->length - block), visible = seen_before(a, h, block + queries);
    for (int64_t first = block; first < block + queries; first += ROWS) {
      const int64_t rows = least(ROWS, block + queries - first), columns = up(seen_before(a, h, first + rows));
      const int64_t place = (first - block) * width;
      product(rows, columns, size, h->query + first * a->query_token, a->query_token, 1, keys, width, weights + place, width, 0);
      product(rows, columns, size, h->gradient + first * a->gradient_token, a->gradient_token, 1, values, width, slopes + place,
              width, 0);
      for (int64_t i = 0; i < rows; i++) { // weights w = e^(score − normaliser), slopes w (g·v − g·out) of the scores
        const int64_t query = first + i, columns = seen_before(a, h, query + 1);
        float *row = weights + place + i * width, *slope = slopes + place + i * width;
        const float *bias = h->bias ? h->bias + query * a->seen_width : 0, *normalisers = h->normalisers + 2 * a->heads * query;
        float *for_bias = h->for_bias ? h->for_bias + query * a->seen_width : 0;
        Vector dot = all(0);
        for (int64_t j = 0; j < size; j += LANES)
          dot += load(h->gradient + query * a->gradient_token + j) * load(h->out + query * line + j);
        dot = total(dot);
        for (int64_t j = 0; j < columns; j += LANES) {
          const Vector weight = exponential_to_88(score(a, row, bias, j, columns) - normalisers[0]) * normalisers[1];
          const Vector x = weight * (load(slope + j) - dot);
          store(row + j, weight);
          store(slope + j, x * a->scale);
          if (for_bias) store(for_bias + j, load(for_bias + j) + x);
        }
        for (int64_t j = up(columns); j < visible; j += LANES) {
          store(row + j, all(0));
          store(slope + j, all(0));
        }
      }
      product(rows, size, seen_before(a, h, first + rows), slopes + place, width, 1, h->key, a->key_token,
              h->for_query + first * line, line, 0);
    }
    for (int64_t j = 0; j < visible; j += ROWS) {
      const int64_t rows = least(ROWS, visible - j), from = a->causal ? most(0, j - block) : 0; // who sees none of these adds 0
      const int64_t place = from * width + j, query = block + from;
      product(rows, size, queries - from, slopes + place, 1, width, h->query + query * a->query_token, a->query_token,
              h->for_key + j * asked_line, asked_line, 1);
      product(rows, size, queries - from, weights + place, 1, width, h->gradient + query * a->gradient_token, a->gradient_token,
              h->for_value + j * asked_line, asked_line, 1);
    }
  }
}

static void clear_behind(float *line, int64_t tokens, int64_t numbers, const int64_t *starts, const int64_t *lengths, int64_t texts) {
  const int64_t end = starts[texts - 1] + lengths[texts - 1];
  memset(line + end * numbers, 0, (tokens - end) * numbers * sizeof(float));
}

// 0, or 1 where there was no memory to work in
int attention(const Attention *a, int back, int threads) {
  const int64_t shared = a->heads / a->groups, numbers = a->heads * a->size, asked_numbers = shared * a->size;
  int failed = 0;
  clear_behind(back ? a->for_query : a->out, a->asking, numbers, a->starts, a->lengths, a->texts);
  if (back) {
    memset(a->for_key, 0, a->asked * asked_numbers * sizeof(float));
    memset(a->for_value, 0, a->asked * asked_numbers * sizeof(float));
  }
  int64_t longest = 0;
  for (int64_t text = 0; text < a->texts; text++) longest = most(longest, up(a->asked_lengths[text]));
  // the gradient of a bias is that of all texts: then a thread has whole heads
  const int64_t share = a->for_bias ? a->texts : 1;
#pragma omp parallel num_threads(threads)
  {
    float *room = malloc((2 * a->size + 2 * BLOCK) * longest * sizeof(float));
    if (!room) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(dynamic, share)
    for (int64_t item = 0; item < shared * a->texts; item++)
      for (int64_t head = item / a->texts * a->groups; room && head < (item / a->texts + 1) * a->groups; head++) {
        const Head h = head_of(a, item % a->texts, head);
        (back ? attend_back : attend)(a, &h, room);
      }
    free(room);
  }
  return failed;
}

// Σ weight · value over the columns that are seen, of `vectors` vectors, which stay in registers
INLINE void weigh(const int vectors, int64_t columns, const float *weights, const uint8_t *seen, const float *v, int64_t column,
                  float *to) {
  Vector sums[4];
  UNROLLED for (int c = 0; c < vectors; c++) sums[c] = all(0);
  for (int64_t j = 0; j < columns; j++)
    if (!seen || seen[j]) {
      UNROLLED for (int c = 0; c < vectors; c++) sums[c] += weights[j] * load(v + j * column + c * LANES);
    }
  UNROLLED for (int c = 0; c < vectors; c++) store(to + c * LANES, sums[c]);
}

// The same for one query of each text [rows, heads, size] and the keys and values so far [rows, heads / groups, columns, size],
// with the strides given; `seen` [rows, columns], bytes, says which, or all where it is none. A row that sees none gets zeros.
void attention_step(int64_t rows, int64_t heads, int64_t groups, int64_t columns, int64_t size, const float *query,
                    int64_t query_row, int64_t query_head, const float *key, int64_t key_row, int64_t key_head, int64_t key_column,
                    const float *value, int64_t value_row, int64_t value_head, int64_t value_column, const uint8_t *seen,
                    int64_t seen_row, float scale, float *weights, float *out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < rows * heads; item++) {
    const int64_t row = item / heads, head = item % heads, end = up(columns);
    const float *q = query + row * query_row + head * query_head;
    const float *k = key + row * key_row + head / groups * key_head, *v = value + row * value_row + head / groups * value_head;
    const uint8_t *here = seen ? seen + row * seen_row : 0;
    float *own = weights + item * end, *to = out + item * size;
    for (int64_t j = 0; j < end; j++) own[j] = -INFINITY;
    for (int64_t j = 0; j < columns; j++)
      if (!here || here[j]) {
        Vector dot = all(0);
        for (int64_t d = 0; d < size; d += LANES) dot += load(q + d) * load(k + j * key_column + d);
        own[j] = total(dot)[0] * scale;
      }
    Vector top = all(-INFINITY), sum = all(0);
    for (int64_t j = 0; j < end; j += LANES) top = greater(load(own + j), top);
    top = greatest(top);
    for (int64_t j = 0; j < end; j += LANES) {
      const Vector x = exponential_to_88(load(own + j) - top);
      store(own + j, x);
      sum += x;
    }
    const float inverse = 1 / total(sum)[0];
    for (int64_t j = 0; j < end; j += LANES) store(own + j, load(own + j) * inverse);
    int64_t d = 0;
    for (; d + 4 * LANES <= size; d += 4 * LANES) weigh(4, columns, own, here, v + d, value_column, to + d);
    for (; d < size; d += LANES) weigh(1, columns, own, here, v + d, value_column, to + d);
  }
}

// ------------------------------------------------------------------------------------------------------------- activations

// `count` numbers, a multiple of 16, vector by vector
#define EACH _Pragma("omp parallel for num_threads(threads) schedule(static)") for (int64_t i = 0; i < count; i += LANES)

#define SCALE 1.5957691216f // 2 √(2 / π), for ½ (1 + tanh u) = σ(2u)
#define CUBE 0.044715f

// the tanh approximation of GELU
void gelu(int64_t count, const float *states, float *to, int threads) {
  EACH {
    const Vector x = load(states + i);
    store(to + i, x * logistic(x * (SCALE + SCALE * CUBE * x * x)));
  }
}

void gelu_back(int64_t count, const float *states, const float *gradient, float *to, int threads) {
  EACH {
    const Vector x = load(states + i), square = x * x, gate = logistic(x * (SCALE + SCALE * CUBE * square));
    store(to + i, load(gradient + i) * (gate + x * gate * (1.0f - gate) * (SCALE + 3 * SCALE * CUBE * square)));
  }
}

// x σ(x) y of rows [rows, 2 · width] that hold x and y, the width a multiple of 16
void gated(int64_t rows, int64_t width, const float *states, float *to, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < width; j += LANES) {
      const Vector x = load(states + 2 * i * width + j);
      store(to + i * width + j, x * logistic(x) * load(states + (2 * i + 1) * width + j));
    }
}

void gated_back(int64_t rows, int64_t width, const float *states, const float *gradient, float *to, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < width; j += LANES) {
      const int64_t place = 2 * i * width + j;
      const Vector x = load(states + place), g = load(gradient + i * width + j), gate = logistic(x), silu = x * gate;
      store(to + place, g * load(states + place + width) * (gate + silu * (1.0f - gate)));
      store(to + place + width, g * silu);
    }
}

// heads [tokens, heads, size] turned by their tokens' angles: (a, b) become (a cos − b sin, b cos + a sin) where a and b are the
// halves of a head, and `cosines` and `sines` [tokens, size]. Back: its gradient, with the strides of what is turned.
void turned(int64_t tokens, int64_t heads, int64_t size, const float *states, int64_t token, int64_t head, const float *cosines,
            const float *sines, int64_t back, float *to, int threads) {
  const int64_t half = size / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < tokens; i++)
    for (int64_t j = 0; j < heads; j++)
      for (int64_t k = 0; k < half; k += LANES) {
        const float *from = states + i * token + j * head + k, *cosine = cosines + i * size + k, *sine = sines + i * size + k;
        float *place = to + (i * heads + j) * size + k;
        const Vector a = load(from), b = load(from + half);
        store(place, a * load(cosine) + (back ? b * load(sine + half) : -b * load(sine)));
        store(place + half, b * load(cosine + half) + (back ? -a * load(sine) : a * load(sine + half)));
      }
}

// ------------------------------------------------------------------------------------------------------- log-probabilities

// a row of logits in vectors, −∞ behind its end
INLINE Vector logits_at(const float *row, int64_t j, int64_t vocabulary) {
  if (j + LANES <= vocabulary) return load(row + j);
  float rest[LANES];
  for (int i = 0; i < LANES; i++) rest[i] = j + i < vocabulary ? row[j + i] : -INFINITY;
  return load(rest);
}

// log Σ e^logits of each row [rows, vocabulary]; CHAINS vectors at a time, none of which waits for another
#define CHAINS 4
#define EACH_CHAIN UNROLLED for (int c = 0; c < CHAINS; c++)
void log_normalisers(int64_t rows, int64_t vocabulary, const float *logits, float *to, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < rows; i++) {
    const float *row = logits + i * vocabulary;
    const int64_t together = vocabulary / (CHAINS * LANES) * CHAINS * LANES;
    Vector tops[CHAINS], sums[CHAINS];
    EACH_CHAIN tops[c] = all(-INFINITY), sums[c] = all(0);
    for (int64_t j = 0; j < together; j += CHAINS * LANES) EACH_CHAIN tops[c] = greater(load(row + j + c * LANES), tops[c]);
    for (int64_t j = together; j < vocabulary; j += LANES) tops[0] = greater(logits_at(row, j, vocabulary), tops[0]);
    for (int c = 1; c < CHAINS; c++) tops[0] = greater(tops[c], tops[0]);
    const Vector top = greatest(tops[0]);
    if (isinf(top[0])) { // nothing to be told apart, but for what is no number
      float found = top[0];
      for (int64_t j = 0; j < vocabulary; j++)
        if (row[j] != row[j]) found = NAN;
      to[i] = found;
      continue;
    }
    for (int64_t j = 0; j < together; j += CHAINS * LANES) EACH_CHAIN sums[c] += exponential_to_88(load(row + j + c * LANES) - top);
    for (int64_t j = together; j < vocabulary; j += LANES) sums[0] += exponential_to_88(logits_at(row, j, vocabulary) - top);
    for (int c = 1; c < CHAINS; c++) sums[0] += sums[c];
    to[i] = top[0] + logf(total(sums[0])[0]);
  }
}

// logits become the gradient of Σ gradient log p(token): gradient (1[token] − p)
void log_probabilities_back(int64_t rows, int64_t vocabulary, float *logits, const float *normalisers, const int64_t *tokens,
                            const float *gradient, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < rows; i++) {
    float *row = logits + i * vocabulary;
    for (int64_t j = 0; j < vocabulary; j += LANES) {
      const Vector x = exponential_to_88(logits_at(row, j, vocabulary) - normalisers[i]) * -gradient[i];
      if (j + LANES <= vocabulary) store(row + j, x);
      else memcpy(row + j, &x, (vocabulary - j) * sizeof(float));
    }
    row[tokens[i]] += gradient[i];
  }
}

// ------------------------------------------------------------------------------------------------------------------- norms

// x · r · w of each row [rows, width], r = 1 / √(mean x² + ε), which `scales` keeps; the width is a multiple of 16
void rms_norm(int64_t rows, int64_t width, const float *states, const float *weight, float epsilon, float *to, float *scales,
              int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < rows; i++) {
    const float *row = states + i * width;
    Vector squares = all(0);
    for (int64_t j = 0; j < width; j += LANES) squares += load(row + j) * load(row + j);
    const float scale = scales[i] = 1 / sqrtf(total(squares)[0] / width + epsilon);
    for (int64_t j = 0; j < width; j += LANES) store(to + i * width + j, load(row + j) * scale * load(weight + j));
  }
}

// `for_weight` [threads, width] is to begin at zero and to be summed
void rms_norm_back(int64_t rows, int64_t width, const float *states, const float *weight, const float *scales,
                   const float *gradient, float *for_states, float *for_weight, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int thread = 0; thread < threads; thread++)
    for (int64_t i = rows * thread / threads; i < rows * (thread + 1) / threads; i++) {
      const float *row = states + i * width, *upstream = gradient + i * width, scale = scales[i];
      float *own = for_weight + thread * width;
      Vector dot = all(0);
      for (int64_t j = 0; j < width; j += LANES) {
        const Vector both = load(row + j) * load(upstream + j);
        dot += both * load(weight + j);
        store(own + j, load(own + j) + both * scale);
      }
      const float through = total(dot)[0] * scale * scale * scale / width; // by way of the scale
      for (int64_t j = 0; j < width; j += LANES)
        store(for_states + i * width + j, load(upstream + j) * load(weight + j) * scale - load(row + j) * through);
    }
}
