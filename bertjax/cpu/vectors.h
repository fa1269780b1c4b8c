// Sixteen float32 at a time: loads, stores, rounding to int8, exp2, GELU, and a transposition. Needs AVX-512.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <type_traits>

namespace bertjax {

using bf16 = uint16_t;

inline __m512 Load(const float* from) { return _mm512_loadu_ps(from); }
inline void Store(float* to, __m512 x) { _mm512_storeu_ps(to, x); }
inline void Store(bf16* to, __m512 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x));
}

inline __m512 Load(const bf16* from) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}

// Rounds a row to multiples of a 127th of its largest size, and returns that unit: it is no number if one of them is
// none. Numbers without a sign are 128 more. The width is a multiple of sixteen.
template <class From, class To>
float Quantize(const From* from, int64_t width, To* to) {
  const __m128i offset = _mm_set1_epi8(std::is_unsigned_v<To> ? -128 : 0);
  __m512 most = _mm512_setzero_ps(), zero = _mm512_setzero_ps();
  for (int64_t j = 0; j < width; j += 16) {
    const __m512 x = Load(from + j);
    most = _mm512_max_ps(most, _mm512_abs_ps(x));
    zero = _mm512_fmadd_ps(x, _mm512_setzero_ps(), zero);
  }
  const float largest = _mm512_reduce_max_ps(most);
  const __m512 inverse = _mm512_set1_ps(largest > 1e-30f ? 127.0f / largest : 0.0f);  // as in int8.py
  for (int64_t j = 0; j < width; j += 16) {
    const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(Load(from + j), inverse));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + j), _mm_xor_si128(_mm512_cvtsepi32_epi8(whole), offset));
  }
  return largest / 127.0f + _mm512_reduce_add_ps(zero);
}

// The first `count` of sixteen lanes; none if it is negative.
inline __mmask16 FirstLanes(int64_t count) {
  return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

template <int N>
inline __m512 Polynomial(__m512 x, const float (&coefficients)[N]) {  // the highest power first
  __m512 sum = _mm512_set1_ps(coefficients[0]);
  for (int i = 1; i < N; ++i) sum = _mm512_fmadd_ps(sum, x, _mm512_set1_ps(coefficients[i]));
  return sum;
}

// 2^x for x <= 0. The polynomial is a least-squares fit of 2^r on [-1/2, 1/2], with a relative error of 2e-9.
inline __m512 Exp2(__m512 x) {
  static constexpr float kPower[] = {
      1.53375775e-4f, 1.33998599e-3f, 9.61851981e-3f, 5.55032901e-2f, 2.40226462e-1f, 6.93147182e-1f, 1.0f};
  x = _mm512_max_ps(_mm512_set1_ps(-150.0f), x);  // in this order, what is no number stays none
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(Polynomial(_mm512_sub_ps(x, whole), kPower), whole);
}

// x Phi(x), the exact GELU. erf(z) = z P(z^2) / Q(z^2) for |z| <= 3.925, beyond which it is 1 in float32; P and Q are a
// reweighted least-squares fit with an error of 2e-8, to which float32 arithmetic adds 4e-7.
inline __m512 Gelu(__m512 x) {
  static constexpr float kAbove[] = {2.03097511e-6f, 2.87478324e-4f, 3.87571566e-3f,
                                     5.30824661e-2f, 1.92958266e-1f, 1.12837899f};
  static constexpr float kBelow[] = {3.80318306e-5f, 1.1896016e-3f,  1.51871322e-2f,
                                     1.15161553e-1f, 5.04336476e-1f, 1.0f};
  const __m512 end = _mm512_set1_ps(3.925f), half = _mm512_mul_ps(x, _mm512_set1_ps(0.5f));
  __m512 z = _mm512_mul_ps(x, _mm512_set1_ps(0.70710678f));
  z = _mm512_min_ps(_mm512_max_ps(z, _mm512_sub_ps(_mm512_setzero_ps(), end)), end);
  const __m512 square = _mm512_mul_ps(z, z);
  __m512 erf = _mm512_div_ps(_mm512_mul_ps(z, Polynomial(square, kAbove)), Polynomial(square, kBelow));
  erf = _mm512_max_ps(erf, _mm512_set1_ps(-1.0f));  // beyond it by rounding, it would leave some of a large x
  return _mm512_fmadd_ps(half, erf, half);
}

// Transposes 16 x 16 words of 32 bits; the strides are in words.
inline void Transpose(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride) {
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(from + i * from_stride);
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * to_stride, r[i]);
}

}  // namespace bertjax
