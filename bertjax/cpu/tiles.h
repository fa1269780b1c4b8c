// Products by AMX, whose sums are in four tiles: of bfloat16 and of int8.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "panels.h"

namespace bertjax {

// Two tiles of rows by two of columns; matrices have room for whole chunks.
struct TileChunks {
  static constexpr int64_t kRows = 32;
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
};

// What the tiles of rows, 4 and 5, add to the four of sums with those of columns, 6 and 7.
struct PairTiles {
  static void AddUpper() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
  }
  static void AddLower() {
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
};
struct FourTiles {
  static void AddUpper() {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
  }
  static void AddLower() {
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
};

// [rows, depth] x a panel -> [rows, 32] sums of four bytes; rows are `stride` numbers apart. The depth is a multiple of
// the numbers in 64 bytes, and `a` has 16 or 32 rows to read.
template <class Add, class Number>
void MultiplyTiles(int64_t rows, const Number* a, int64_t stride, const Number* panel, int64_t depth, float* out,
                   Ahead ahead) {
  constexpr int kBytes = kPanel * sizeof(float);  // of a row of the panel's words and of the result
  constexpr int64_t kStep = 64 / sizeof(Number);
  const int64_t bytes = stride * sizeof(Number);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < depth; k += kStep) {
    ahead.Fetch(kStep);
    _tile_loadd(6, panel + k * kPanel, kBytes);
    _tile_loadd(7, panel + k * kPanel + kStep, kBytes);
    _tile_loadd(4, a + k, bytes);
    Add::AddUpper();
    if (rows <= 16) continue;
    _tile_loadd(5, a + 16 * stride + k, bytes);
    Add::AddLower();
  }
  _tile_stored(0, out, kBytes);
  _tile_stored(1, out + 16, kBytes);
  if (rows <= 16) return;
  _tile_stored(2, out + 16 * kPanel, kBytes);
  _tile_stored(3, out + 16 * kPanel + 16, kBytes);
}

struct TileBF16 : PairPanels, TileChunks {
  using Between = TileBF16;
  static constexpr int64_t kPacking = 100;
  static constexpr int64_t kFewRows = 0;

  static void Multiply(int64_t rows, const bf16* a, int64_t stride, const bf16* panel, int64_t depth, float* out,
                       Ahead ahead) {
    MultiplyTiles<PairTiles>(rows, a, stride, panel, depth, out, ahead);
  }
  static __m512 ToFloat(__m512 sum) { return sum; }
};

// int8 x int8 -> int32. What a number stands for is left to the caller.
struct TileI8 : FourPanels, TileChunks {
  using Between = TileBF16;
  static constexpr int64_t kPacking = 150;
  static constexpr int64_t kFewRows = 0;

  static void Multiply(int64_t rows, const int8_t* a, int64_t stride, const int8_t* panel, int64_t depth, float* out,
                       Ahead ahead) {
    MultiplyTiles<FourTiles>(rows, a, stride, panel, depth, out, ahead);
  }
  static __m512 ToFloat(__m512 sum) { return _mm512_cvtepi32_ps((__m512i)sum); }
};

}  // namespace bertjax
