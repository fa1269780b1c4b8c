// BERT's encoder, all layers in one call, as a custom call of XLA; inference only.
//
// What is computed is what bertjax/layers.py says; everything between two matrix products is float32. The steps are run
// by the threads of XLA's own pool.

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>

#include "attention.h"
#include "crew.h"
#include "matmul.h"
#include "memory.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace bertjax {
namespace {

namespace ffi = xla::ffi;

struct Sizes {
  int64_t layers, batch, length, hidden, intermediate, heads;
  float eps;
};

// Stacked over layers: kernels [in, out] and vectors.
template <class Source>
struct Parameters {
  const Source *query, *key, *value, *output, *up, *down;
  const float *query_bias, *key_bias, *value_bias, *output_bias, *up_bias, *down_bias;
  const float *attention_scale, *attention_shift, *output_scale, *output_shift;
};

// The rows of float32 numbers that one task of a cheap step takes.
constexpr int64_t kRowsPerTask = 16;

template <class Work>
void ForRows(Crew& crew, int64_t rows, const Work& work) {
  crew.Run((rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task) {
    const int64_t end = std::min(rows, (task + 1) * kRowsPerTask);
    for (int64_t row = task * kRowsPerTask; row < end; ++row) work(row);
  });
}

// LayerNorm of one row, in place; the variance in two passes, as E[x^2] - E[x]^2 cancels badly where the mean is large.
inline void LayerNorm(float* x, int64_t size, float eps, const float* scale, const float* shift) {
  __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
  for (int64_t j = 0; j < size; j += 16) sum = _mm512_add_ps(sum, Load(x + j));
  const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / size);
  for (int64_t j = 0; j < size; j += 16) {
    const __m512 off = _mm512_sub_ps(Load(x + j), mean);
    squares = _mm512_fmadd_ps(off, off, squares);
  }
  const __m512 inverse = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / size + eps));
  for (int64_t j = 0; j < size; j += 16) {
    const __m512 y = _mm512_mul_ps(_mm512_sub_ps(Load(x + j), mean), inverse);
    Store(x + j, _mm512_fmadd_ps(y, Load(scale + j), Load(shift + j)));
  }
}

// The activations of a call, and the steps of a layer on them.
template <class Way, class Source>
class Encoder {
 public:
  using T = typename Way::Type;

  Encoder(Crew& crew, const Sizes& sizes, const Segments& segments, Scratch& scratch)
      : crew_(crew), z_(sizes), segments_(segments), rows_(sizes.batch * sizes.length) {
    const int64_t room = RoundUp(rows_, kPanel);
    x_ = scratch.Get<float>(room * (stride() * (sizeof(float) + 5 * sizeof(T)) + wide_stride() * sizeof(T)));
    rounded_ = reinterpret_cast<T*>(x_ + room * stride());
    query_ = rounded_ + room * stride();
    key_ = query_ + room * stride();
    value_ = key_ + room * stride();
    context_ = value_ + room * stride();
    wide_ = context_ + room * stride();
    if constexpr (kSame) rounded_ = x_;
  }

  void Run(const float* in, const Parameters<Source>& p, float* out) {
    ForRows(crew_, rows_, [&](int64_t row) {
      std::memcpy(x_ + row * stride(), in + row * z_.hidden, z_.hidden * sizeof(float));
      Round(row);
    });
    for (int64_t layer = 0; layer < z_.layers; ++layer) Layer(p, layer);
    ForRows(crew_, rows_,
            [&](int64_t row) { std::memcpy(out + row * z_.hidden, x_ + row * stride(), z_.hidden * sizeof(float)); });
  }

 private:
  static constexpr bool kSame = std::is_same_v<T, float>;

  // Rows are followed by a gap: were they a multiple of 4096 bytes apart, a chunk's would compete for one set of the
  // first-level cache.
  int64_t stride() const { return z_.hidden + 32; }
  int64_t wide_stride() const { return z_.intermediate + 32; }

  void Layer(const Parameters<Source>& p, int64_t layer) {
    const int64_t square = layer * z_.hidden * z_.hidden, oblong = layer * z_.hidden * z_.intermediate;
    const int64_t vector = layer * z_.hidden, wide = layer * z_.intermediate;
    Project(p, square, vector);
    Attention<Way>(crew_, z_.batch, z_.length, z_.heads, z_.hidden / z_.heads, stride(), query_, key_, value_,
                   segments_, context_);
    Add(context_, stride(), z_.hidden, p.output + square, p.output_bias + vector);
    Norm(p.attention_scale + vector, p.attention_shift + vector);
    Widen(p.up + oblong, p.up_bias + wide);
    Add(wide_, wide_stride(), z_.intermediate, p.down + oblong, p.down_bias + vector);
    Norm(p.output_scale + vector, p.output_shift + vector);
  }

  // Queries, keys and values.
  void Project(const Parameters<Source>& p, int64_t square, int64_t vector) {
    const Source* kernels[] = {p.query + square, p.key + square, p.value + square};
    const float* biases[] = {p.query_bias + vector, p.key_bias + vector, p.value_bias + vector};
    T* results[] = {query_, key_, value_};
    MatMul<Way, Source>(crew_, rows_, z_.hidden, rounded_, stride(), kernels, 3, z_.hidden,
                        [&](int64_t which, int64_t row, int64_t j, __m512 sum) {
                          Store(results[which] + row * stride() + j, _mm512_add_ps(sum, Load(biases[which] + j)));
                        });
  }

