// Products whose sums are held in vector registers, with AVX-512: of float32, of bfloat16 (AVX512_BF16) and of int8
// (AVX512_VNNI). One kernel does all three, as a word of four bytes holds one, two or four numbers.

#pragma once

#include <immintrin.h>

#include <cstdint>

#include "panels.h"

namespace bertjax {

// How rows are divided into chunks: 28 of the 32 vector registers hold a chunk's products with a panel.
struct RegisterChunks {
  static constexpr int64_t kRows = 14;
  static int64_t Chunks(int64_t rows) { return (rows + kRows - 1) / kRows; }
  // All chunks are about as high, as a low one wastes the waits for its few sums.
  static int64_t FirstRow(int64_t chunk, int64_t rows) { return rows * chunk / Chunks(rows); }

  static void Begin() {}
  static void End() {}
};

// What the numbers of a word add to sixteen sums. Sums start at zero, or at what the panel begins with.
struct FromZero {
  static constexpr int64_t kStart = 0;
  static constexpr bool kOffset = false;
  static __m512 Start(const float*) { return _mm512_setzero_ps(); }
  static __m512 Plus(__m512 sum, __m512 other) { return _mm512_add_ps(sum, other); }
  static __m512 ToFloat(__m512 sum) { return sum; }
};
struct Singles : FromZero {
  static __m512 Add(__m512 sum, __m512 x, __m512 y) { return _mm512_fmadd_ps(x, y, sum); }
};
struct Pairs : FromZero {
  static __m512 Add(__m512 sum, __m512 x, __m512 y) { return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)y); }
};
// The instruction wants one side without a sign, so activations, x, are 128 more than they stand for.
struct Fours {
  static constexpr int64_t kStart = kPanel;
  static constexpr bool kOffset = true;
  static __m512 Offset() { return (__m512)_mm512_set1_epi8(-128); }  // 128, as it is taken to have no sign
  static __m512 Start(const float* panel) { return _mm512_load_ps(panel); }
  static __m512 Add(__m512 sum, __m512 x, __m512 y) {
    return (__m512)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)y);
  }
  static __m512 Plus(__m512 sum, __m512 other) { return (__m512)_mm512_add_epi32((__m512i)sum, (__m512i)other); }
  static __m512 Minus(__m512 sum, __m512 other) { return (__m512)_mm512_sub_epi32((__m512i)sum, (__m512i)other); }
  static __m512 ToFloat(__m512 sum) { return _mm512_cvtepi32_ps((__m512i)sum); }
};

// R rows of words x a panel -> [R, 32] sums; rows are `bytes` apart.
template <class Lanes, int R>
void MultiplyWords(const void* a, int64_t bytes, const float* panel, int64_t words, float* out, Ahead ahead) {
  // One address for every three rows: fourteen do not fit into the registers, and the compiler must not make them.
  constexpr int kBases = (R + 2) / 3;
  const char* base[kBases];
  // Loops over rows are unrolled by pragma, or the sums would live in memory.
#pragma GCC unroll 5
  for (int i = 0; i < kBases; ++i) base[i] = static_cast<const char*>(a) + 3 * i * bytes;
  __m512 sum[R][2];
  const __m512 first = Lanes::Start(panel), second = Lanes::Start(panel + 16);
#pragma GCC unroll 14
  for (int i = 0; i < R; ++i) sum[i][0] = first, sum[i][1] = second;
  panel += Lanes::kStart;
  for (int64_t k = 0; k < words; ++k, panel += kPanel) {
    const __m512 left = _mm512_load_ps(panel), right = _mm512_load_ps(panel + 16);
    Prefetch(ahead.from);
    ahead.from += ahead.step;
#pragma GCC unroll 14
    for (int i = 0; i < R; ++i) {
      const __m512 x = _mm512_set1_ps(*reinterpret_cast<const float*>(base[i / 3] + (i % 3) * bytes));
      sum[i][0] = Lanes::Add(sum[i][0], x, left);
      sum[i][1] = Lanes::Add(sum[i][1], x, right);
    }
#pragma GCC unroll 5
    for (int i = 0; i < kBases; ++i) {
      base[i] += sizeof(float);
      asm("" : "+r"(base[i]));
    }
  }
#pragma GCC unroll 14
  for (int i = 0; i < R; ++i) {
    _mm512_store_ps(out + kPanel * i, sum[i][0]);
    _mm512_store_ps(out + kPanel * i + 16, sum[i][1]);
  }
}

