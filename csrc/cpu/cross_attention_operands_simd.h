// What all kernels of cross_attention share at one instruction set: rows in and out of memory, and constants. As
// vec.h, included inside a namespace, without guard, by the files that foreach_isa.h compiles.
namespace cross_simd {

constexpr float kLowest = -3.402823466e38f; // below every logit, and finite: kLowest - kLowest is 0

// The heads of a token lie side by side, so that the rows of one head are far apart: fetched ahead by hand.
template <int kForWriting, typename Io>
RSK_INLINE void prefetch_ahead(const Io* row, int64_t stride, int64_t rows_left, int64_t dim) {
  constexpr int64_t kAhead = 24;
  if (rows_left <= kAhead) return;
  for (int64_t c = 0; c < dim; c += 64 / sizeof(Io)) __builtin_prefetch(row + kAhead * stride + c, kForWriting);
}

// Rows as they are.
template <typename Io, typename Operand>
inline void pack_rows(
    const Io* from, int64_t from_stride, int64_t rows, int64_t dim, Operand* to, int64_t to_stride) {
  for (int64_t r = 0; r < rows; ++r, from += from_stride, to += to_stride) {
    prefetch_ahead<0>(from, from_stride, rows - r, dim);
    for (int64_t c = 0; c < dim; c += kLanes) store(to + c, load_some(from + c, dim - c));
  }
}

// Rows as a right operand; rows that are missing from the last vector of lanes are zero. In bf16 pairs of rows.
template <typename Io>
inline void load_rows(
    const Io* from, int64_t from_stride, int64_t rows, int64_t dim, float* to, int64_t to_stride) {
  pack_rows(from, from_stride, rows, dim, to, to_stride);
  for (int64_t r = rows; r % kVector != 0; ++r) std::memset(to + r * to_stride, 0, to_stride * sizeof(float));
}

template <typename Io>
inline void load_rows(
    const Io* from, int64_t from_stride, int64_t rows, int64_t dim, c10::BFloat16* to, int64_t to_stride) {
  for (int64_t r = 0; r < (rows + kVector - 1) / kVector * kVector; r += 2) {
    for (int64_t i = r; i < r + 2; ++i) {
      prefetch_ahead<0>(from + i * from_stride, from_stride, rows - i, dim);
    }
    for (int64_t c = 0; c < dim; c += kLanes) {
      const Io* row = from + r * from_stride + c;
      const VecF even = r < rows ? load_some(row, dim - c) : VecF{};
      const VecF odd = r + 1 < rows ? load_some(row + from_stride, dim - c) : VecF{};
      store_pairs(to + r * to_stride + 2 * c, even, odd);
    }
  }
}

// Rows of `to` are columns of a right operand, (dim x lanes): in bf16 pairs of rows.
RSK_INLINE void store_square(float* to, int64_t lanes, const VecF (&square)[kLanes], int64_t rows) {
  for (int64_t i = 0; i < kLanes && i < rows; ++i) store(to + i * lanes, square[i]);
}

RSK_INLINE void store_square(c10::BFloat16* to, int64_t lanes, const VecF (&square)[kLanes], int64_t rows) {
  for (int64_t i = 0; i < kLanes && i < rows; i += 2) store_pairs(to + i * lanes, square[i], square[i + 1]);
}

// Rows, transposed, as a right operand; lanes beyond the last row are zero.
template <typename Io, typename Operand>
inline void load_columns(
    const Io* from, int64_t from_stride, int64_t rows, int64_t dim, Operand* to, int64_t lanes) {
  for (int64_t r = 0; r < lanes; r += kLanes) {
    for (int64_t i = r; i < r + kLanes; ++i)
      prefetch_ahead<0>(from + i * from_stride, from_stride, rows - i, dim);
    for (int64_t c = 0; c < dim; c += kLanes) {
      VecF square[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        square[i] = r + i < rows ? load_some(from + (r + i) * from_stride + c, dim - c) : VecF{};
      }
      transpose_square(square);
      // Pairs lie in one row of 2 * lanes values.
      store_square(to + c * lanes + (std::is_same_v<Operand, float> ? r : 2 * r), lanes, square, dim - c);
    }
  }
}

template <typename Io>
inline void write_rows(const float* from, int64_t from_stride, int64_t rows, int64_t dim, float factor, Io* to,
    int64_t to_stride) {
  for (int64_t r = 0; r < rows; ++r, from += from_stride, to += to_stride) {
    prefetch_ahead<1>(to, to_stride, rows - r, dim);
    for (int64_t c = 0; c < dim; c += kLanes) store_some(to + c, load(from + c) * factor, dim - c);
  }
}

// to[q][c] = from[c][q] * factors[q], square by square.
template <typename Io>
inline void write_columns(const float* from, int64_t lanes, int64_t dim, const float* factors, int64_t columns,
    Io* to, int64_t to_stride) {
  for (int64_t q = 0; q < columns; q += kLanes) {
    const VecF factor = load(factors + q);
    for (int64_t c = 0; c < dim; c += kLanes) {
      VecF square[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        square[i] = c + i < dim ? load(from + (c + i) * lanes + q) * factor : VecF{};
      }
      transpose_square(square);
      for (int i = 0; i < kLanes && q + i < columns; ++i) {
        store_some(to + (q + i) * to_stride + c, square[i], dim - c);
      }
    }
  }
}

// delta = do . out
template <typename Io>
inline void dot_rows(
    const Io* a, int64_t a_stride, const Io* b, int64_t b_stride, int64_t rows, int64_t dim, float* out) {
  for (int64_t r = 0; r < rows; ++r) out[r] = dot(a + r * a_stride, b + r * b_stride, dim);
}

// The natural logarithm of positive numbers; NaN stays NaN. With x = 2^e m, m near 1, s = (m - 1) / (m + 1):
// log m = 2 (s + s^3 / 3 + s^5 / 5 + ...). The same series as in distillation_loss_simd.h and as accurate, but other
// last bits for one argument in 4,000: neither can stand for the other.
RSK_INLINE VecF log(VecF x) {
  constexpr int32_t kHalfRoot = 0x3f3504f3; // sqrt(0.5)
  const VecI shifted = (VecI)x - kHalfRoot;
  const VecF exponent = __builtin_convertvector(shifted >> 23, VecF);
  const VecF m = (VecF)((shifted & 0x007fffff) + kHalfRoot);
  const VecF s = (m - 1.0f) / (m + 1.0f), s2 = s * s;
  VecF p = s2 * (2.0f / 9) + 2.0f / 7;
  p = p * s2 + 2.0f / 5;
  p = p * s2 + 2.0f / 3;
  return exponent * kLn2 + (s * 2.0f + s * s2 * p) + (x - x);
}

} // namespace cross_simd
