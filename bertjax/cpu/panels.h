// The right-hand side of a product in panels of 32 columns: how a matrix is packed into them.
//
// A panel is read from front to back: for each step of the depth it has 32 words of four bytes, of a float32, of two
// bfloat16 or of four int8 that follow each other in a column.

#pragma once

#include <immintrin.h>

#include <cstdint>

#include "vectors.h"

namespace bertjax {

constexpr int64_t kPanel = 32;

inline int64_t RoundUp(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// 32 words, in order.
struct Words {
  __m512 left, right;
};

inline void Prefetch(const void* at) { _mm_prefetch(static_cast<const char*>(at), _MM_HINT_T0); }

// Fetches `rows` rows of 32 numbers of a kernel into the second-level cache. Rows are far apart, so that no hardware
// guesses the next ones; and in the first level they would push out what is being multiplied, as rows that are a power
// of two apart share few of its sets.
template <class Source>
void PrefetchRows(const Source* from, int64_t stride, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row) {
    const char* line = reinterpret_cast<const char*>(from + row * stride);
    for (size_t at = 0; at < kPanel * sizeof(Source); at += 64) _mm_prefetch(line + at, _MM_HINT_T1);
  }
}

// Memory that is wanted soon, fetched a few bytes at a time: asking for the same line again costs nothing.
struct Ahead {
  const char* from;
  int64_t step;  // bytes for each of a product's depth

  // `bytes` from `from` on, a `share` of them in each of `shares` products with that depth.
  static Ahead Part(const void* from, int64_t bytes, int64_t share, int64_t shares, int64_t depth) {
    const int64_t step = bytes / (shares * depth);
    return {static_cast<const char*>(from) + share * step * depth, step};
  }
  static Ahead Nothing(const void* known) { return {static_cast<const char*>(known), 0}; }

  // For whoever fetches once for `count` of the depth.
  Ahead Every(int64_t count) const { return {from, step * count}; }

  void Fetch(int64_t depth) {
    for (int64_t at = 0; at < depth * step; at += 64) Prefetch(from + at);
    from += depth * step;
  }
};

// Up to sixteen rows of sixteen words -> sixteen of a panel's, zero beyond the rows.
inline void TransposeRows(const uint32_t* from, int64_t stride, int64_t rows, uint32_t* to) {
  if (rows >= 16) return Transpose(from, stride, to, kPanel);
  alignas(64) uint32_t padded[16 * 16] = {};
  for (int64_t i = 0; i < rows; ++i) _mm512_store_si512(padded + 16 * i, _mm512_loadu_si512(from + i * stride));
  Transpose(padded, 16, to, kPanel);
}

// [depth, columns] of a row-major matrix -> columns / 32 panels, `size` numbers from one to the next. `Panels` says
// what words are made of.
template <class Panels, class Source>
void PackWords(const Source* from, int64_t stride, int64_t depth, int64_t columns, typename Panels::Type* to,
               int64_t size) {
  constexpr int64_t kAhead = 16;  // rows
  for (int64_t k = 0; k < depth; k += Panels::kNumbers, from += Panels::kNumbers * stride) {
    for (int64_t j = 0; j < columns; j += kPanel) {
      PrefetchRows(from + kAhead * stride + j, stride, Panels::kNumbers);
      const Words words = Panels::Load(from + j, stride);
      typename Panels::Type* out = to + j / kPanel * size + k * kPanel;
      _mm512_store_ps(out, words.left);
      _mm512_store_ps(out + 16 * Panels::kNumbers, words.right);
    }
  }
}

// Panels of float32, [depth, 32].
struct SinglePanels {
  using Type = float;
  static constexpr int64_t kNumbers = 1;  // in a word

  // What a panel takes, in numbers.
  static int64_t Size(int64_t depth) { return depth * kPanel; }

  // kNumbers rows of 32 columns, as words.
  static Words Load(const float* from, int64_t) { return {_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16)}; }