// The same for the 1 to 14 rows of a chunk.
template <class Lanes>
void MultiplyWords(int64_t rows, const void* a, int64_t bytes, const void* panel, int64_t words, float* out,
                   Ahead ahead) {
  const float* from = static_cast<const float*>(panel);
  switch (rows) {
#define BERTJAX_CASE(R) \
  case R:               \
    return MultiplyWords<Lanes, R>(a, bytes, from, words, out, ahead)
    BERTJAX_CASE(1);
    BERTJAX_CASE(2);
    BERTJAX_CASE(3);
    BERTJAX_CASE(4);
    BERTJAX_CASE(5);
    BERTJAX_CASE(6);
    BERTJAX_CASE(7);
    BERTJAX_CASE(8);
    BERTJAX_CASE(9);
    BERTJAX_CASE(10);
    BERTJAX_CASE(11);
    BERTJAX_CASE(12);
    BERTJAX_CASE(13);
    BERTJAX_CASE(14);
#undef BERTJAX_CASE
  }
}

struct F32 : SinglePanels, Singles, RegisterChunks {
  using Between = F32;                     // the way of attention
  static constexpr int64_t kPacking = 20;  // see Division
  static constexpr int64_t kFewRows = 64;  // the most rows for which StreamMatMul is faster

  // [rows, depth] x a panel -> float32 [rows, 32]. `ahead` is fetched on the way.
  static void Multiply(int64_t rows, const float* a, int64_t stride, const float* panel, int64_t depth, float* out,
                       Ahead ahead) {
    MultiplyWords<Singles>(rows, a, stride * sizeof(float), panel, depth, out, ahead);
  }
};

struct DotBF16 : PairPanels, Pairs, RegisterChunks {
  using Between = DotBF16;
  static constexpr int64_t kPacking = 20;
  static constexpr int64_t kFewRows = 64;

  // The depth is even.
  static void Multiply(int64_t rows, const bf16* a, int64_t stride, const bf16* panel, int64_t depth, float* out,
                       Ahead ahead) {
    MultiplyWords<Pairs>(rows, a, stride * sizeof(bf16), panel, depth / 2, out, ahead.Every(2));
  }
};

// int8 x int8 -> int32, with `Attention` between these products. A panel begins with what the offset of activations
// makes too much of each column, -128 times the sum of its numbers.
template <class Attention>
struct DotI8 : FourPanels, Fours, RegisterChunks {
  using Type = uint8_t;
  using Between = Attention;
  static constexpr int64_t kPacking = 30;
  static constexpr int64_t kFewRows = 48;

  static int64_t Size(int64_t depth) { return FourPanels::Size(depth) + kRow; }

  static void Pack(const int8_t* from, int64_t stride, int64_t depth, int64_t columns, uint8_t* to) {
    int8_t* panel = reinterpret_cast<int8_t*>(to);
    PackWords<FourPanels>(from, stride, depth, columns, panel + kRow, Size(depth));
    for (int64_t j = 0; j < columns; j += kPanel, panel += Size(depth)) {
      for (int64_t half = 0; half < kRow; half += 64) StartColumns(panel + half, depth);
    }
  }

  // The depth is a multiple of four; the results are int32.
  static void Multiply(int64_t rows, const uint8_t* a, int64_t stride, const uint8_t* panel, int64_t depth, float* out,
                       Ahead ahead) {
    MultiplyWords<Fours>(rows, a, stride, panel, depth / 4, out, ahead.Every(4));
  }

 private:
  static constexpr int64_t kRow = kPanel * sizeof(int32_t);  // bytes of a panel's start, and of each row of fours

  static void StartColumns(int8_t* panel, int64_t depth) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t row = 1; row <= depth / 4; ++row) sum = Add(sum, Offset(), _mm512_load_ps(panel + row * kRow));
    _mm512_store_ps(panel, Minus(_mm512_setzero_ps(), sum));
  }
};

}  // namespace bertjax
