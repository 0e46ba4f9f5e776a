// Vector maths for one instruction set. Included by foreach_isa.h inside that set's namespace and target
// section, hence no include guard, no namespace and no includes. RSK_LEVEL is the level (isa.h) at hand.
//
// GCC's vector extension gives the arithmetic (+, -, *, comparisons, contraction to fused multiply-add);
// intrinsics appear only where it has no word for what the processor can do.

constexpr int kLanes = RSK_LEVEL >= 2 ? 16 : RSK_LEVEL == 1 ? 8 : 4;

typedef float VecF __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecU __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecH __attribute__((vector_size(kLanes * 2)));
// The same, wherever they lie in memory.
typedef float LooseF __attribute__((vector_size(kLanes * 4), aligned(2), may_alias));
typedef uint16_t LooseH __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

RSK_INLINE VecF splat(float x) {
  return x - VecF{};
}

RSK_INLINE VecF load(const float* p) {
  return *reinterpret_cast<const LooseF*>(p);
}

RSK_INLINE void store(float* p, VecF x) {
  *reinterpret_cast<LooseF*>(p) = x;
}

// The first n lanes, 0 <= n <= kLanes; the others are 0, their memory is not touched.
RSK_INLINE VecF load_first(const float* p, int64_t n) {
#if RSK_LEVEL >= 2
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
#else
  VecF x{};
  for (int lane = 0; lane < kLanes; ++lane) {
    if (lane < n) x[lane] = p[lane];
  }
  return x;
#endif
}

RSK_INLINE void store_first(float* p, VecF x, int64_t n) {
#if RSK_LEVEL >= 2
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), x);
#else
  for (int lane = 0; lane < kLanes; ++lane) {
    if (lane < n) p[lane] = x[lane];
  }
#endif
}

// The larger of the two, and y where either is NaN (what the processor's own instruction does).
RSK_INLINE VecF vmax(VecF x, VecF y) {
#if RSK_LEVEL >= 2
  return _mm512_maskz_max_ps(0xffff, x, y); // see exp2
#else
  return x > y ? x : y;
#endif
}

// x * y + z, rounded once where the processor can. For where that rounding is the point: elsewhere the compiler
// fuses by itself, but not a product that it has already.
RSK_INLINE VecF fused(VecF x, VecF y, VecF z) {
#if RSK_LEVEL >= 2
  return _mm512_fmadd_ps(x, y, z);
#elif RSK_LEVEL == 1
  return _mm256_fmadd_ps(x, y, z);
#else
  return x * y + z;
#endif
}

// 2^x, for inputs up to 127. -inf gives 0, NaN gives NaN. Relative error of degree 6: 2e-9, so that the result
// is rounded and no more; of 5: 1e-7; of 3: 1e-4, enough where the result is rounded to bf16. Minimax
// polynomials on [-0.5, 0.5] that are exact at 0: a factor of exp(0), applied again and again, must not drift.
template <int kDegree>
RSK_INLINE VecF exp2_polynomial(VecF f) {
  static_assert(kDegree == 3 || kDegree == 5 || kDegree == 6);
  if constexpr (kDegree == 3) {
    VecF p = f * 5.500893137e-02f + 2.422109615e-01f;
    p = p * f + 6.932829273e-01f;
    return p * f + 1.0f;
  } else if constexpr (kDegree == 6) {
    VecF p = f * 1.535336196e-04f + 1.339887502e-03f;
    p = p * f + 9.618436918e-03f;
    p = p * f + 5.550332367e-02f;
    p = p * f + 2.402264774e-01f;
    p = p * f + 6.931471825e-01f;
    return p * f + 1.0f;
  } else {
    VecF p = f * 1.326472724e-03f + 9.671512676e-03f;
    p = p * f + 5.550733743e-02f;
    p = p * f + 2.402224208e-01f;
    p = p * f + 6.931469776e-01f;
    return p * f + 1.0f;
  }
}

template <int kDegree>
RSK_INLINE VecF exp2(VecF x) {
#if RSK_LEVEL >= 2
  const VecF fraction = _mm512_reduce_ps(x, 0); // x - round(x); 0 for infinities
  // maskz: the plain forms make GCC 12 warn of its own header. The instructions are the same.
  const VecF whole = _mm512_maskz_roundscale_ps(0xffff, x, 0);
  return _mm512_maskz_scalef_ps(0xffff, exp2_polynomial<kDegree>(fraction), whole);
#else
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
  const VecF shift = splat(12582912.0f);
  const VecF clamped = x < -126.0f ? splat(-126.0f) : x; // keeps NaN
  const VecF shifted = clamped + shift;
  const VecF fraction = clamped - (shifted - shift);
  const VecF power = (VecF)(((VecI)shifted - (VecI)shift + 127) << 23);
  return x < -126.0f ? VecF{} : exp2_polynomial<kDegree>(fraction) * power;
#endif
}

RSK_INLINE VecF exp(VecF x) {
  return exp2<5>(x * kLog2e);
}

RSK_INLINE VecH load_bits(const c10::BFloat16* p) {
  return *reinterpret_cast<const LooseH*>(p);
}

RSK_INLINE VecH load_first_bits(const c10::BFloat16* p, int64_t n) {
#if RSK_LEVEL >= 2
  return (VecH)_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p);
#else
  c10::BFloat16 values[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) values[i] = p[i];
  return load_bits(values);
#endif
}

RSK_INLINE VecF widened(VecH bits) {
  return (VecF)(__builtin_convertvector(bits, VecU) << 16);
}

RSK_INLINE VecF load(const c10::BFloat16* p) {
  return widened(load_bits(p));
}

