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
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "attention.h"
#include "crew.h"
#include "matmul.h"
#include "memory.h"
#include "registers.h"
#include "tiles.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace bertjax {
namespace {

namespace ffi = xla::ffi;

struct Sizes {
  int64_t layers, batch, length, hidden, intermediate, heads;
  float eps;
};

// Stacked over layers: kernels [in, out] and vectors. Kernels in int8 have a scale for every column.
template <class Source>
struct Parameters {
  const Source *query, *key, *value, *output, *up, *down;
  const float *query_bias, *key_bias, *value_bias, *output_bias, *up_bias, *down_bias;
  const float *attention_scale, *attention_shift, *output_scale, *output_shift;
  const float *query_unit, *key_unit, *value_unit, *output_unit, *up_unit, *down_unit;
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

// The tokens of a batch that are computed, row after row: all but padding, whose states nobody reads.
struct Tokens {
  std::vector<int64_t> places;  // where each one stands in the batch
  std::vector<int64_t> starts;  // of the rows' first ones, and the end
  std::vector<int32_t> numbers;
  Segments segments;

  // Padding is what has the number 0 among queries and keys alike; where these differ, all is computed.
  Tokens(int64_t batch, int64_t length, const Segments& given) : segments(given) {
    const size_t all = batch * length;
    const bool skip = given.key != nullptr && std::equal(given.key, given.key + all, given.query);
    for (int64_t row = 0; row < batch; ++row) {
      starts.push_back(places.size());
      for (int64_t at = row * length; at < (row + 1) * length; ++at) {
        if (!skip || given.query[at] != 0) places.push_back(at);
      }
    }
    starts.push_back(places.size());
    if (places.size() == all) return;
    for (const int64_t at : places) numbers.push_back(given.query[at]);
    segments = {numbers.data(), numbers.data()};
  }
  Tokens(const Tokens&) = delete;
  Tokens& operator=(const Tokens&) = delete;

  int64_t count() const { return places.size(); }
};

// The activations of a call, and the steps of a layer on them.
template <class Way, class Source>
class Encoder {
 public:
  using T = typename Way::Type;           // what matrix products read
  using U = typename Way::Between::Type;  // what they write, and what attention reads

  Encoder(Crew& crew, const Sizes& sizes, const Tokens& tokens, Scratch& scratch)
      : crew_(crew), z_(sizes), tokens_(tokens), rows_(tokens.count()) {
    const int64_t room = RoundUp(rows_, kPanel);
    const int64_t narrow = room * stride<float>() * sizeof(float), between = room * stride<U>() * sizeof(U);
    const int64_t wide = room * wide_stride<U>() * sizeof(U);
    const int64_t rounded = kSame ? 0 : room * stride<T>() * sizeof(T);
    const int64_t quantized = kUnits ? room * (wide_stride<T>() * sizeof(T) + sizeof(float)) : 0;
    char* next = scratch.Get<char>(narrow + 4 * between + wide + rounded + quantized);
    const auto take = [&](int64_t bytes) { return std::exchange(next, next + bytes); };
    x_ = reinterpret_cast<float*>(take(narrow));
    for (U** place : {&query_, &key_, &value_, &context_}) *place = reinterpret_cast<U*>(take(between));
    wide_ = reinterpret_cast<U*>(take(wide));
    if constexpr (!kSame) rounded_ = reinterpret_cast<T*>(take(rounded));
    if constexpr (kUnits) {
      rounded_wide_ = reinterpret_cast<T*>(take(room * wide_stride<T>() * sizeof(T)));
      units_ = reinterpret_cast<float*>(take(room * sizeof(float)));
    }
  }

