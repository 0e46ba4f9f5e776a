// The three thin products of LoRA for one instruction set: ranks are few, rows and columns many, so each reads
// its large operand once, at the speed of memory. Included by foreach_isa.h.
//
// Columns go by whole vectors; what is missing from the last one counts as zeros. Factors and sums are ranks x
// columns, padded with zeros to kPadding columns and blocks of kRankPadding ranks. Reads of coefficients run up
// to kLanes values past their end.

typedef uint32_t LooseU __attribute__((vector_size(kLanes * 4), aligned(2), may_alias));

// Neighbours of one row, two to a lane.
template <bool kTail>
RSK_INLINE VecU load_pairs(const c10::BFloat16* p, int64_t n) {
  if constexpr (kTail) {
    if (n < 2 * kLanes) {
      c10::BFloat16 some[2 * kLanes] = {};
      if (n > 0) std::memcpy(some, p, n * sizeof(c10::BFloat16));
      return *reinterpret_cast<const LooseU*>(some);
    }
  }
  return *reinterpret_cast<const LooseU*>(p);
}

// The raw bits of what load_some gives.
template <bool kWhole>
RSK_INLINE VecH load_some_bits(const c10::BFloat16* p, int64_t n) {
  if constexpr (kWhole) return load_bits(p);
  return n >= kLanes ? load_bits(p) : load_first_bits(p, n);
}

// sum + a.low * b.low + a.high * b.high
RSK_INLINE VecF add_pair_products(VecF sum, VecU a, VecU b) {
#if RSK_LEVEL >= 3
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
  return sum + (VecF)(a << 16) * (VecF)(b << 16) + (VecF)(a & 0xffff0000u) * (VecF)(b & 0xffff0000u);
#endif
}

constexpr int kRankBlock = kRankPadding, kDotRows = kLanes / kRankBlock;

// kDotRows x kRankBlock dot products of n columns, one in each lane.
template <typename Io, typename Operand>
RSK_INLINE VecF dot_square(
    const Io* const (&rows)[kDotRows], int64_t n, const Operand* factors, int64_t factor_stride) {
  constexpr bool kPairs = !std::is_same_v<Operand, float>;
  constexpr int64_t kStep = kPairs ? 2 * kLanes : kLanes;
  VecF sums[kLanes] = {};
  int64_t c = 0;
  for (; c + kStep <= n; c += kStep) {
#pragma GCC unroll 4
    for (int r = 0; r < kRankBlock; ++r) {
      const Operand* factor = factors + r * factor_stride + c;
#pragma GCC unroll 4
      for (int i = 0; i < kDotRows; ++i) {
        VecF& sum = sums[i * kRankBlock + r];
        if constexpr (kPairs) {
          sum = add_pair_products(sum, load_pairs<false>(rows[i] + c, 0), load_pairs<false>(factor, 0));
        } else {
          sum += load(rows[i] + c) * load(factor);
        }
      }
    }
  }
  if (c < n) {
    for (int r = 0; r < kRankBlock; ++r) {
      const Operand* factor = factors + r * factor_stride + c;
      for (int i = 0; i < kDotRows; ++i) {
        VecF& sum = sums[i * kRankBlock + r];
        if constexpr (kPairs) {
          sum = add_pair_products(sum, load_pairs<true>(rows[i] + c, n - c), load_pairs<false>(factor, 0));
        } else {
          sum += load_first(rows[i] + c, n - c) * load(factor);
        }
      }
    }
  }
  transpose_square(sums);
  VecF total = sums[0];
#pragma GCC unroll 16
  for (int lane = 1; lane < kLanes; ++lane) total += sums[lane];
  return total;
}

// out[row][r] = scale * (the sum over columns of x[row][c] * factors[r][c])
template <typename Io, typename Operand>
inline void project(const Io* x, int64_t x_stride, int64_t count, int64_t n, const Operand* factors,
    int64_t factor_stride, int64_t ranks, float scale, float* out, int64_t out_stride) {
  for (int64_t first = 0; first < count; first += kDotRows) {
    const Io* rows[kDotRows];
    for (int i = 0; i < kDotRows; ++i) {
      const int64_t row = first + i < count ? first + i : count - 1;
      rows[i] = x + row * x_stride;
    }
    for (int64_t r = 0; r < ranks; r += kRankBlock) {
      alignas(64) float dots[kLanes];
      store(dots, dot_square(rows, n, factors + r * factor_stride, factor_stride) * scale);
      for (int i = 0; i < kDotRows && first + i < count; ++i) {
        std::memcpy(out + (first + i) * out_stride + r, dots + i * kRankBlock, kRankBlock * sizeof(float));
      }
    }
  }
}