  // [depth, columns] of a row-major matrix -> columns / 32 panels; the depth is a multiple of kNumbers.
  static void Pack(const float* from, int64_t stride, int64_t depth, int64_t columns, float* to) {
    PackWords<SinglePanels>(from, stride, depth, columns, to, Size(depth));
  }

  // [rows <= 32, depth] of a row-major matrix -> a panel of its transpose, zero beyond the rows.
  static void PackTransposed(const float* from, int64_t stride, int64_t rows, int64_t depth, float* to) {
    for (int64_t half = 0; half < kPanel; half += 16) {
      for (int64_t k = 0; k < depth; k += 16) {
        TransposeRows(reinterpret_cast<const uint32_t*>(from + half * stride + k), stride, rows - half,
                      reinterpret_cast<uint32_t*>(to + k * kPanel + half));
      }
    }
  }
};

// Panels of bfloat16, [depth / 2, 32, 2].
struct PairPanels {
  using Type = bf16;
  static constexpr int64_t kNumbers = 2;

  static int64_t Size(int64_t depth) { return depth * kPanel; }

  template <class Source>
  static Words Load(const Source* from, int64_t stride) {
    const __m512i even = Row(from), odd = Row(from + stride);
    // Words 0, 32, 1, 33, ... of the two vectors, and 16, 48, 17, 49, ...
    const __m512i first =
        _mm512_add_epi32(_mm512_set1_epi32(0x00200000), _mm512_mullo_epi32(Count(), _mm512_set1_epi32(0x00010001)));
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(0x00100010));
    return {(__m512)_mm512_permutex2var_epi16(even, first, odd), (__m512)_mm512_permutex2var_epi16(even, second, odd)};
  }

  template <class Source>
  static void Pack(const Source* from, int64_t stride, int64_t depth, int64_t columns, bf16* to) {
    PackWords<PairPanels>(from, stride, depth, columns, to, Size(depth));
  }

  static void PackTransposed(const bf16* from, int64_t stride, int64_t rows, int64_t depth, bf16* to) {
    for (int64_t half = 0; half < kPanel; half += 16) {
      for (int64_t k = 0; k < depth; k += 32) {  // pairs are words, and stay together
        TransposeRows(reinterpret_cast<const uint32_t*>(from + half * stride + k), stride / 2, rows - half,
                      reinterpret_cast<uint32_t*>(to) + k / 2 * kPanel + half);
      }
    }
  }

 private:
  static __m512i Row(const bf16* from) { return _mm512_loadu_si512(from); }
  static __m512i Row(const float* from) {
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from));
  }
  static __m512i Count() { return _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0); }
};

// Panels of int8, [depth / 4, 32, 4].
struct FourPanels {
  using Type = int8_t;
  static constexpr int64_t kNumbers = 4;

  static int64_t Size(int64_t depth) { return depth * kPanel; }

  // Pairs and fours are made within halves of a vector, which are then put in order.
  static Words Load(const int8_t* from, int64_t stride) {
    __m256i row[4], pairs[4], fours[4];
    for (int i = 0; i < 4; ++i) row[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i * stride));
    for (int i = 0; i < 4; i += 2) {
      pairs[i] = _mm256_unpacklo_epi8(row[i], row[i + 1]);
      pairs[i + 1] = _mm256_unpackhi_epi8(row[i], row[i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
      fours[2 * i] = _mm256_unpacklo_epi16(pairs[i], pairs[i + 2]);
      fours[2 * i + 1] = _mm256_unpackhi_epi16(pairs[i], pairs[i + 2]);
    }
    const __m512i first = Join(fours[0], fours[1]), second = Join(fours[2], fours[3]);
    return {(__m512)_mm512_shuffle_i64x2(first, second, 0x88), (__m512)_mm512_shuffle_i64x2(first, second, 0xdd)};
  }

  static void Pack(const int8_t* from, int64_t stride, int64_t depth, int64_t columns, int8_t* to) {
    PackWords<FourPanels>(from, stride, depth, columns, to, Size(depth));
  }

 private:
  static __m512i Join(__m256i low, __m256i high) { return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1); }
};

}  // namespace bertjax
