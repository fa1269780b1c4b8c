// Attention over segments, a head of a row of tokens at a time.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "crew.h"
#include "matmul.h"
#include "memory.h"
#include "vectors.h"

namespace bertjax {

// A query looks at the keys of its row that have its number. Without numbers it looks at all.
struct Segments {
  const int32_t *query, *key;  // [length], or null

  // Which of the keys j, ..., j + 15 a query looks at.
  __mmask16 Allowed(int64_t row, int64_t j, int64_t length) const {
    const __mmask16 there = FirstLanes(length - j);
    if (key == nullptr || there == 0) return there;
    return _mm512_mask_cmpeq_epi32_mask(there, _mm512_set1_epi32(query[row]), _mm512_maskz_loadu_epi32(there, key + j));
  }

  // The first key that any of some queries looks at, and the one after the last. One that looks at none takes all.
  void Range(int64_t begin, int64_t end, int64_t length, int64_t* first, int64_t* last) const {
    *first = key == nullptr ? 0 : length;
    *last = key == nullptr ? length : 0;
    for (int64_t row = begin; key != nullptr && row < end; ++row) {
      if (row > begin && query[row] == query[row - 1]) continue;
      int64_t lowest = length, highest = 0;
      for (int64_t j = 0; j < length; j += 16) {
        const uint32_t hit = Allowed(row, j, length);
        if (hit == 0) continue;
        lowest = std::min<int64_t>(lowest, j + __builtin_ctz(hit));
        highest = j + 32 - __builtin_clz(hit);
      }
      *first = std::min(*first, highest == 0 ? 0 : lowest);
      *last = std::max(*last, highest == 0 ? length : highest);
    }
  }
};

// exp(scale x - the largest) of the keys that a query looks at, 0 for the others; returns their sum. A query that looks
// at none gives every key the same. `x` starts at the key `first`, and its width is a multiple of sixteen.
template <class T>
float Softmax(const float* x, int64_t width, float scale, const Segments& segments, int64_t row, int64_t first,
              int64_t length, T* weights) {
  const __m512 log2 = _mm512_set1_ps(scale * 1.44269504f);  // of e
  __m512 most = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  __mmask16 any = 0;
  for (int64_t j = 0; j < width; j += 16) {
    const __mmask16 allowed = segments.Allowed(row, first + j, length);
    most = _mm512_mask_max_ps(most, allowed, most, Load(x + j));
    any |= allowed;
  }
  const __m512 largest = _mm512_set1_ps(_mm512_reduce_max_ps(most));
  __m512 sum = _mm512_setzero_ps();
  for (int64_t j = 0; j < width; j += 16) {
    // The difference comes first: the largest one's must be zero, however large it is.
    const __m512 below = _mm512_mul_ps(_mm512_sub_ps(Load(x + j), largest), log2);
    __m512 weight = any ? Exp2(below) : _mm512_set1_ps(1.0f);
    weight =
        _mm512_maskz_mov_ps(any ? segments.Allowed(row, first + j, length) : FirstLanes(length - first - j), weight);
    sum = _mm512_add_ps(sum, weight);
    Store(weights + j, weight);
  }
  return _mm512_reduce_add_ps(sum);
}

// One head's keys and values of a row of tokens, as panels; a thread has memory for one of them.
template <class Way>
struct Head {
  using T = typename Way::Type;

  int64_t length, padded, width;  // the length rounded up to panels; the features of a head
  T *keys, *values;               // panels of 32 keys; panels of 32 features

  Head(const T* key, const T* value, int64_t stride, int64_t length, int64_t width)
      : length(length), padded(RoundUp(length, kPanel)), width(width) {
    static thread_local Scratch scratch;
    keys = scratch.template Get<T>(3 * padded * width * sizeof(T));
    values = keys + padded * width;
    for (int64_t j = 0; j < length; j += kPanel) {
      Way::PackTransposed(key + j * stride, stride, length - j, width, keys + j * width);
    }
    if (padded != length) {  // what follows the last value in memory may not be a number
      T* copy = values + padded * width;
      for (int64_t j = 0; j < length; ++j) std::memcpy(copy + j * width, value + j * stride, width * sizeof(T));
      std::memset(copy + length * width, 0, (padded - length) * width * sizeof(T));
      value = copy;
      stride = width;
    }
    Way::Pack(value, stride, padded, width, values);
  }
};

// Computes some queries of one head: softmax(query keys^T / sqrt(width)) values.
template <class Way>
void Attend(const Head<Way>& head, const Segments& segments, int64_t begin, int64_t end,
            const typename Way::Type* query, typename Way::Type* out, int64_t stride) {
  using T = typename Way::Type;
  static thread_local Scratch scratch;
  int64_t first, last;
  segments.Range(begin, end, head.length, &first, &last);
  first = first / kPanel * kPanel;
  const int64_t span = RoundUp(last, kPanel) - first, rows = end - begin;
  float* scores = scratch.Get<float>(kPanel * span * (sizeof(float) + sizeof(T)));
  T* weights = reinterpret_cast<T*>(scores + kPanel * span);
  alignas(64) float product[kPanel * kPanel];
  float total[kPanel];
  for (int64_t j = 0; j < span; j += kPanel) {
    Way::Multiply(rows, query + begin * stride, stride, head.keys + (first + j) * head.width, head.width, product,
                  Ahead::Nothing(query));
    for (int64_t i = 0; i < rows; ++i) {
      Store(scores + i * span + j, _mm512_load_ps(product + i * kPanel));
      Store(scores + i * span + j + 16, _mm512_load_ps(product + i * kPanel + 16));
    }
  }
  const float scale = 1.0f / std::sqrt(static_cast<float>(head.width));
  for (int64_t i = 0; i < rows; ++i) {
    total[i] = Softmax(scores + i * span, span, scale, segments, begin + i, first, head.length, weights + i * span);
  }
  for (int64_t j = 0; j < head.width; j += kPanel) {
    Way::Multiply(rows, weights, span, head.values + j * head.padded + first * kPanel, span, product,
                  Ahead::Nothing(query));
    for (int64_t i = 0; i < rows; ++i) {
      const __m512 share = _mm512_set1_ps(1.0f / total[i]);
      T* to = out + (begin + i) * stride + j;
      Store(to, _mm512_mul_ps(share, _mm512_load_ps(product + i * kPanel)));
      Store(to + 16, _mm512_mul_ps(share, _mm512_load_ps(product + i * kPanel + 16)));
    }
  }
}

// Attention of all heads: query, key, value and out are [tokens, stride], a head's features side by side. The rows of
// the batch begin at `starts`, whose last is the end.
template <class Way>
void Attention(Crew& crew, const std::vector<int64_t>& starts, int64_t heads, int64_t width, int64_t stride,
               const typename Way::Type* query, const typename Way::Type* key, const typename Way::Type* value,
               const Segments& segments, typename Way::Type* out) {
  crew.Run((starts.size() - 1) * heads, [&](int64_t task) {
    const int64_t first = starts[task / heads], length = starts[task / heads + 1] - first;
    const int64_t at = first * stride + task % heads * width;
    Segments own = segments;
    if (own.key != nullptr) {
      own.query += first;
      own.key += first;
    }
    const Head<Way> head(key + at, value + at, stride, length, width);
    const Prepared<Way> prepared;
    for (int64_t chunk = 0; chunk < Way::Chunks(length); ++chunk) {
      Attend<Way>(head, own, Way::FirstRow(chunk, length), Way::FirstRow(chunk + 1, length), query + at, out + at,
                  stride);
    }
  });
}

}  // namespace bertjax