// Accumulators of the two products below: half of the registers, at most.
constexpr int kAccumulators = kLanes == 16 ? 16 : 8;
constexpr int kUpdateRows = 4, kUpdateVectors = kAccumulators / kUpdateRows;

template <int kRows, bool kTail, typename Io, typename Operand>
RSK_INLINE void update_strip(const Io* from, int64_t from_stride, Io* to, int64_t to_stride, int64_t n,
    const Operand* coefficients, int64_t coefficient_stride, const Operand* factors, int64_t factor_stride,
    int64_t ranks) {
  constexpr int kTogether = std::is_same_v<Operand, float> ? 1 : 2; // ranks
  VecF products[kRows][kUpdateVectors] = {};
  for (int64_t r = 0; r < ranks; r += kTogether) {
    const Operand* factor = factors + r * factor_stride;
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const Operand* coefficient = coefficients + i * coefficient_stride + r;
#pragma GCC unroll 4
      for (int v = 0; v < kUpdateVectors; ++v) {
        VecF& product = products[i][v];
        if constexpr (kTogether == 2) {
          uint32_t pair;
          std::memcpy(&pair, coefficient, sizeof(pair));
          product = add_pair_products(product, pair + VecU{}, load_pairs<false>(factor + v * 2 * kLanes, 0));
        } else {
          product += splat(*coefficient) * load(factor + v * kLanes);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kUpdateVectors; ++v) {
      const int64_t left = std::max<int64_t>(n - v * kLanes, 0);
      const VecF value = load_some<!kTail>(from + i * from_stride + v * kLanes, left) + products[i][v];
      store_some<!kTail>(to + i * to_stride + v * kLanes, value, left);
    }
  }
}

template <int kRows, typename Io, typename Operand>
inline void update_rows(const Io* from, int64_t from_stride, Io* to, int64_t to_stride, int64_t n,
    const Operand* coefficients, int64_t coefficient_stride, const Operand* factors, int64_t factor_stride,
    int64_t ranks) {
  constexpr int64_t kStep = kUpdateVectors * kLanes;
  constexpr int64_t kWide = std::is_same_v<Operand, float> ? 1 : 2; // values of a column in `factors`
  int64_t c = 0;
  for (; c + kStep <= n; c += kStep) {
    update_strip<kRows, false>(from + c, from_stride, to + c, to_stride, n, coefficients, coefficient_stride,
        factors + kWide * c, factor_stride, ranks);
  }
  if (c < n) {
    update_strip<kRows, true>(from + c, from_stride, to + c, to_stride, n - c, coefficients, coefficient_stride,
        factors + kWide * c, factor_stride, ranks);
  }
}

// to[row][c] = from[row][c] + the sum over r of coefficients[row][r] * factors[r][c]. bf16 factors are paired
// (lora.h). The sum is formed first, so that a sum of zeros changes no value.
template <typename Io, typename Operand>
inline void update(const Io* from, int64_t from_stride, Io* to, int64_t to_stride, int64_t count, int64_t n,
    const Operand* coefficients, int64_t coefficient_stride, const Operand* factors, int64_t factor_stride,
    int64_t ranks) {
  int64_t row = 0;
  for (; row + kUpdateRows <= count; row += kUpdateRows) {
    update_rows<kUpdateRows>(from + row * from_stride, from_stride, to + row * to_stride, to_stride, n,
        coefficients + row * coefficient_stride, coefficient_stride, factors, factor_stride, ranks);
  }
  for (; row < count; ++row) {
    update_rows<1>(from + row * from_stride, from_stride, to + row * to_stride, to_stride, n,
        coefficients + row * coefficient_stride, coefficient_stride, factors, factor_stride, ranks);
  }
}

template <int kRanks, int kVectors, bool kTail, typename Io, typename Operand>
RSK_INLINE void gather_strip(const Io* x, int64_t x_stride, int64_t count, int64_t n, const float* coefficients,
    int64_t coefficient_stride, const c10::BFloat16* pairs, float* sums, int64_t sum_stride) {
  VecF totals[kRanks][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRanks; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) totals[r][v] = load(sums + r * sum_stride + v * kLanes);
  }
  if constexpr (std::is_same_v<Operand, float>) {
    for (int64_t row = 0; row < count; ++row) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const int64_t left = std::max<int64_t>(n - v * kLanes, 0);
        const VecF values = load_some<!kTail>(x + row * x_stride + v * kLanes, left);
#pragma GCC unroll 8
        for (int r = 0; r < kRanks; ++r) {
          totals[r][v] += values * splat(coefficients[row * coefficient_stride + r]);
        }
      }
    }
  } else {
    for (int64_t row = 0; row < count; row += 2) {
      const int64_t odd = row + 1 < count ? row + 1 : row; // without a partner its coefficient is 0
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const int64_t left = std::max<int64_t>(n - v * kLanes, 0);
        const VecH low = load_some_bits<!kTail>(x + row * x_stride + v * kLanes, left);
        VecH high = load_some_bits<!kTail>(x + odd * x_stride + v * kLanes, left);
        if (odd == row) high = VecH{}; // zeros: 0 times a NaN is not 0
        const VecU values = __builtin_convertvector(low, VecU) | __builtin_convertvector(high, VecU) << 16;
#pragma GCC unroll 8
        for (int r = 0; r < kRanks; ++r) {
          uint32_t pair;
          std::memcpy(&pair, pairs + row * kLanes + 2 * r, sizeof(pair));
          totals[r][v] = add_pair_products(totals[r][v], values, pair + VecU{});
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRanks; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(sums + r * sum_stride + v * kLanes, totals[r][v]);
  }
}

template <int kRanks, typename Io, typename Operand>
inline void gather_ranks(const Io* x, int64_t x_stride, int64_t count, int64_t n, const float* coefficients,
    int64_t coefficient_stride, float* sums, int64_t sum_stride) {
  constexpr int kVectors = kAccumulators / kRanks;
  constexpr int64_t kStep = kVectors * kLanes;
  // The coefficients of two rows side by side, kLanes ranks of them (what follows the block is not used).
  c10::BFloat16 pairs[kRowGroup * kLanes];
  if constexpr (!std::is_same_v<Operand, float>) {
    for (int64_t row = 0; row < count; row += 2) {
      const float* even = coefficients + row * coefficient_stride;
      const VecF odd = row + 1 < count ? load(even + coefficient_stride) : VecF{};
      store_pairs(pairs + row * kLanes, load(even), odd);
    }
  }
  int64_t c = 0;
  for (; c + kStep <= n; c += kStep) {
    gather_strip<kRanks, kVectors, false, Io, Operand>(
        x + c, x_stride, count, n, coefficients, coefficient_stride, pairs, sums + c, sum_stride);
  }
  if (c < n) {
    gather_strip<kRanks, kVectors, true, Io, Operand>(
        x + c, x_stride, count, n - c, coefficients, coefficient_stride, pairs, sums + c, sum_stride);
  }
}

// sums[r][c] += the sum over `count` <= kRowGroup rows of coefficients[row][r] * x[row][c]
template <typename Io, typename Operand>
inline void gather(const Io* x, int64_t x_stride, int64_t count, int64_t n, const float* coefficients,
    int64_t coefficient_stride, int64_t ranks, float* sums, int64_t sum_stride) {
  int64_t r = 0;
  for (; r + 8 <= ranks; r += 8) {
    gather_ranks<8, Io, Operand>(
        x, x_stride, count, n, coefficients + r, coefficient_stride, sums + r * sum_stride, sum_stride);
  }
  if (r < ranks) {
    gather_ranks<4, Io, Operand>(
        x, x_stride, count, n, coefficients + r, coefficient_stride, sums + r * sum_stride, sum_stride);
  }
}

template <typename Io, typename Operand>
inline constexpr LoraKernels<Io, Operand> kLoraKernels = {
    project<Io, Operand>, write_row<Operand>, update<Io, Operand>, gather<Io, Operand>};
