// Operands of tile products, rearranged as tile.h wants them. For the files that foreach_isa.h compiles once per
// instruction set: like vec.h, included inside a namespace, without guard and without includes.
//
// Transpositions go by whole squares: they may read and write up to 15 values past the end of a row, and rows
// that are missing from the last square count as zeros. Every buffer of ours has room for it.
RSK_INLINE void load_square(
    const float* from, int64_t stride, const int64_t* shift, int64_t rows, VecF (&square)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    square[i] = i < rows ? load(from + i * stride + (shift ? shift[i] : 0)) : VecF{};
  }
}

// to[c][r] = from[r][c + shift[r]]
inline void transpose(const float* from, int64_t from_stride, const int64_t* shift, int64_t rows,
    int64_t columns, float* to, int64_t to_stride) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    for (int64_t c = 0; c < columns; c += kLanes) {
      VecF square[kLanes];
      load_square(from + r * from_stride + c, from_stride, shift ? shift + r : nullptr, rows - r, square);
      transpose_square(square);
      for (int64_t i = 0; i < kLanes && c + i < columns; ++i) store(to + (c + i) * to_stride + r, square[i]);
    }
  }
}

// to[c][r + shift[c]] = from[r][c]
inline void transpose_into_shifted(const float* from, int64_t from_stride, int64_t rows, int64_t columns,
    float* to, int64_t to_stride, const int64_t* shift) {
  for (int64_t c = 0; c < columns; c += kLanes) {
    for (int64_t r = 0; r < rows; r += kLanes) {
      VecF square[kLanes];
      load_square(from + r * from_stride + c, from_stride, nullptr, rows - r, square);
      transpose_square(square);
      for (int64_t i = 0; i < kLanes && c + i < columns; ++i) {
        store(to + (c + i) * to_stride + r + shift[c + i], square[i]);
      }
    }
  }
}

// Rows as a right operand, transposed: in bf16 pairs of columns travel together.
inline void transpose_right(
    const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to, int64_t to_stride) {
  transpose(from, from_stride, nullptr, rows, columns, to, to_stride);
}

inline void transpose_right(const c10::BFloat16* from, int64_t from_stride, int64_t rows, int64_t columns,
    c10::BFloat16* to, int64_t to_stride) {
  transpose(reinterpret_cast<const float*>(from), from_stride / 2, nullptr, rows, (columns + 1) / 2,
      reinterpret_cast<float*>(to), to_stride);
}

// Rows as a right operand: fp32 as they are (returned as given), bf16 in pairs of rows.
inline const float* pair_rows(const float* from, int64_t, int64_t, float*) {
  return from;
}

// Pairs of bf16 numbers as they are.
RSK_INLINE void store_pairs(c10::BFloat16* p, VecH even, VecH odd) {
  store(reinterpret_cast<float*>(p),
      (VecF)(__builtin_convertvector(even, VecU) | __builtin_convertvector(odd, VecU) << 16));
}

inline const c10::BFloat16* pair_rows(
    const c10::BFloat16* from, int64_t stride, int64_t rows, c10::BFloat16* to) {
  for (int64_t r = 0; r < rows; r += 2) {
    for (int64_t c = 0; c < stride; c += kLanes) {
      const c10::BFloat16* even = from + r * stride + c;
      store_pairs(to + r * stride + 2 * c, load_bits(even), load_bits(even + stride));
    }
  }
  return to;
}

// fp32 rows as bf16 operands: rounded, and (returned) by columns for a left operand, that is in pairs of rows.
inline const float* round_rows(float* rows, int64_t, int64_t, float*, float*) {
  return rows;
}

inline const c10::BFloat16* round_rows(
    float* from, int64_t stride, int64_t rows, c10::BFloat16* rounded, c10::BFloat16* pairs) {
  for (int64_t r = 0; r < rows; r += 2) {
    for (int64_t c = 0; c < stride; c += kLanes) {
      const int64_t at = r * stride + c;
      const VecF even = load(from + at), odd = load(from + at + stride);
      store(rounded + at, even);
      store(rounded + at + stride, odd);
      store_pairs(pairs + r * stride + 2 * c, even, odd);
    }
  }
  return pairs;
}

// Two tokens as rows r and r + 1 of a right operand whose rows are `stride` apart.
template <typename Io>
inline void pack_two(const Io* even, const Io* odd, float* to, int64_t stride, int64_t n) {
  copy_row(even, to, n);
  copy_row(odd, to + stride, n);
}

inline void pack_two(
    const c10::BFloat16* even, const c10::BFloat16* odd, c10::BFloat16* to, int64_t, int64_t n) {
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) store_pairs(to + 2 * c, load_bits(even + c), load_bits(odd + c));
  for (; c < n; ++c) {
    to[2 * c] = even[c];
    to[2 * c + 1] = odd[c];
  }
}

// factor * from, converted.
template <typename To>
inline void write_row(const float* from, float factor, To* to, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i) * factor);
  for (; i < n; ++i) to[i] = static_cast<To>(from[i] * factor);
}

// The sum over `columns` of a[r][c] * b[r][c].
template <typename Io>
inline float dot(const Io* a, const Io* b, int64_t n) {
  VecF total{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) total += load(a + i) * load(b + i);
  float rest = 0;
  for (; i < n; ++i) rest += static_cast<float>(a[i]) * static_cast<float>(b[i]);
  return sum_lanes(total) + rest;
}
