// Matrix products, in float32 with AVX-512 and in bfloat16 and int8 with AMX.
//
// The right-hand side is repacked into panels of 32 columns, a block of which stays in the second-level cache; the
// left-hand side is read as it is, a chunk of rows at a time. (Goto and van de Geijn, Anatomy of high-performance
// matrix multiplication, 2008.) `F32`, `BF16` and `I8` are the ways to multiply; they have the same members.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "crew.h"
#include "memory.h"
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

  void Fetch(int64_t depth) {
    for (const char* end = from + depth * step; from < end; from += 64) Prefetch(from);
  }
};

struct F32 {
  using Type = float;
  using Between = F32;  // the way of attention

  // Chunks of rows: 28 of the 32 vector registers hold their products with a panel.
  static constexpr int64_t kRows = 14;
  static constexpr int64_t kPacking = 20;  // see Division
  static int64_t Chunks(int64_t rows) { return (rows + kRows - 1) / kRows; }
  // All chunks are about as high, as a low one wastes the waits for its few sums.
  static int64_t FirstRow(int64_t chunk, int64_t rows) { return rows * chunk / Chunks(rows); }

  static void Begin() {}
  static void End() {}

  // [depth, columns] of a row-major matrix -> columns / 32 panels [depth, 32].
  static void Pack(const float* from, int64_t stride, int64_t depth, int64_t columns, float* to) {
    for (int64_t k = 0; k < depth; ++k, from += stride, to += kPanel) {
      for (int64_t j = 0; j < columns; j += 16) {
        Prefetch(from + kAhead * stride + j);
        _mm512_store_ps(to + j / kPanel * kPanel * depth + j % kPanel, _mm512_loadu_ps(from + j));
      }
    }
  }

  // [rows <= 32, depth] of a row-major matrix -> a panel [depth, 32] of its transpose, zero beyond the rows.
  static void PackTransposed(const float* from, int64_t stride, int64_t rows, int64_t depth, float* to) {
    for (int64_t half = 0; half < kPanel; half += 16) {
      for (int64_t k = 0; k < depth; k += 16) {
        TransposeRows(reinterpret_cast<const uint32_t*>(from + half * stride + k), stride, rows - half,
                      reinterpret_cast<uint32_t*>(to + k * kPanel + half));
      }
    }
  }

  // Up to sixteen rows of sixteen words -> sixteen of a panel's, zero beyond the rows.
  static void TransposeRows(const uint32_t* from, int64_t stride, int64_t rows, uint32_t* to) {
    if (rows >= 16) return Transpose(from, stride, to, kPanel);
    alignas(64) uint32_t padded[16 * 16] = {};
    for (int64_t i = 0; i < rows; ++i) _mm512_store_si512(padded + 16 * i, _mm512_loadu_si512(from + i * stride));
    Transpose(padded, 16, to, kPanel);
  }

