// Products of a few rows: memory decides how fast they are, so kernels are read once, from front to back, and not
// packed.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "crew.h"
#include "memory.h"
#include "panels.h"

namespace bertjax {

// Words of a column that are added at once; with their 32 columns they take half of the vector registers.
constexpr int64_t kAtOnce = 8;

// Adds to 32 sums what those words make with x(0), ..., x(7).
template <class Way, class X>
void AddWords(const Words (&words)[kAtOnce], const X& x, float* sums) {
  __m512 left = _mm512_load_ps(sums), right = _mm512_load_ps(sums + 16);
#pragma GCC unroll 8
  for (int64_t i = 0; i < kAtOnce; ++i) {
    const __m512 each = x(i);
    left = Way::Add(left, each, words[i].left);
    right = Way::Add(right, each, words[i].right);
  }
  _mm512_store_ps(sums, left);
  _mm512_store_ps(sums + 16, right);
}

// Adds [rows, depth] x a kernel [depth, columns] to the sums, where the depth is that of kAtOnce words, and fetches the
// kernel's next rows. Sums are [columns / 32, rows, 32], and those of the offset follow the rows, where there is one:
// were the rows of sums as far apart as a kernel's, they would compete for one set of the first-level cache.
template <class Way, class Source>
void AddRows(int64_t rows, const typename Way::Type* a, int64_t stride, const Source* kernel, int64_t kernel_stride,
             int64_t columns, float* sums) {
  constexpr int64_t kDepth = kAtOnce * Way::kNumbers;
  for (int64_t j = 0; j < columns; j += kPanel) {
    PrefetchRows(kernel + kDepth * kernel_stride + j, kernel_stride, kDepth);
    Words words[kAtOnce];
#pragma GCC unroll 8
    for (int64_t i = 0; i < kAtOnce; ++i) {
      words[i] = Way::Load(kernel + i * Way::kNumbers * kernel_stride + j, kernel_stride);
    }
    for (int64_t row = 0; row < rows; ++row, sums += kPanel) {
      const float* x = reinterpret_cast<const float*>(a + row * stride);
      AddWords<Way>(words, [x](int64_t i) { return _mm512_set1_ps(x[i]); }, sums);
    }
    if constexpr (Way::kOffset) {
      AddWords<Way>(words, [](int64_t) { return Way::Offset(); }, sums);
      sums += kPanel;
    }
  }
}

// The sum of the sums of all parts, which are `size` numbers apart.
template <class Way>
__m512 AddParts(const float* sums, int64_t parts, int64_t size) {
  __m512 sum = _mm512_load_ps(sums);
  for (int64_t part = 1; part < parts; ++part) sum = Way::Plus(sum, _mm512_load_ps(sums + part * size));
  return sum;
}

// As MatMul in matmul.h. Each task takes a part of the depth, which lies together in memory, and with many threads a
// block of its columns; then the parts are added.
template <class Way, class Source, class Finish>
void StreamMatMul(Crew& crew, int64_t rows, int64_t depth, const typename Way::Type* a, int64_t stride,
                  const Source* const* kernels, int64_t products, int64_t columns, const Finish& finish) {
  static thread_local Scratch scratch;
  constexpr int64_t kDepth = kAtOnce * Way::kNumbers;
  const int64_t steps = depth / kDepth, high = rows + Way::kOffset, size = high * columns;
  // As many tasks of each product as there are threads, so that all end at once; but all parts' sums are no more than a
  // quarter of the kernel's numbers, or four.
  const int64_t parts = std::min({steps, crew.threads, std::max<int64_t>(4, depth / (4 * rows))});
  const int64_t blocks = std::clamp<int64_t>((crew.threads + parts - 1) / parts, 1, std::max<int64_t>(1, columns / 64));
  float* all = scratch.Get<float>(products * parts * size * sizeof(float));
  crew.Run(products * parts * blocks, [&](int64_t task) {
    const int64_t product = task / blocks / parts, part = task / blocks % parts, block = task % blocks;
    const int64_t first = columns / kPanel * block / blocks * kPanel;
    const int64_t last = columns / kPanel * (block + 1) / blocks * kPanel;
    float* sums = all + (product * parts + part) * size + first * high;
    std::memset(sums, 0, (last - first) * high * sizeof(float));
    for (int64_t step = steps * part / parts; step < steps * (part + 1) / parts; ++step) {
      AddRows<Way>(rows, a + step * kDepth, stride, kernels[product] + step * kDepth * columns + first, columns,
                   last - first, sums);
    }
  });
  crew.Run(products * rows, [&](int64_t task) {
    const int64_t product = task / rows, row = task % rows;
    for (int64_t j = 0; j < columns; j += 16) {
      const float* sums = all + product * parts * size + j / kPanel * kPanel * high + j % kPanel;
      __m512 sum = AddParts<Way>(sums + row * kPanel, parts, size);
      if constexpr (Way::kOffset) sum = Way::Minus(sum, AddParts<Way>(sums + rows * kPanel, parts, size));
      finish(product, row, j, Way::ToFloat(sum));
    }
  });
}

}  // namespace bertjax
