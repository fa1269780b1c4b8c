// Matrix products, by many threads.
//
// The right-hand side is repacked into panels of 32 columns, a block of which stays in the second-level cache; the
// left-hand side is read as it is, a chunk of rows at a time. (Goto and van de Geijn, Anatomy of high-performance
// matrix multiplication, 2008.) registers.h and tiles.h have the ways to multiply, which have the same members.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "crew.h"
#include "memory.h"
#include "panels.h"
#include "stream.h"

namespace bertjax {

// The way's state on this thread, as long as this lives: AMX has one.
template <class Way>
struct Prepared {
  Prepared() { Way::Begin(); }
  ~Prepared() { Way::End(); }
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
// numbers of the results to finish(product, row, column, numbers). Sums are float32 and run over the depth in one
// order, so that in float32 a row's result hardly depends on the others; for a few rows the order is another one, and
// depends on the number of threads.
template <class Way, class Source, class Finish>
void MatMul(Crew& crew, int64_t rows, int64_t depth, const typename Way::Type* a, int64_t stride,
            const Source* const* kernels, int64_t products, int64_t columns, const Finish& finish) {
  using T = typename Way::Type;
  if constexpr (Way::kFewRows > 0) {
    if (rows <= Way::kFewRows) {
      return StreamMatMul<Way>(crew, rows, depth, a, stride, kernels, products, columns, finish);
    }
  }
  const Division d = Division::Of(products, rows, depth, columns, sizeof(T), Way::kPacking, crew.threads);
  const int64_t size = Way::Size(depth);
  crew.Run(products * d.blocks * d.parts, [&](int64_t task) {
    const int64_t product = task / (d.blocks * d.parts), part = task % d.parts;
    const int64_t first = task / d.parts % d.blocks * d.block, last = std::min(columns, first + d.block);
    T* panels = PanelScratch().template Get<T>((last - first) / kPanel * size * sizeof(T));
    Way::Pack(kernels[product] + first, columns, depth, last - first, panels);
    alignas(64) float out[kPanel * kPanel];
    const Prepared<Way> prepared;
    const int64_t chunks = Way::Chunks(rows);
    for (int64_t chunk = chunks * part / d.parts; chunk < chunks * (part + 1) / d.parts; ++chunk) {
      const int64_t begin = Way::FirstRow(chunk, rows), end = Way::FirstRow(chunk + 1, rows);
      for (int64_t j = first; j < last; j += kPanel) {
        // The next chunk, a part with each panel: it comes from afar, and nothing else would fetch it in time.
        const Ahead next = Ahead::Part(a + end * stride, (end - begin) * stride * sizeof(T), (j - first) / kPanel,
                                       (last - first) / kPanel, depth);
        Way::Multiply(end - begin, a + begin * stride, stride, panels + (j - first) / kPanel * size, depth, out, next);
        for (int64_t row = begin; row < end; ++row) {
          const float* sums = out + (row - begin) * kPanel;
          finish(product, row, j, Way::ToFloat(_mm512_load_ps(sums)));
          finish(product, row, j + 16, Way::ToFloat(_mm512_load_ps(sums + 16)));
        }
      }
    }
  });
}

}  // namespace bertjax
