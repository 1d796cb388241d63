// Attention within the sequences of packed rows, and of single queries to a cache. fp32.
//
// __init__.py states the shapes. Nothing is kept between calls; each thread allocates a workspace.

#include "vector.h"

// ------------------------------------------------------------------------------ small matmuls

#define ROWS 6 // of a tile of up to 4 vectors per row: as many accumulators as fit into registers

// C [rows, vectors × LANES] = or += A [rows, depth] B [depth, …]; A has any strides, rows of B and
// C are contiguous
INLINE void matmul_tile(const int rows, const int vectors, int64_t depth, const float *a, int64_t a_row, int64_t a_column,
                        const float *b, int64_t b_row, float *c, int64_t c_row, const int accumulate) {
  Vector sums[ROWS][4];
  UNROLL for (int i = 0; i < rows; i++)
    UNROLL for (int j = 0; j < vectors; j++) sums[i][j] = accumulate ? load(c + i * c_row + j * LANES) : broadcast(0);
  for (int64_t k = 0; k < depth; k++) {
    Vector right[4];
    UNROLL for (int j = 0; j < vectors; j++) right[j] = load(b + k * b_row + j * LANES);
    UNROLL for (int i = 0; i < rows; i++) {
      const float left = a[i * a_row + k * a_column];
      UNROLL for (int j = 0; j < vectors; j++) sums[i][j] += left * right[j];
    }
  }
  UNROLL for (int i = 0; i < rows; i++)
    UNROLL for (int j = 0; j < vectors; j++) store(c + i * c_row + j * LANES, sums[i][j]);
}

#define TILE(rows, vectors) matmul_tile(rows, vectors, depth, a, a_row, a_column, b, b_row, c, c_row, accumulate); break
#define TILES(rows) \
  switch (vectors) { case 4: TILE(rows, 4); case 3: TILE(rows, 3); case 2: TILE(rows, 2); default: TILE(rows, 1); }