RSK_INLINE VecF load_first(const c10::BFloat16* p, int64_t n) {
  return widened(load_first_bits(p, n));
}

// Round to nearest even, as PyTorch does; the AVX-512 instruction takes denormal numbers for zero, though.
RSK_INLINE VecH to_bf16(VecF x) {
#if RSK_LEVEL >= 3
  return (VecH)_mm512_cvtneps_pbh(x);
#else
  const VecU bits = (VecU)x;
  const VecU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const VecU quiet_nan = (bits ^ bits) + 0x7fc0u;
  return __builtin_convertvector((VecU)(x == x ? (VecI)rounded : (VecI)quiet_nan), VecH);
#endif
}

RSK_INLINE void store(c10::BFloat16* p, VecF x) {
  *reinterpret_cast<LooseH*>(p) = to_bf16(x);
}

RSK_INLINE void store_first(c10::BFloat16* p, VecF x, int64_t n) {
#if RSK_LEVEL >= 2
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), (__m256i)to_bf16(x));
#else
  c10::BFloat16 values[kLanes];
  store(values, x);
  for (int64_t i = 0; i < n; ++i) p[i] = values[i];
#endif
}

// A whole vector, or its first n lanes where n < kLanes. kWhole: the caller knows that it is whole.
template <bool kWhole = false, typename Io>
RSK_INLINE VecF load_some(const Io* p, int64_t n) {
  if constexpr (kWhole) return load(p);
  return n >= kLanes ? load(p) : load_first(p, n);
}

template <bool kWhole = false, typename Io>
RSK_INLINE void store_some(Io* p, VecF x, int64_t n) {
  if constexpr (kWhole) return store(p, x);
  n >= kLanes ? store(p, x) : store_first(p, x, n);
}

// Pairs (even[i], odd[i]) in bf16, as products of bf16 tiles want their right operand.
RSK_INLINE void store_pairs(c10::BFloat16* p, VecF even, VecF odd) {
#if RSK_LEVEL >= 3
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
  const __m512i zip = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
      6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(zip, halves));
#else
  const VecU pairs = __builtin_convertvector(to_bf16(even), VecU) | __builtin_convertvector(to_bf16(odd), VecU)
                                                                        << 16;
  store(reinterpret_cast<float*>(p), (VecF)pairs);
#endif
}

// n values from one memory to another, converted.
template <typename From, typename To>
inline void copy_row(const From* from, To* to, int64_t n) {
  if constexpr (std::is_same_v<From, To>) {
    std::memcpy(to, from, n * sizeof(From));
  } else {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
    for (; i < n; ++i) to[i] = static_cast<To>(static_cast<float>(from[i]));
  }
}

inline float sum_lanes(VecF x) {
  float total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += x[lane];
  return total;
}

// Lanes from two vectors: lane i of the result is a[kPick(i)], or b's where that is kLanes or more.
template <int... kPick>
RSK_INLINE VecF shuffle(VecF a, VecF b, std::integer_sequence<int, kPick...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, kPick...);
#else
  return __builtin_shuffle(a, b, VecI{kPick...});
#endif
}

using EveryLane = std::make_integer_sequence<int, kLanes>;

// The largest lane, in all lanes; NaNs may get lost.
template <int kStep, int... kLane>
RSK_INLINE VecF exchange(VecF x, std::integer_sequence<int, kLane...>) {
  return shuffle(x, x, std::integer_sequence<int, (kLane ^ kStep)...>());
}

template <int kStep = kLanes / 2>
RSK_INLINE VecF largest_lane(VecF x) {
  x = vmax(x, exchange<kStep>(x, EveryLane()));
  if constexpr (kStep > 1) return largest_lane<kStep / 2>(x);
  return x;
}

// One butterfly stage of the transposition: in every square of 2 * kStep rows and lanes, swap the two
// quarters off the diagonal.
template <int kStep, int... kLane>
RSK_INLINE void swap_quarters(VecF& upper, VecF& lower, std::integer_sequence<int, kLane...>) {
  const VecF a = upper, b = lower;
  upper =
      shuffle(a, b, std::integer_sequence<int, ((kLane & kStep) == 0 ? kLane : kLanes + kLane - kStep)...>());
  lower =
      shuffle(a, b, std::integer_sequence<int, ((kLane & kStep) == 0 ? kLane + kStep : kLanes + kLane)...>());
}

template <int kStep = 1>
RSK_INLINE void transpose_square(VecF (&rows)[kLanes]) {
  if constexpr (kStep < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if ((i & kStep) == 0) swap_quarters<kStep>(rows[i], rows[i + kStep], EveryLane());
    }
    transpose_square<kStep * 2>(rows);
  }
}

// Lane i of the result: the sum of the lanes of rows[i], or the largest of them. A transposition that reduces as
// it goes.
template <bool kLargest, int kStep = 1>
RSK_INLINE VecF reduce_each(VecF (&rows)[kLanes]) {
  if constexpr (kStep < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i += 2 * kStep) {
      swap_quarters<kStep>(rows[i], rows[i + kStep], EveryLane());
      rows[i] = kLargest ? vmax(rows[i], rows[i + kStep]) : rows[i] + rows[i + kStep];
    }
    return reduce_each<kLargest, 2 * kStep>(rows);
  } else {
    return rows[0];
  }
}

RSK_INLINE VecF sum_each(VecF (&rows)[kLanes]) {
  return reduce_each<false>(rows);
}

RSK_INLINE VecF largest_each(VecF (&rows)[kLanes]) {
  return reduce_each<true>(rows);
}