  // [rows, depth] x a panel -> float32 [rows, 32]. `ahead` is fetched on the way.
  static void Multiply(int64_t rows, const float* a, int64_t stride, const float* panel, int64_t depth, float* out,
                       Ahead ahead) {
    switch (rows) {
#define BERTJAX_CASE(R) \
  case R:               \
    return MultiplyRows<R>(a, stride, panel, depth, out, ahead)
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

  static __m512 Sums(const float* out) { return _mm512_load_ps(out); }

  // Loops over rows are unrolled by pragma, or the sums would live in memory.
  template <int R>
  static void MultiplyRows(const float* a, int64_t stride, const float* panel, int64_t depth, float* out, Ahead ahead) {
    // One address for every three rows: fourteen do not fit into the registers, and the compiler must not make them.
    constexpr int kBases = (R + 2) / 3;
    const int64_t bytes = stride * sizeof(float);
    const char* base[kBases];
#pragma GCC unroll 5
    for (int i = 0; i < kBases; ++i) base[i] = reinterpret_cast<const char*>(a + 3 * i * stride);
    __m512 sum[R][2];
#pragma GCC unroll 14
    for (int i = 0; i < R; ++i) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < depth; ++k, panel += kPanel) {
      const __m512 left = _mm512_load_ps(panel), right = _mm512_load_ps(panel + 16);
      Prefetch(ahead.from);
      ahead.from += ahead.step;
#pragma GCC unroll 14
      for (int i = 0; i < R; ++i) {
        const __m512 x = _mm512_set1_ps(*reinterpret_cast<const float*>(base[i / 3] + (i % 3) * bytes));
        sum[i][0] = _mm512_fmadd_ps(x, left, sum[i][0]);
        sum[i][1] = _mm512_fmadd_ps(x, right, sum[i][1]);
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
};

struct BF16 {
  using Type = bf16;
  using Between = BF16;

  // Two tiles of rows by two of columns; the matrices have room for whole chunks.
  static constexpr int64_t kRows = 32;
  static constexpr int64_t kPacking = 100;
  static int64_t Chunks(int64_t rows) { return (rows + kRows - 1) / kRows; }
  static int64_t FirstRow(int64_t chunk, int64_t rows) { return std::min(rows, chunk * kRows); }

  // Between Begin and End, all eight tiles are 16 rows of 64 bytes.
  static void Begin() {
    struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("" ::"r"(&config) : "memory");  // the intrinsic does not tell the compiler that it reads all of it
    _tile_loadconfig(&config);
  }
  static void End() { _tile_release(); }

  // Panels have pairs of rows interleaved, [depth / 2, 32, 2], as AMX multiplies them; the depth is even.
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
        F32::TransposeRows(reinterpret_cast<const uint32_t*>(from + half * stride + k), stride / 2, rows - half,
                           reinterpret_cast<uint32_t*>(to) + k / 2 * kPanel + half);
      }
    }
  }

  // The depth is a multiple of 32, and `a` has 16 or 32 rows to read.
  static void Multiply(int64_t rows, const bf16* a, int64_t stride, const bf16* panel, int64_t depth, float* out,
                       Ahead ahead) {
    constexpr int kBytes = kPanel * sizeof(float);  // of a row of the panel's pairs and of the result
    const int64_t bytes = stride * sizeof(bf16);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < depth; k += 32) {
      ahead.Fetch(32);
      _tile_loadd(6, panel + k * kPanel, kBytes);
      _tile_loadd(7, panel + k * kPanel + 32, kBytes);
      _tile_loadd(4, a + k, bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (rows <= 16) continue;
      _tile_loadd(5, a + 16 * stride + k, bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, kBytes);
    _tile_stored(1, out + 16, kBytes);
    if (rows <= 16) return;
    _tile_stored(2, out + 16 * kPanel, kBytes);
    _tile_stored(3, out + 16 * kPanel + 16, kBytes);
  }

  static __m512 Sums(const float* out) { return _mm512_load_ps(out); }

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

// int8 x int8 -> int32. What a number stands for is left to the caller.
struct I8 {
  using Type = int8_t;
  using Between = BF16;

  static constexpr int64_t kRows = BF16::kRows;
  static constexpr int64_t kPacking = 150;
  static int64_t Chunks(int64_t rows) { return BF16::Chunks(rows); }
  static int64_t FirstRow(int64_t chunk, int64_t rows) { return BF16::FirstRow(chunk, rows); }

  static void Begin() { BF16::Begin(); }
  static void End() { BF16::End(); }

  // Panels have four rows interleaved, [depth / 4, 32, 4].
  static void Pack(const int8_t* from, int64_t stride, int64_t depth, int64_t columns, int8_t* to) {
    for (int64_t k = 0; k < depth; k += 4, from += 4 * stride, to += 4 * kPanel) {
      for (int64_t j = 0; j < columns; j += kPanel) {
        for (int64_t row = kAhead; row < kAhead + 4; ++row) Prefetch(from + row * stride + j);
        Interleave(from + j, stride, to + j * depth);
      }
    }
  }

  // The depth is a multiple of 64, and `a` has 16 or 32 rows to read; the results are int32.
  static void Multiply(int64_t rows, const int8_t* a, int64_t stride, const int8_t* panel, int64_t depth, float* out,
                       Ahead ahead) {
    constexpr int kBytes = kPanel * sizeof(int32_t);  // of a row of the panel's fours and of the result
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < depth; k += 64) {
      ahead.Fetch(64);
      _tile_loadd(6, panel + k * kPanel, kBytes);
      _tile_loadd(7, panel + k * kPanel + 64, kBytes);
      _tile_loadd(4, a + k, stride);
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
      if (rows <= 16) continue;
      _tile_loadd(5, a + 16 * stride + k, stride);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    }
    _tile_stored(0, out, kBytes);
    _tile_stored(1, out + 16, kBytes);
    if (rows <= 16) return;
    _tile_stored(2, out + 16 * kPanel, kBytes);
    _tile_stored(3, out + 16 * kPanel + 16, kBytes);
  }

  static __m512 Sums(const float* out) { return _mm512_cvtepi32_ps(_mm512_load_si512(out)); }

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

// The way's state on this thread, as long as this lives.
template <class Way>
struct Tiles {
  Tiles() { Way::Begin(); }
  ~Tiles() { Way::End(); }
};

// A thread's packed panels; one for all kinds of products.
inline Scratch& PanelScratch() {
  static thread_local Scratch scratch;
  return scratch;
}

// How a product is divided into tasks: blocks of columns, and of each a number of parts of the rows.
struct Division {
  int64_t block, blocks, parts;

  // For `products` of [rows, depth] x [depth, columns] by that many threads. `packing` is what it costs to pack a
  // number, beside multiplying it with a row.
  static Division Of(int64_t products, int64_t rows, int64_t depth, int64_t columns, int64_t bytes, int64_t packing,
                     int64_t threads) {
    // A block stays in a second-level cache of 2 MB, beside some rows.
    const int64_t fitting = (int64_t(768) << 10) / (depth * bytes) / kPanel * kPanel;
    const int64_t widest = std::clamp<int64_t>(fitting, kPanel, std::min<int64_t>(columns, 256));
    Division best{};
    double least = std::numeric_limits<double>::infinity();
    for (int64_t block = kPanel; block <= widest; block += kPanel) {
      const int64_t blocks = (columns + block - 1) / block;
      if (block != RoundUp((columns + blocks - 1) / blocks, kPanel)) continue;  // the same number, less evenly
      // Each part packs the block anew.
      for (int64_t parts = 1; parts <= std::min<int64_t>((rows + 127) / 128, 3 * threads); ++parts) {
        const double cost = Cost(block, blocks * parts * products, rows / parts, packing, threads);
        if (cost < least) best = {block, blocks, parts}, least = cost;
      }
    }
    return best;
  }

 private:
  // Memory is slow to give the short ends of rows that narrow blocks are made of, and some thread is always late.
  static double Cost(int64_t block, int64_t tasks, int64_t rows, int64_t packing, int64_t threads) {
    const int64_t rounds = (tasks + threads - 1) / threads;
    return (rounds + 0.3) * (packing * (block + 64) + rows * block);
  }
};

// Computes `products` products of one matrix a, [rows, depth], with kernels [depth, columns], and hands each sixteen
// numbers of the results to finish(product, row, column, numbers). Sums are float32 and run over the depth in one order
// whatever the shape of a, so that in float32 a row's result does not depend on the others.
template <class Way, class Source, class Finish>
void MatMul(Crew& crew, int64_t rows, int64_t depth, const typename Way::Type* a, int64_t stride,
            const Source* const* kernels, int64_t products, int64_t columns, const Finish& finish) {
  using T = typename Way::Type;
  const Division d = Division::Of(products, rows, depth, columns, sizeof(T), Way::kPacking, crew.threads);
  crew.Run(products * d.blocks * d.parts, [&](int64_t task) {
    const int64_t product = task / (d.blocks * d.parts), part = task % d.parts;
    const int64_t first = task / d.parts % d.blocks * d.block, last = std::min(columns, first + d.block);
    T* panels = PanelScratch().template Get<T>((last - first) * depth * sizeof(T));
    Way::Pack(kernels[product] + first, columns, depth, last - first, panels);
    alignas(64) float out[kPanel * kPanel];
    const Tiles<Way> tiles;
    const int64_t chunks = Way::Chunks(rows);
    for (int64_t chunk = chunks * part / d.parts; chunk < chunks * (part + 1) / d.parts; ++chunk) {
      const int64_t begin = Way::FirstRow(chunk, rows), end = Way::FirstRow(chunk + 1, rows);
      for (int64_t j = first; j < last; j += kPanel) {
        // The next chunk, a part with each panel: it comes from afar, and nothing else would fetch it in time.
        const Ahead next = Ahead::Part(a + end * stride, (end - begin) * stride * sizeof(T), (j - first) / kPanel,
                                       (last - first) / kPanel, depth);
        Way::Multiply(end - begin, a + begin * stride, stride, panels + (j - first) * depth, depth, out, next);
        for (int64_t row = begin; row < end; ++row) {
          const float* sums = out + (row - begin) * kPanel;
          finish(product, row, j, Way::Sums(sums));
          finish(product, row, j + 16, Way::Sums(sums + 16));
        }
      }
    }
  });
}

}  // namespace bertjax
