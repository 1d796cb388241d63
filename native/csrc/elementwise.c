// Activations and log-probabilities, in one or two passes over memory.
// fp32.

#include "vector.h"

// ------------------------------------------------------------------------------ activations

// loop over `count` numbers, a multiple of 16, vector by vector
#define FOR_EACH_VECTOR \
  _Pragma("omp parallel for num_threads(threads) schedule(static)") for (int64_t i = 0; i < count; i += LANES)

#define GELU_SCALE 1.5957691216f // 2 √(2 / π), for ½ (1 + tanh u) = σ(2u)
#define GELU_CUBE 0.044715f

// the tanh approximation of GELU
void KERNEL(gelu)(int64_t count, const float *states, float *to, int threads) {
  FOR_EACH_VECTOR {
    const Vector x = load(states + i);
    store(to + i, x * sigmoid(x * (GELU_SCALE + GELU_SCALE * GELU_CUBE * x * x)));
  }
}

void KERNEL(gelu_backward)(int64_t count, const float *states, const float *gradient, float *to, int threads) {
  FOR_EACH_VECTOR {
    const Vector x = load(states + i), square = x * x, gate = sigmoid(x * (GELU_SCALE + GELU_SCALE * GELU_CUBE * square));
    const Vector slope = gate + x * gate * (1.0f - gate) * (GELU_SCALE + 3 * GELU_SCALE * GELU_CUBE * square);
    store(to + i, load(gradient + i) * slope);
  }
}

// ------------------------------------------------------------------------ log-probabilities

// a vector of a row of logits from column `j` on, −∞ after the last column
INLINE Vector load_logits(const float *row, int64_t j, int64_t vocabulary) {
  if (j + LANES <= vocabulary) return load(row + j);
  float rest[LANES];
  for (int i = 0; i < LANES; i++) rest[i] = j + i < vocabulary ? row[j + i] : -INFINITY;
  return load(rest);
}

// log Σ e^logits of each row [rows, vocabulary]; with CHAINS independent accumulators, so that
// additions overlap
#define CHAINS 4
#define FOR_EACH_CHAIN UNROLL for (int c = 0; c < CHAINS; c++)
void KERNEL(logsumexp)(int64_t rows, int64_t vocabulary, const float *logits, float *to, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < rows; i++) {
    const float *row = logits + i * vocabulary;
    const int64_t chained = vocabulary / (CHAINS * LANES) * CHAINS * LANES;
    Vector tops[CHAINS], sums[CHAINS];
    FOR_EACH_CHAIN tops[c] = broadcast(-INFINITY), sums[c] = broadcast(0);
    for (int64_t j = 0; j < chained; j += CHAINS * LANES)
      FOR_EACH_CHAIN tops[c] = vector_max(load(row + j + c * LANES), tops[c]);
    for (int64_t j = chained; j < vocabulary; j += LANES) tops[0] = vector_max(load_logits(row, j, vocabulary), tops[0]);
    for (int c = 1; c < CHAINS; c++) tops[0] = vector_max(tops[c], tops[0]);
    const Vector top = reduce_max(tops[0]);
    if (isinf(top[0])) { // the result is this infinity, or NaN where a logit is NaN
      float result = top[0];
      for (int64_t j = 0; j < vocabulary; j++)
        if (row[j] != row[j]) result = NAN;
      to[i] = result;
      continue;
    }
    for (int64_t j = 0; j < chained; j += CHAINS * LANES)
      FOR_EACH_CHAIN sums[c] += exp_up_to_88(load(row + j + c * LANES) - top);
    for (int64_t j = chained; j < vocabulary; j += LANES) sums[0] += exp_up_to_88(load_logits(row, j, vocabulary) - top);
    for (int c = 1; c < CHAINS; c++) sums[0] += sums[c];
    to[i] = top[0] + logf(reduce_sum(sums[0])[0]);
  }
}

// overwrite logits with the gradient of Σ gradient log p(token): gradient (1[token] − p)
void KERNEL(log_prob_backward)(int64_t rows, int64_t vocabulary, float *logits, const float *normalizers, const int64_t *tokens,
                               const float *gradient, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < rows; i++) {
    float *row = logits + i * vocabulary;
    for (int64_t j = 0; j < vocabulary; j += LANES) {
      const Vector x = exp_up_to_88(load_logits(row, j, vocabulary) - normalizers[i]) * -gradient[i];
      if (j + LANES <= vocabulary) store(row + j, x);
      else memcpy(row + j, &x, (vocabulary - j) * sizeof(float));
    }
    row[tokens[i]] += gradient[i];
  }
}