  // [batch, length, hidden] to the same; zero at padding.
  void Run(const float* in, const Parameters<Source>& p, float* out) {
    ForRows(crew_, rows_, [&](int64_t row) {
      std::memcpy(x_ + row * stride<float>(), in + tokens_.places[row] * z_.hidden, z_.hidden * sizeof(float));
      RoundState(row);
    });
    for (int64_t layer = 0; rows_ > 0 && layer < z_.layers; ++layer) Layer(p, layer);
    if (rows_ < z_.batch * z_.length) std::memset(out, 0, z_.batch * z_.length * z_.hidden * sizeof(float));
    ForRows(crew_, rows_, [&](int64_t row) {
      std::memcpy(out + tokens_.places[row] * z_.hidden, x_ + row * stride<float>(), z_.hidden * sizeof(float));
    });
  }

 private:
  static constexpr bool kSame = std::is_same_v<T, float>, kUnits = sizeof(T) == 1;

  // Rows are followed by a gap: were they a multiple of 4096 bytes apart, a chunk's would compete for one set of the
  // first-level cache.
  template <class Number>
  int64_t stride() const {
    return z_.hidden + std::max<int64_t>(32, 64 / sizeof(Number));
  }
  template <class Number>
  int64_t wide_stride() const {
    return stride<Number>() - z_.hidden + z_.intermediate;
  }

  void Layer(const Parameters<Source>& p, int64_t layer) {
    const int64_t square = layer * z_.hidden * z_.hidden, oblong = layer * z_.hidden * z_.intermediate;
    const int64_t vector = layer * z_.hidden, wide = layer * z_.intermediate;
    Project(p, square, vector);
    Attention<typename Way::Between>(crew_, tokens_.starts, z_.heads, z_.hidden / z_.heads, stride<U>(), query_, key_,
                                     value_, tokens_.segments, context_);
    Add(Rounded(context_, stride<U>(), z_.hidden, rounded_, stride<T>()), stride<T>(), z_.hidden, p.output + square,
        p.output_bias + vector, p.output_unit + vector);
    Norm(p.attention_scale + vector, p.attention_shift + vector);
    Widen(p.up + oblong, p.up_bias + wide, p.up_unit + wide);
    Add(Rounded(wide_, wide_stride<U>(), z_.intermediate, rounded_wide_, wide_stride<T>()), wide_stride<T>(),
        z_.intermediate, p.down + oblong, p.down_bias + vector, p.down_unit + vector);
    Norm(p.output_scale + vector, p.output_shift + vector);
  }

  // Queries, keys and values.
  void Project(const Parameters<Source>& p, int64_t square, int64_t vector) {
    const Source* kernels[] = {p.query + square, p.key + square, p.value + square};
    const float* biases[] = {p.query_bias + vector, p.key_bias + vector, p.value_bias + vector};
    const float* units[] = {p.query_unit + vector, p.key_unit + vector, p.value_unit + vector};
    U* results[] = {query_, key_, value_};
    MatMul<Way, Source>(crew_, rows_, z_.hidden, State(), stride<T>(), kernels, 3, z_.hidden,
                        [&](int64_t which, int64_t row, int64_t j, __m512 sum) {
                          Store(results[which] + row * stride<U>() + j,
                                Biased(sum, row, biases[which] + j, units[which] + j));
                        });
  }

  // The first half of the feed-forward block.
  void Widen(const Source* kernel, const float* bias, const float* unit) {
    MatMul<Way, Source>(crew_, rows_, z_.hidden, State(), stride<T>(), &kernel, 1, z_.intermediate,
                        [&](int64_t, int64_t row, int64_t j, __m512 sum) {
                          Store(wide_ + row * wide_stride<U>() + j, Gelu(Biased(sum, row, bias + j, unit + j)));
                        });
  }

  // Adds the output of a block to the residual stream.
  void Add(const T* from, int64_t from_stride, int64_t depth, const Source* kernel, const float* bias,
           const float* unit) {
    MatMul<Way, Source>(crew_, rows_, depth, from, from_stride, &kernel, 1, z_.hidden,
                        [&](int64_t, int64_t row, int64_t j, __m512 sum) {
                          float* to = x_ + row * stride<float>() + j;
                          Store(to, _mm512_add_ps(Biased(sum, row, bias + j, unit + j), Load(to)));
                        });
  }