// the same for up to ROWS rows and any number of columns that is a multiple of LANES
static void matmul_rows(int64_t rows, int64_t columns, int64_t depth, const float *a, int64_t a_row, int64_t a_column,
                        const float *b, int64_t b_row, float *c, int64_t c_row, int accumulate) {
  for (int64_t vectors, left = columns / LANES; left > 0; left -= vectors, b += vectors * LANES, c += vectors * LANES) {
    vectors = left == 5 ? 3 : min(left, 4);
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

#define LOW(lane, distance) ((lane) & (distance) ? LANES + (lane) - (distance) : (lane))
#define HIGH(lane, distance) ((lane) & (distance) ? LANES + (lane) : (lane) + (distance))
#define SWAP(distance) \
  UNROLL for (int i = 0; i < LANES; i++) if (!(i & (distance))) { \
    const Vector low = __builtin_shufflevector(x[i], x[i + distance], FOR_LANES(LOW, distance)); \
    x[i + distance] = __builtin_shufflevector(x[i], x[i + distance], FOR_LANES(HIGH, distance)); \
    x[i] = low; \
  }

// transpose `from` [rows, columns] into `to` [columns, width], with zeros after the last row
static void transpose(const float *from, int64_t row, int64_t rows, int64_t columns, float *to, int64_t width) {
  for (int64_t r = 0; r < rows; r += LANES)
    for (int64_t c = 0; c < columns; c += LANES) {
      Vector x[LANES];
      UNROLL for (int i = 0; i < LANES; i++) x[i] = r + i < rows ? load(from + (r + i) * row + c) : broadcast(0);
      SWAP(1) SWAP(2) SWAP(4)
#if LANES == 16
      SWAP(8)
#endif
      UNROLL for (int i = 0; i < LANES; i++) store(to + (c + i) * width + r, x[i]);
    }
}

// --------------------------------------------------------------------------- packed attention

#define BLOCK 48 // queries whose weights are held at once in the backward pass

// The arguments of packed attention. Query, key and value are [tokens, heads, size] with the given
// strides, the last one 1.
typedef struct {
  int64_t sequences, heads, groups, size; // `groups` query heads share one key head
  int64_t query_tokens, key_tokens;       // of the two packed rows, with their padding at the end
  int64_t causal, bias_rows, bias_columns;
  const int64_t *starts, *num_skipped, *lengths, *key_starts, *key_lengths; // per sequence; the skipped tokens come first
  const float *query, *key, *value, *bias;                                  // bias [heads, bias_rows, bias_columns] or NULL
  int64_t query_token, query_head, key_token, key_head, value_token, value_head;
  float *out, *normalizers; // [query_tokens, heads, size]; [query_tokens, heads, 2]: max score, 1 / Σ e^(score − max)
  const float *grad_out;    // backward only, like the rest but the scale
  int64_t grad_out_token, grad_out_head;
  // shaped as out, [key_tokens, heads / groups, size] twice, and bias
  float *grad_query, *grad_key, *grad_value, *grad_bias;
  float scale;
} Attention;

// one head of one sequence
typedef struct {
  int64_t length, num_skipped, key_length, width; // width: key_length rounded up to whole vectors
  const float *query, *key, *value, *bias, *grad_out;
  float *out, *normalizers, *grad_query, *grad_key, *grad_value, *grad_bias;
} Head;

static Head select_head(const Attention *a, int64_t sequence, int64_t head) {
  const int64_t start = a->starts[sequence], key_start = a->key_starts[sequence], key_head = head / a->groups, size = a->size;
  const int64_t query_offset = (start * a->heads + head) * size;
  const int64_t key_offset = (key_start * (a->heads / a->groups) + key_head) * size;
  const int64_t bias_offset = head * a->bias_rows * a->bias_columns;
  return (Head){
      .length = a->lengths[sequence], .num_skipped = a->num_skipped[sequence],
      .key_length = a->key_lengths[sequence], .width = round_up(a->key_lengths[sequence]),
      .query = a->query + start * a->query_token + head * a->query_head,
      .key = a->key + key_start * a->key_token + key_head * a->key_head,
      .value = a->value + key_start * a->value_token + key_head * a->value_head,
      .bias = a->bias ? a->bias + bias_offset : 0,
      .grad_out = a->grad_out ? a->grad_out + start * a->grad_out_token + head * a->grad_out_head : 0,
      .out = a->out + query_offset, .normalizers = a->normalizers + 2 * (start * a->heads + head),
      .grad_query = a->grad_query ? a->grad_query + query_offset : 0,
      .grad_key = a->grad_key ? a->grad_key + key_offset : 0, .grad_value = a->grad_value ? a->grad_value + key_offset : 0,
      .grad_bias = a->grad_bias ? a->grad_bias + bias_offset : 0,
  };
}

// number of keys that are visible to the queries before `end`
INLINE int64_t visible_keys(const Attention *a, const Head *h, int64_t end) {
  return a->causal ? min(end, h->key_length) : h->key_length;
}

// scores of one query at LANES keys from `j` on, −∞ for masked keys
INLINE Vector score(const Attention *a, const float *row, const float *bias, int64_t j, int64_t columns) {
  Vector x = load(row + j) * a->scale;
  if (bias) x += load(bias + j);
  if (j + LANES > columns) {
#define LANE(lane, x) (lane)
    const IntVector lanes = {FOR_LANES(LANE, 0)};
    x = blend(lanes < (int32_t)(columns - j), x, broadcast(-INFINITY));
  }
  return x;
}

static void attend(const Attention *a, const Head *h, float *workspace) {
  const int64_t size = a->size, width = h->width, out_token = a->heads * size;
  float *keys = workspace, *weights = keys + size * width;
  transpose(h->key, a->key_token, h->key_length, size, keys, width);
  for (int64_t i = 0; i < h->num_skipped; i++) memset(h->out + i * out_token, 0, size * sizeof(float));
  for (int64_t first = h->num_skipped; first < h->length; first += ROWS) {
    const int64_t rows = min(ROWS, h->length - first), visible = visible_keys(a, h, first + rows);
    matmul_rows(rows, round_up(visible), size, h->query + first * a->query_token, a->query_token, 1, keys, width, weights,
                width, 0);
    for (int64_t i = 0; i < rows; i++) { // softmax
      const int64_t columns = visible_keys(a, h, first + i + 1);
      float *row = weights + i * width, *normalizers = h->normalizers + 2 * a->heads * (first + i);
      const float *bias = h->bias ? h->bias + (first + i) * a->bias_columns : 0;
      Vector top = broadcast(-INFINITY), sum = broadcast(0);
      for (int64_t j = 0; j < columns; j += LANES) {
        const Vector x = score(a, row, bias, j, columns);
        store(row + j, x);
        top = vector_max(x, top);
      }
      top = reduce_max(top);
      for (int64_t j = 0; j < columns; j += LANES) {
        const Vector x = exp_up_to_88(load(row + j) - top);
        store(row + j, x);
        sum += x;
      }
      const Vector inverse = 1.0f / reduce_sum(sum);
      for (int64_t j = 0; j < columns; j += LANES) store(row + j, load(row + j) * inverse);
      for (int64_t j = round_up(columns); j < visible; j += LANES) store(row + j, broadcast(0));
      normalizers[0] = top[0];
      normalizers[1] = inverse[0];
    }
    matmul_rows(rows, size, visible, weights, width, 1, h->value, a->value_token, h->out + first * out_token, out_token, 0);
  }
}

static void attend_backward(const Attention *a, const Head *h, float *workspace) {
  const int64_t size = a->size, width = h->width, out_token = a->heads * size, grad_key_token = out_token / a->groups;
  float *keys = workspace, *values = keys + size * width;
  float *weights = values + size * width, *dscores = weights + BLOCK * width;
  transpose(h->key, a->key_token, h->key_length, size, keys, width);
  transpose(h->value, a->value_token, h->key_length, size, values, width);
  for (int64_t i = 0; i < h->num_skipped; i++) memset(h->grad_query + i * out_token, 0, size * sizeof(float));
  for (int64_t block = h->num_skipped; block < h->length; block += BLOCK) {
    const int64_t queries = min(BLOCK, h->length - block), visible = visible_keys(a, h, block + queries);
    for (int64_t first = block; first < block + queries; first += ROWS) {
      const int64_t rows = min(ROWS, block + queries - first), columns = round_up(visible_keys(a, h, first + rows));
      const int64_t offset = (first - block) * width;
      matmul_rows(rows, columns, size, h->query + first * a->query_token, a->query_token, 1, keys, width, weights + offset,
                  width, 0);
      matmul_rows(rows, columns, size, h->grad_out + first * a->grad_out_token, a->grad_out_token, 1, values, width,
                  dscores + offset, width, 0);
      // weights w = e^(score − max) / Σ, and gradients of scores w (grad_out·value − grad_out·out)
      for (int64_t i = 0; i < rows; i++) {
        const int64_t query = first + i, columns = visible_keys(a, h, query + 1);
        float *row = weights + offset + i * width, *dscore = dscores + offset + i * width;
        const float *bias = h->bias ? h->bias + query * a->bias_columns : 0;
        const float *normalizers = h->normalizers + 2 * a->heads * query;
        float *grad_bias = h->grad_bias ? h->grad_bias + query * a->bias_columns : 0;
        Vector dot = broadcast(0);
        for (int64_t j = 0; j < size; j += LANES)
          dot += load(h->grad_out + query * a->grad_out_token + j) * load(h->out + query * out_token + j);
        dot = reduce_sum(dot);
        for (int64_t j = 0; j < columns; j += LANES) {
          const Vector weight = exp_up_to_88(score(a, row, bias, j, columns) - normalizers[0]) * normalizers[1];
          const Vector x = weight * (load(dscore + j) - dot);
          store(row + j, weight);
          store(dscore + j, x * a->scale);
          if (grad_bias) store(grad_bias + j, load(grad_bias + j) + x);
        }
        for (int64_t j = round_up(columns); j < visible; j += LANES) {
          store(row + j, broadcast(0));
          store(dscore + j, broadcast(0));
        }
      }
      matmul_rows(rows, size, visible_keys(a, h, first + rows), dscores + offset, width, 1, h->key, a->key_token,
                  h->grad_query + first * out_token, out_token, 0);
    }
    for (int64_t j = 0; j < visible; j += ROWS) {
      // causal: earlier queries of the block see none of these keys
      const int64_t rows = min(ROWS, visible - j), from = a->causal ? max(0, j - block) : 0;
      const int64_t offset = from * width + j, query = block + from;
      matmul_rows(rows, size, queries - from, dscores + offset, 1, width, h->query + query * a->query_token, a->query_token,
                  h->grad_key + j * grad_key_token, grad_key_token, 1);
      matmul_rows(rows, size, queries - from, weights + offset, 1, width, h->grad_out + query * a->grad_out_token,
                  a->grad_out_token, h->grad_value + j * grad_key_token, grad_key_token, 1);
    }
  }
}

// zero the padding after the last sequence of a packed row [tokens, width]
static void clear_padding(float *row, int64_t tokens, int64_t width, const int64_t *starts, const int64_t *lengths,
                          int64_t sequences) {
  const int64_t end = starts[sequences - 1] + lengths[sequences - 1];
  memset(row + end * width, 0, (tokens - end) * width * sizeof(float));
}

// Return 0, or 1 without memory for a workspace.
int KERNEL(attention)(const Attention *a, int backward, int threads) {
  const int64_t key_heads = a->heads / a->groups, query_width = a->heads * a->size, key_width = key_heads * a->size;
  int failed = 0;
  clear_padding(backward ? a->grad_query : a->out, a->query_tokens, query_width, a->starts, a->lengths, a->sequences);
  if (backward) {
    memset(a->grad_key, 0, a->key_tokens * key_width * sizeof(float));
    memset(a->grad_value, 0, a->key_tokens * key_width * sizeof(float));
  }
  int64_t longest = 0;
  for (int64_t sequence = 0; sequence < a->sequences; sequence++) longest = max(longest, round_up(a->key_lengths[sequence]));
  // the gradient of a bias sums over sequences: then one thread computes all sequences of a head
  const int64_t chunk = a->grad_bias ? a->sequences : 1;
#pragma omp parallel num_threads(threads)
  {
    float *workspace = malloc((2 * a->size + 2 * BLOCK) * longest * sizeof(float));
    if (!workspace) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(dynamic, chunk)
    for (int64_t item = 0; item < key_heads * a->sequences; item++)
      for (int64_t head = item / a->sequences * a->groups; workspace && head < (item / a->sequences + 1) * a->groups; head++) {
        const Head h = select_head(a, item % a->sequences, head);
        (backward ? attend_backward : attend)(a, &h, workspace);
      }
    free(workspace);
  }
  return failed;
}

// ----------------------------------------------------------------------------------- decoding

// Σ weight · value over the visible columns, for `vectors` vectors, which stay in registers
INLINE void weighted_sum(const int vectors, int64_t columns, const float *weights, const uint8_t *visible, const float *value,
                         int64_t column, float *to) {
  Vector sums[4];
  UNROLL for (int c = 0; c < vectors; c++) sums[c] = broadcast(0);
  for (int64_t j = 0; j < columns; j++)
    if (!visible || visible[j]) {
      UNROLL for (int c = 0; c < vectors; c++) sums[c] += weights[j] * load(value + j * column + c * LANES);
    }
  UNROLL for (int c = 0; c < vectors; c++) store(to + c * LANES, sums[c]);
}

// Attention of one query per row [rows, heads, size] to keys and values
// [rows, heads / groups, columns, size], with the given strides. `mask` [rows, columns] holds a
// byte per column, 0 for masked ones; NULL: all are visible. A row without visible columns gets
// zeros. `weights` is a workspace of rows × heads × columns, columns rounded up to whole vectors.
void KERNEL(attention_decode)(int64_t rows, int64_t heads, int64_t groups, int64_t columns, int64_t size, const float *query,
                              int64_t query_row, int64_t query_head, const float *key, int64_t key_row, int64_t key_head,
                              int64_t key_column, const float *value, int64_t value_row, int64_t value_head,
                              int64_t value_column, const uint8_t *mask, int64_t mask_row, float scale, float *weights,
                              float *out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < rows * heads; item++) {
    const int64_t row = item / heads, head = item % heads, end = round_up(columns);
    const float *q = query + row * query_row + head * query_head;
    const float *k = key + row * key_row + head / groups * key_head, *v = value + row * value_row + head / groups * value_head;
    const uint8_t *visible = mask ? mask + row * mask_row : 0;
    float *w = weights + item * end, *to = out + item * size;
    for (int64_t j = 0; j < end; j++) w[j] = -INFINITY;
    for (int64_t j = 0; j < columns; j++)
      if (!visible || visible[j]) {
        Vector dot = broadcast(0);
        for (int64_t d = 0; d < size; d += LANES) dot += load(q + d) * load(k + j * key_column + d);
        w[j] = reduce_sum(dot)[0] * scale;
      }
    Vector top = broadcast(-INFINITY), sum = broadcast(0);
    for (int64_t j = 0; j < end; j += LANES) top = vector_max(load(w + j), top);
    top = reduce_max(top);
    for (int64_t j = 0; j < end; j += LANES) {
      const Vector x = exp_up_to_88(load(w + j) - top);
      store(w + j, x);
      sum += x;
    }
    const float inverse = 1 / reduce_sum(sum)[0];
    for (int64_t j = 0; j < end; j += LANES) store(w + j, load(w + j) * inverse);
    int64_t d = 0;
    for (; d + 4 * LANES <= size; d += 4 * LANES) weighted_sum(4, columns, w, visible, v + d, value_column, to + d);
    for (; d < size; d += LANES) weighted_sum(1, columns, w, visible, v + d, value_column, to + d);
  }
}
