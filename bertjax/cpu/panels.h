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

// How many rows ahead of the one being packed are fetched: rows are far apart, and no hardware guesses the next one.
constexpr int64_t kAhead = 16;

inline void Prefetch(const void* at) { _mm_prefetch(static_cast<const char*>(at), _MM_HINT_T0); }

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
    for (const char* end = from + depth * step; from < end; from += 64) Prefetch(from);
  }
};

// Up to sixteen rows of sixteen words -> sixteen of a panel's, zero beyond the rows.
inline void TransposeRows(const uint32_t* from, int64_t stride, int64_t rows, uint32_t* to) {
  if (rows >= 16) return Transpose(from, stride, to, kPanel);
  alignas(64) uint32_t padded[16 * 16] = {};
  for (int64_t i = 0; i < rows; ++i) _mm512_store_si512(padded + 16 * i, _mm512_loadu_si512(from + i * stride));
  Transpose(padded, 16, to, kPanel);
}

// Panels of float32, [depth, 32].
struct SinglePanels {
  using Type = float;

  // What a panel takes, in numbers.
  static int64_t Size(int64_t depth) { return depth * kPanel; }

  // [depth, columns] of a row-major matrix -> columns / 32 panels.
  static void Pack(const float* from, int64_t stride, int64_t depth, int64_t columns, float* to) {
    for (int64_t k = 0; k < depth; ++k, from += stride, to += kPanel) {
      for (int64_t j = 0; j < columns; j += 16) {
        Prefetch(from + kAhead * stride + j);
        _mm512_store_ps(to + j / kPanel * kPanel * depth + j % kPanel, _mm512_loadu_ps(from + j));
      }
    }
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

// Panels of bfloat16, [depth / 2, 32, 2]; the depth is even.
struct PairPanels {
  using Type = bf16;

  static int64_t Size(int64_t depth) { return depth * kPanel; }

  template <class Source>
  static void Pack(const Source* from, int64_t stride, int64_t depth, int64_t columns, bf16* to) {
    constexpr int64_t kLine = 64 / sizeof(Source);
    for (int64_t k = 0; k < depth; k += 2, from += 2 * stride, to += 2 * kPanel) {
      for (int64_t j = 0; j < columns; j += kPanel) {
        for (int64_t line = j; line < j + kPanel; line += kLine) {
          Prefetch(from + kAhead * stride + line);
          Prefetch(from + (kAhead + 1) * stride + line);
        }
        Interleave(Row(from + j), Row(from + stride + j), to + j * depth);
      }
    }
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

  static void Interleave(__m512i even, __m512i odd, bf16* to) {
    // Words 0, 32, 1, 33, ... of the two vectors, and 16, 48, 17, 49, ...
    const __m512i first =
        _mm512_add_epi32(_mm512_set1_epi32(0x00200000), _mm512_mullo_epi32(Count(), _mm512_set1_epi32(0x00010001)));
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(0x00100010));
    _mm512_store_si512(to, _mm512_permutex2var_epi16(even, first, odd));
    _mm512_store_si512(to + kPanel, _mm512_permutex2var_epi16(even, second, odd));
  }
  static __m512i Count() { return _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0); }
};

// Panels of int8, [depth / 4, 32, 4]; the depth is a multiple of four.
struct FourPanels {
  using Type = int8_t;

  static int64_t Size(int64_t depth) { return depth * kPanel; }

  static void Pack(const int8_t* from, int64_t stride, int64_t depth, int64_t columns, int8_t* to) {
    Pack(from, stride, depth, columns, to, Size(depth));
  }

  // The same, with `size` numbers from one panel to the next.
  static void Pack(const int8_t* from, int64_t stride, int64_t depth, int64_t columns, int8_t* to, int64_t size) {
    for (int64_t k = 0; k < depth; k += 4, from += 4 * stride, to += 4 * kPanel) {
      for (int64_t j = 0; j < columns; j += kPanel) {
        for (int64_t row = kAhead; row < kAhead + 4; ++row) Prefetch(from + row * stride + j);
        Interleave(from + j, stride, to + j / kPanel * size);
      }
    }
  }

 private:
  // Four rows of 32 bytes -> [32, 4]. Pairs and fours are made within halves of a vector, which are then put in order.
  static void Interleave(const int8_t* from, int64_t stride, int8_t* to) {
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
    __m256i* out = reinterpret_cast<__m256i*>(to);
    for (int i = 0; i < 2; ++i) {
      _mm256_store_si256(out + i, _mm256_permute2x128_si256(fours[2 * i], fours[2 * i + 1], 0x20));
      _mm256_store_si256(out + i + 2, _mm256_permute2x128_si256(fours[2 * i], fours[2 * i + 1], 0x31));
    }
  }
};

}  // namespace bertjax