  void Norm(const float* scale, const float* shift) {
    ForRows(crew_, rows_, [&](int64_t row) {
      LayerNorm(x_ + row * stride<float>(), z_.hidden, z_.eps, scale, shift);
      RoundState(row);
    });
  }

  // A sum in its units, plus the bias.
  __m512 Biased(__m512 sum, int64_t row, const float* bias, const float* unit) const {
    if constexpr (kUnits)
      return _mm512_fmadd_ps(_mm512_mul_ps(sum, _mm512_set1_ps(units_[row])), Load(unit), Load(bias));
    return _mm512_add_ps(sum, Load(bias));
  }

  // What matrix products take of the residual stream.
  const T* State() const {
    if constexpr (kSame) {
      return x_;
    } else {
      return rounded_;
    }
  }
  void RoundState(int64_t row) {
    if constexpr (!kSame) RoundRow(x_ + row * stride<float>(), z_.hidden, rounded_ + row * stride<T>(), row);
  }

  // What they take of what other products wrote.
  const T* Rounded(const U* from, int64_t from_stride, int64_t width, T* to, int64_t to_stride) {
    if constexpr (std::is_same_v<T, U>) {
      return from;
    } else {
      ForRows(crew_, rows_, [&](int64_t row) { RoundRow(from + row * from_stride, width, to + row * to_stride, row); });
      return to;
    }
  }
  template <class From>
  void RoundRow(const From* from, int64_t width, T* to, int64_t row) {
    if constexpr (kUnits) {
      units_[row] = Quantize(from, width, to);
    } else {
      for (int64_t j = 0; j < width; j += 16) Store(to + j, Load(from + j));
    }
  }

  Crew& crew_;
  const Sizes& z_;
  const Tokens& tokens_;
  const int64_t rows_;
  float* x_;  // the residual stream
  U *query_, *key_, *value_, *context_, *wide_;
  T *rounded_ = nullptr, *rounded_wide_ = nullptr;
  float* units_ = nullptr;  // of the rows that were rounded last
};

using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;

template <class Way, class Source>
ffi::Error Run(ffi::ThreadPool& pool, const Sizes& sizes, const Segments& segments, const float* in,
               const Parameters<Source>& parameters, float* out) {
  static thread_local Scratch scratch;
  try {
    Crew crew(pool);
    const Tokens tokens(sizes.batch, sizes.length, segments);
    Encoder<Way, Source>(crew, sizes, tokens, scratch).Run(in, parameters, out);
    scratch.Trim();
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "bertjax: no memory for the encoder's activations");
  }
  return ffi::Error::Success();
}

// Whether parameters are what `Parameters` has, in its order: six kernels, float32, bfloat16 or int8, and ten vectors,
// float32; to kernels in int8 belong six more.
bool Fit(const ffi::RemainingArgs& parameters, const Sizes& sizes) {
  const auto stored = parameters.get<ffi::AnyBuffer>(0)->element_type();
  if (parameters.size() != (stored == ffi::S8 ? 22 : 16)) return false;
  for (size_t place = 0; place < parameters.size(); ++place) {
    const auto buffer = *parameters.get<ffi::AnyBuffer>(place);
    const bool kernel = place < 6, wide = place == 4 || place == 5 || place == 10 || place == 20;
    const int64_t width = wide ? sizes.intermediate : sizes.hidden;
    const int64_t count = sizes.layers * width * (kernel ? sizes.hidden : 1);
    if (buffer.element_type() != (kernel ? stored : ffi::F32)) return false;
    if (static_cast<int64_t>(buffer.element_count()) != count) return false;
  }
  return true;
}

// Whether sizes are multiples of what the ways work on at once.
bool Divisible(const Sizes& sizes, int64_t way) {
  const int64_t block = way >= 3 ? 64 : kPanel;
  return sizes.heads > 0 && sizes.hidden % (sizes.heads * kPanel) == 0 && sizes.hidden % block == 0 &&
         sizes.intermediate % block == 0;
}

// What is wrong with the buffers of a call, or null; the other arguments are right.
const char* Problem(const Sizes& sizes, int64_t way, const Ints& query_segments, const Ints& key_segments,
                    const ffi::RemainingArgs& parameters) {
  const int64_t tokens = sizes.batch * sizes.length, numbers = key_segments.element_count();
  if (std::max(sizes.batch * sizes.heads, tokens) >= Crew::kMostTasks) return "too many tokens for one call";
  if (!Divisible(sizes, way)) return "sizes that are no multiples of a block";
  if (!Fit(parameters, sizes)) return "parameters of a wrong number, size or dtype";
  const bool alike = static_cast<int64_t>(query_segments.element_count()) == numbers;
  if (!alike || (numbers != 0 && numbers != tokens)) return "segments that are not those of its tokens";
  return nullptr;
}

ffi::Error Refuse(const char* what) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, std::string("bertjax: the encoder was called with ") + what);
}

