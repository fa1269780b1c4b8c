// Products of a few rows in float32: memory decides how fast they are, so kernels are read once, from front to back.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "crew.h"
#include "memory.h"
#include "panels.h"

namespace bertjax {

// The most rows for which it pays to leave a kernel as it is: more take longer to add than to read.
constexpr int64_t kFewRows = 14;
// Rows of a kernel that are added at once.
constexpr int64_t kAtOnce = 8;

// Adds [rows, 8] x the 8 rows of a kernel [8, columns] to the sums [rows, columns], and fetches the next 8.
inline void AddRows(int64_t rows, const float* a, int64_t stride, const float* kernel, int64_t columns, float* sums) {
  for (int64_t j = 0; j < columns; j += 32) {
    __m512 left[kAtOnce], right[kAtOnce];
#pragma GCC unroll 8
    for (int i = 0; i < kAtOnce; ++i) {
      const float* from = kernel + i * columns + j;
      left[i] = _mm512_loadu_ps(from), right[i] = _mm512_loadu_ps(from + 16);
      Prefetch(from + kAtOnce * columns);
      Prefetch(from + kAtOnce * columns + 16);
    }
    for (int64_t row = 0; row < rows; ++row) {
      float* to = sums + row * columns + j;
      __m512 first = _mm512_load_ps(to), second = _mm512_load_ps(to + 16);
#pragma GCC unroll 8
      for (int i = 0; i < kAtOnce; ++i) {
        const __m512 x = _mm512_set1_ps(a[row * stride + i]);
        first = _mm512_fmadd_ps(x, left[i], first);
        second = _mm512_fmadd_ps(x, right[i], second);
      }
      _mm512_store_ps(to, first);
      _mm512_store_ps(to + 16, second);
    }
  }
}

// As MatMul in matmul.h. Each task takes a part of the depth, which lies together in memory; then the parts are added.
template <class Finish>
void StreamMatMul(Crew& crew, int64_t rows, int64_t depth, const float* a, int64_t stride, const float* const* kernels,
                  int64_t products, int64_t columns, const Finish& finish) {
  static thread_local Scratch scratch;
  const int64_t steps = depth / kAtOnce, size = rows * columns;
  // Enough for all threads, but for so many that all parts' sums would be more than a quarter of the kernel.
  const int64_t wanted = std::max<int64_t>(4, (2 * crew.threads + products - 1) / products);
  const int64_t most = std::max<int64_t>(4, depth / (4 * std::max<int64_t>(rows, 1)));
  const int64_t parts = std::min({steps, wanted, most});
  float* all = scratch.Get<float>(products * parts * size * sizeof(float));
  crew.Run(products * parts, [&](int64_t task) {
    const int64_t part = task % parts;
    float* sums = all + task * size;
    std::memset(sums, 0, size * sizeof(float));
    for (int64_t step = steps * part / parts; step < steps * (part + 1) / parts; ++step) {
      const int64_t k = step * kAtOnce;
      AddRows(rows, a + k, stride, kernels[task / parts] + k * columns, columns, sums);
    }
  });
  crew.Run(products * rows, [&](int64_t task) {
    const int64_t product = task / rows, row = task % rows;
    for (int64_t j = 0; j < columns; j += 16) {
      const float* from = all + product * parts * size + row * columns + j;
      __m512 sum = _mm512_load_ps(from);
      for (int64_t part = 1; part < parts; ++part) sum = _mm512_add_ps(sum, _mm512_load_ps(from + part * size));
      finish(product, row, j, sum);
    }
  });
}

}  // namespace bertjax