  // The first half of the feed-forward block.
  void Widen(const Source* kernel, const float* bias) {
    MatMul<Way, Source>(crew_, rows_, z_.hidden, rounded_, stride(), &kernel, 1, z_.intermediate,
                        [&](int64_t, int64_t row, int64_t j, __m512 sum) {
                          Store(wide_ + row * wide_stride() + j, Gelu(_mm512_add_ps(sum, Load(bias + j))));
                        });
  }

  // Adds the output of a block to the residual stream.
  void Add(const T* from, int64_t from_stride, int64_t depth, const Source* kernel, const float* bias) {
    MatMul<Way, Source>(crew_, rows_, depth, from, from_stride, &kernel, 1, z_.hidden,
                        [&](int64_t, int64_t row, int64_t j, __m512 sum) {
                          float* to = x_ + row * stride() + j;
                          Store(to, _mm512_add_ps(_mm512_add_ps(sum, Load(bias + j)), Load(to)));
                        });
  }

  void Norm(const float* scale, const float* shift) {
    ForRows(crew_, rows_, [&](int64_t row) {
      LayerNorm(x_ + row * stride(), z_.hidden, z_.eps, scale, shift);
      Round(row);
    });
  }

  // What matrix products take of the residual stream.
  void Round(int64_t row) {
    if constexpr (!kSame) {
      const int64_t at = row * stride();
      for (int64_t j = 0; j < z_.hidden; j += 16) Store(rounded_ + at + j, Load(x_ + at + j));
    }
  }

  Crew& crew_;
  const Sizes& z_;
  const Segments& segments_;
  const int64_t rows_;
  float* x_;  // the residual stream
  T *rounded_, *query_, *key_, *value_, *context_, *wide_;
};

using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;

template <class Way, class Source>
ffi::Error Run(ffi::ThreadPool& pool, const Sizes& sizes, const Segments& segments, const float* in,
               const Parameters<Source>& parameters, float* out) {
  static thread_local Scratch scratch;
  try {
    Crew crew(pool);
    Encoder<Way, Source>(crew, sizes, segments, scratch).Run(in, parameters, out);
    scratch.Trim();
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "bertjax: no memory for the encoder's activations");
  }
  return ffi::Error::Success();
}

// `parameters` are in the order of `Parameters`: six kernels, float32 or bfloat16, and ten vectors, float32.
ffi::Error Call(ffi::ThreadPool pool, Floats x, Ints query_segments, Ints key_segments, ffi::RemainingArgs parameters,
                ffi::Result<Floats> y, int64_t heads, float eps, int64_t compute) {
  if (parameters.size() != 16) return ffi::Error(ffi::ErrorCode::kInvalidArgument, "bertjax: expected 16 parameters");
  const auto buffer = [&](size_t place) { return *parameters.get<ffi::AnyBuffer>(place); };
  const auto up = buffer(4).dimensions(), shape = x.dimensions();
  const Sizes sizes{up[0], shape[0], shape[1], shape[2], up[2], heads, eps};
  if (std::max(sizes.batch * heads, sizes.batch * sizes.length) >= Crew::kMostTasks) {
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, "bertjax: the batch has too many tokens for one call");
  }
  Segments segments{nullptr, nullptr};
  if (key_segments.element_count() != 0) segments = {query_segments.typed_data(), key_segments.typed_data()};
  const auto run = [&](auto way, auto source) {
    using Source = decltype(source);
    const auto kernel = [&](size_t place) { return static_cast<const Source*>(buffer(place).untyped_data()); };
    const auto vector = [&](size_t place) { return static_cast<const float*>(buffer(place).untyped_data()); };
    const Parameters<Source> p{kernel(0),  kernel(1),  kernel(2),  kernel(3), kernel(4),  kernel(5),
                               vector(6),  vector(7),  vector(8),  vector(9), vector(10), vector(11),
                               vector(12), vector(13), vector(14), vector(15)};
    return Run<decltype(way), Source>(pool, sizes, segments, x.typed_data(), p, y->typed_data());
  };
  const bool rounded = buffer(0).element_type() == ffi::BF16;
  if (compute == 0 && !rounded) return run(F32(), float());
  if (compute == 1 && !rounded) return run(BF16(), float());
  if (compute == 1) return run(BF16(), bf16());
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, "bertjax: bfloat16 kernels are multiplied in bfloat16 only");
}

}  // namespace
}  // namespace bertjax

// Linux lets a process use AMX's tiles once it has asked (ARCH_REQ_XCOMP_PERM, XTILEDATA). Returns 0 if it does.
extern "C" int bertjax_enable_amx() { return static_cast<int>(syscall(SYS_arch_prctl, 0x1023, 18)); }

XLA_FFI_DEFINE_HANDLER_SYMBOL(bertjax_encoder, bertjax::Call,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<bertjax::Floats>()
                                  .Arg<bertjax::Ints>()
                                  .Arg<bertjax::Ints>()
                                  .RemainingArgs()
                                  .Ret<bertjax::Floats>()
                                  .Attr<int64_t>("heads")
                                  .Attr<float>("eps")
                                  .Attr<int64_t>("compute"));