// x is [batch, length, hidden], as y is. Segments are [batch, length], or both empty where there are none.
ffi::Error Call(ffi::ThreadPool pool, Floats x, Ints query_segments, Ints key_segments, ffi::RemainingArgs parameters,
                ffi::Result<Floats> y, int64_t heads, float eps, int64_t way) {
  if (parameters.size() < 16) return Refuse("too few parameters");
  const auto buffer = [&](size_t place) { return *parameters.get<ffi::AnyBuffer>(place); };
  const auto up = buffer(4).dimensions(), shape = x.dimensions();
  if (shape.size() != 3 || up.size() != 3) return Refuse("states or kernels that don't have three dimensions");
  if (y->element_count() != x.element_count()) return Refuse("a result of another size than its states");
  const Sizes sizes{up[0], shape[0], shape[1], shape[2], up[2], heads, eps};
  const char* problem = Problem(sizes, way, query_segments, key_segments, parameters);
  if (problem != nullptr) return Refuse(problem);
  Segments segments{nullptr, nullptr};
  if (key_segments.element_count() != 0) segments = {query_segments.typed_data(), key_segments.typed_data()};
  const auto run = [&](auto way, auto source) {
    using Source = decltype(source);
    const auto kernel = [&](size_t place) { return static_cast<const Source*>(buffer(place).untyped_data()); };
    const auto vector = [&](size_t place) -> const float* {
      return place < parameters.size() ? static_cast<const float*>(buffer(place).untyped_data()) : nullptr;
    };
    const Parameters<Source> p{kernel(0),  kernel(1),  kernel(2),  kernel(3),  kernel(4),  kernel(5),
                               vector(6),  vector(7),  vector(8),  vector(9),  vector(10), vector(11),
                               vector(12), vector(13), vector(14), vector(15), vector(16), vector(17),
                               vector(18), vector(19), vector(20), vector(21)};
    return Run<decltype(way), Source>(pool, sizes, segments, x.typed_data(), p, y->typed_data());
  };
  // The numbers are those of `Way` in library.py.
  const auto stored = buffer(0).element_type();
  if (way == 0 && stored == ffi::F32) return run(F32(), float());
  if (way == 1 && stored == ffi::F32) return run(TileBF16(), float());
  if (way == 1 && stored == ffi::BF16) return run(TileBF16(), bf16());
  if (way == 2 && stored == ffi::F32) return run(DotBF16(), float());
  if (way == 2 && stored == ffi::BF16) return run(DotBF16(), bf16());
  if (way == 3 && stored == ffi::S8) return run(TileI8(), int8_t());
  if (way == 4 && stored == ffi::S8) return run(DotI8<DotBF16>(), int8_t());
  if (way == 5 && stored == ffi::S8) return run(DotI8<F32>(), int8_t());
  return Refuse("kernels of a dtype that it does not multiply like that");
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
                                  .Attr<int64_t>("way"));
