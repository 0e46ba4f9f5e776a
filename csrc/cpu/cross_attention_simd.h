// The vector passes of cross_attention, compiled once per instruction set by foreach_isa.h.
//
// Scores lie transposed, keys x queries, so that every maximum and sum is an operation between whole vectors of
// queries, and the mask of a key is one bit per lane.
namespace cross_simd {

using cross::GradientTile;
using cross::ScoreTile;

constexpr float kLog2e = 1.44269504f;
constexpr float kLowest = -3.402823466e38f; // below every logit, and finite: kLowest - kLowest is 0

typedef uint8_t LooseB __attribute__((vector_size(kLanes), aligned(1), may_alias));

// ---------------------------------------------------------------- rows in, rows out

template <typename Io>
RSK_INLINE VecF load_first(const Io* from, int64_t n) {
  if (n >= kLanes) return load(from);
  float values[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) values[i] = static_cast<float>(from[i]);
  return load(values);
}

// The heads of a token lie side by side, so that the rows of one head are far apart: fetched ahead by hand.
template <int kForWriting, typename Io>
RSK_INLINE void prefetch_ahead(const Io* row, int64_t stride, int64_t rows_left, int64_t dim) {
  constexpr int64_t kAhead = 24;
  if (rows_left <= kAhead) return;
  for (int64_t c = 0; c < dim; c += 64 / sizeof(Io)) __builtin_prefetch(row + kAhead * stride + c, kForWriting);
}

// Rows as they are.
template <typename Io, typename Tile>
inline void pack_rows(
    const Io* from, int64_t from_stride, int64_t rows, int64_t dim, Tile* to, int64_t to_stride) {
  for (int64_t r = 0; r < rows; ++r, from += from_stride, to += to_stride) {
    prefetch_ahead<0>(from, from_stride, rows - r, dim);
    for (int64_t c = 0; c < dim; c += kLanes) store(to + c, load_first(from + c, dim - c));
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
    for (int64_t c = 0; c < dim; c += kLanes) {
      const Io* row = from + r * from_stride + c;
      const VecF even = r < rows ? load_first(row, dim - c) : VecF{};
      const VecF odd = r + 1 < rows ? load_first(row + from_stride, dim - c) : VecF{};
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
template <typename Io, typename Tile>
inline void load_columns(
    const Io* from, int64_t from_stride, int64_t rows, int64_t dim, Tile* to, int64_t lanes) {
  for (int64_t r = 0; r < lanes; r += kLanes) {
    for (int64_t i = r; i < r + kLanes; ++i)
      prefetch_ahead<0>(from + i * from_stride, from_stride, rows - i, dim);
    for (int64_t c = 0; c < dim; c += kLanes) {
      VecF square[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        square[i] = r + i < rows ? load_first(from + (r + i) * from_stride + c, dim - c) : VecF{};
      }
      transpose_square(square);
      // Pairs lie in one row of 2 * lanes values.
      store_square(to + c * lanes + (std::is_same_v<Tile, float> ? r : 2 * r), lanes, square, dim - c);
    }
  }
}

template <typename Io>
RSK_INLINE void store_first(Io* to, VecF x, int64_t n) {
  if (n >= kLanes) return store(to, x);
  float values[kLanes];
  store(values, x);
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<Io>(values[i]);
}

template <typename Io>
inline void write_rows(const float* from, int64_t from_stride, int64_t rows, int64_t dim, float factor, Io* to,
    int64_t to_stride) {
  for (int64_t r = 0; r < rows; ++r, from += from_stride, to += to_stride) {
    prefetch_ahead<1>(to, to_stride, rows - r, dim);
    for (int64_t c = 0; c < dim; c += kLanes) store_first(to + c, load(from + c) * factor, dim - c);
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
        store_first(to + (q + i) * to_stride + c, square[i], dim - c);
      }
    }
  }
}

// 16 rows of a mask as one word per key; rows in `everywhere` have all their bits set.
inline void pack_mask(
    const bool* from, int64_t stride, int64_t rows, uint16_t everywhere, int64_t keys, uint16_t* to) {
  int64_t key = 0;
  for (; key + kLanes <= keys; key += kLanes) {
    VecH words = VecH{} + everywhere;
    for (int64_t r = 0; r < rows; ++r) {
      const LooseB bytes = *reinterpret_cast<const LooseB*>(from + r * stride + key);
      words |= __builtin_convertvector(bytes, VecH) << static_cast<uint16_t>(r);
    }
    *reinterpret_cast<LooseH*>(to + key) = words;
  }
  for (; key < keys; ++key) {
    unsigned word = everywhere;
    for (int64_t r = 0; r < rows; ++r) word |= static_cast<unsigned>(from[r * stride + key]) << r;
    to[key] = static_cast<uint16_t>(word);
  }
}

// ---------------------------------------------------------------- products of small sizes

template <int kRows, int kVectors>
RSK_INLINE void product_block(int64_t k, const float* a, int64_t row_step, int64_t depth_step, const float* b,
    int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  VecF sums[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) sums[r][v] = accumulate ? load(c + r * ldc + v * kLanes) : VecF{};
  }
  for (int64_t l = 0; l < k; ++l) {
    VecF right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + l * ldb + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const VecF left = splat(a[r * row_step + l * depth_step]);
      for (int v = 0; v < kVectors; ++v) sums[r][v] += left * right[v];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) store(c + r * ldc + v * kLanes, sums[r][v]);
  }
}

template <int kRows, int kVectors>
inline void product_rows(int64_t m, int64_t k, const float* a, int64_t row_step, int64_t depth_step,
    const float* b, int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  int64_t r = 0;
  for (; r + kRows <= m; r += kRows) {
    product_block<kRows, kVectors>(
        k, a + r * row_step, row_step, depth_step, b, ldb, c + r * ldc, ldc, accumulate);
  }
  if constexpr (kRows > 1) {
    if (r < m) {
      product_rows<kRows / 2, kVectors>(
          m - r, k, a + r * row_step, row_step, depth_step, b, ldb, c + r * ldc, ldc, accumulate);
    }
  }
}

// As tile_product, but a is read in any order, and nothing is looked up: for sizes where a call costs as much as
// the product. n is a multiple of 16.
inline void product(int64_t m, int64_t n, int64_t k, const float* a, int64_t row_step, int64_t depth_step,
    const float* b, int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  constexpr int kWide = RSK_LEVEL >= 2 ? 4 : 2; // as many sums as there are registers
  int64_t j = 0;
  for (; j + kWide * kLanes <= n; j += kWide * kLanes) {
    product_rows<4, kWide>(m, k, a, row_step, depth_step, b + j, ldb, c + j, ldc, accumulate);
  }
  for (; j < n; j += kLanes) {
    product_rows<8, 1>(m, k, a, row_step, depth_step, b + j, ldb, c + j, ldc, accumulate);
  }
}

// ---------------------------------------------------------------- softmax

// x where the lane's query attends to the key, else a constant.
template <bool kMask>
RSK_INLINE VecF attended_or(float otherwise, const ScoreTile& tile, int64_t key, int64_t lane, VecF x) {
  if constexpr (!kMask) return x;
  const uint16_t word = tile.mask[lane / kVector * tile.mask_stride + key];
#if RSK_LEVEL >= 2
  return _mm512_mask_mov_ps(_mm512_set1_ps(otherwise), word, x);
#else
  VecI lane_bits;
  for (int i = 0; i < kLanes; ++i) lane_bits[i] = 1 << i;
  const VecI bits = (VecI{} + (word >> (lane % kVector))) & lane_bits;
  return bits != 0 ? x : splat(otherwise);
#endif
}

template <int kVectors>
RSK_INLINE void load_all(const float* from, VecF (&to)[kVectors]) {
  for (int v = 0; v < kVectors; ++v) to[v] = load(from + v * kLanes);
}

template <typename To, int kVectors>
RSK_INLINE void store_all(To* to, const VecF (&from)[kVectors]) {
  for (int v = 0; v < kVectors; ++v) store(to + v * kLanes, from[v]);
}

// Running maxima.
template <bool kMask, int kVectors>
inline void max_block(const ScoreTile& tile, int64_t lane, const float* scores, float* largest) {
  VecF best[kVectors];
  load_all(largest + lane, best);
  for (int64_t k = 0; k < tile.keys; ++k) {
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = lane + v * kLanes;
      const VecF logit = load(scores + k * tile.lanes + at) * tile.scale;
      best[v] = vmax(best[v], attended_or<kMask>(kLowest, tile, k, at, logit));
    }
  }
  store_all(largest + lane, best);
}

// exp(logit - shift), 0 where the mask says so. The difference comes first: it is exact where it matters, near
// 0. Probabilities that are rounded to bf16 need a polynomial of degree 3 only.
template <bool kMask, int kDegree, int kVectors>
RSK_INLINE void exp_key(const ScoreTile& tile, const float* scores, int64_t key, int64_t lane,
    const VecF (&shift)[kVectors], VecF (&p)[kVectors]) {
  for (int v = 0; v < kVectors; ++v) {
    const int64_t at = lane + v * kLanes;
    const VecF logit = load(scores + key * tile.lanes + at) * tile.scale;
    p[v] = attended_or<kMask>(0.0f, tile, key, at, exp2<kDegree>((logit - shift[v]) * kLog2e));
  }
}

// Probabilities up to a factor, and their sums (a tile's own sum first: adding one by one to a long sum would
// lose digits). fp32: out may be scores.
template <bool kMask, int kVectors>
inline void exp_block(
    const ScoreTile& tile, int64_t lane, const float* scores, const float* largest, float* sums, float* out) {
  VecF shift[kVectors], total[kVectors], p[kVectors];
  load_all(largest + lane, shift);
  for (int v = 0; v < kVectors; ++v) total[v] = VecF{};
  for (int64_t k = 0; k < tile.keys; ++k) {
    exp_key<kMask, 5>(tile, scores, k, lane, shift, p);
    for (int v = 0; v < kVectors; ++v) total[v] += p[v];
    store_all(out + k * tile.lanes + lane, p);
  }
  for (int v = 0; v < kVectors; ++v) total[v] += load(sums + lane + v * kLanes);
  store_all(sums + lane, total);
}

// The same into pairs of keys in bf16; an odd last key is paired with zeros.
template <bool kMask, int kVectors>
inline void exp_block(const ScoreTile& tile, int64_t lane, const float* scores, const float* largest,
    float* sums, c10::BFloat16* out) {
  VecF shift[kVectors], total[kVectors], even[kVectors], odd[kVectors];
  load_all(largest + lane, shift);
  for (int v = 0; v < kVectors; ++v) total[v] = VecF{};
  for (int64_t k = 0; k < tile.keys; k += 2) {
    exp_key<kMask, 3>(tile, scores, k, lane, shift, even);
    for (int v = 0; v < kVectors; ++v) odd[v] = VecF{};
    if (k + 1 < tile.keys) exp_key<kMask, 3>(tile, scores, k + 1, lane, shift, odd);
    for (int v = 0; v < kVectors; ++v) {
      total[v] += even[v] + odd[v];
      store_pairs(out + k * tile.lanes + 2 * (lane + v * kLanes), even[v], odd[v]);
    }
  }
  for (int v = 0; v < kVectors; ++v) total[v] += load(sums + lane + v * kLanes);
  store_all(sums + lane, total);
}

// After the maxima grew: what was summed under the old ones shrinks by exp(old - new).
inline void rescale(
    int64_t lanes, const float* old_largest, const float* largest, float* sums, float* out, int64_t rows) {
  bool grew = false;
  for (int64_t q = 0; q < lanes; ++q) grew |= !(old_largest[q] == largest[q]);
  if (!grew) return;
  for (int64_t q = 0; q < lanes; q += kLanes) {
    const VecF factor = exp(load(old_largest + q) - load(largest + q));
    store(sums + q, load(sums + q) * factor);
    for (int64_t r = 0; r < rows; ++r) store(out + r * lanes + q, load(out + r * lanes + q) * factor);
  }
}

// The results of parts of the keys, first to last. Each part holds dim rows of sums, the maxima and the sums of
// its probabilities.
inline void merge(int64_t parts, int64_t part_size, int64_t lanes, int64_t dim, const float* from, float* out,
    float* largest, float* sums) {
  for (int64_t q = 0; q < lanes; q += kLanes) {
    VecF best = splat(kLowest), total{};
    for (int64_t p = 0; p < parts; ++p) best = vmax(best, load(from + p * part_size + dim * lanes + q));
    for (int64_t p = 0; p < parts; ++p) {
      const float* part = from + p * part_size;
      const VecF factor = exp(load(part + dim * lanes + q) - best);
      total += load(part + (dim + 1) * lanes + q) * factor;
      for (int64_t c = 0; c < dim; ++c) {
        const VecF before = p == 0 ? VecF{} : load(out + c * lanes + q);
        store(out + c * lanes + q, before + load(part + c * lanes + q) * factor);
      }
    }
    store(largest + q, best);
    store(sums + q, total);
  }
}

// The natural logarithm of positive numbers; NaN stays NaN. With x = 2^e m, m near 1, s = (m - 1) / (m + 1):
// log m = 2 (s + s^3 / 3 + s^5 / 5 + ...).
RSK_INLINE VecF log(VecF x) {
  constexpr int32_t kHalfRoot = 0x3f3504f3; // sqrt(0.5)
  const VecI shifted = (VecI)x - kHalfRoot;
  const VecF exponent = __builtin_convertvector(shifted >> 23, VecF);
  const VecF m = (VecF)((shifted & 0x007fffff) + kHalfRoot);
  const VecF s = (m - 1.0f) / (m + 1.0f), s2 = s * s;
  VecF p = s2 * (2.0f / 9) + 2.0f / 7;
  p = p * s2 + 2.0f / 5;
  p = p * s2 + 2.0f / 3;
  return exponent * 0.693147181f + (s * 2.0f + s * s2 * p) + (x - x);
}

// The factors that make out of its sums, and the log-sum-exp of `count` queries.
inline void finish(int64_t count, const float* largest, const float* sums, float* factors, float* lse) {
  for (int64_t q = 0; q < count; q += kLanes) {
    const VecF sum = load(sums + q);
    store(factors + q, 1.0f / sum);
    store_first(lse + q, load(largest + q) + log(sum), count - q);
  }
}

// ---------------------------------------------------------------- gradient

// delta = do . out
template <typename Io>
inline void dot_rows(
    const Io* a, int64_t a_stride, const Io* b, int64_t b_stride, int64_t rows, int64_t dim, float* out) {
  for (int64_t r = 0; r < rows; ++r) out[r] = dot(a + r * a_stride, b + r * b_stride, dim);
}

// delta = sum p dp / sum p, where all keys of the queries are in this tile. More exact than do . out: where keys
// are alike, or one takes all, dp - delta is a small difference of two large numbers.
template <bool kMask, int kVectors>
inline void delta_block(const GradientTile& tile, int64_t lane, float* delta) {
  VecF lse[kVectors], total[kVectors], weighted[kVectors], p[kVectors];
  load_all(tile.lse + lane, lse);
  for (int v = 0; v < kVectors; ++v) total[v] = weighted[v] = VecF{};
  for (int64_t k = 0; k < tile.keys; ++k) {
    exp_key<kMask, 5>(tile, tile.scores, k, lane, lse, p);
    for (int v = 0; v < kVectors; ++v) {
      total[v] += p[v];
      weighted[v] += p[v] * load(tile.dp + k * tile.lanes + lane + v * kLanes);
    }
  }
  // A lane without a query attends to nothing where there is a mask.
  for (int v = 0; v < kVectors; ++v) weighted[v] = total[v] == 0.0f ? VecF{} : weighted[v] / total[v];
  store_all(delta + lane, weighted);
}

// p = exp(logit - lse), ds = p * (dp - delta)
template <bool kMask, int kDegree, int kVectors>
RSK_INLINE void gradient_key(const GradientTile& tile, int64_t key, int64_t lane, const VecF (&lse)[kVectors],
    const VecF (&delta)[kVectors], VecF (&p)[kVectors], VecF (&ds)[kVectors]) {
  exp_key<kMask, kDegree>(tile, tile.scores, key, lane, lse, p);
  for (int v = 0; v < kVectors; ++v) {
    ds[v] = p[v] * (load(tile.dp + key * tile.lanes + lane + v * kLanes) - delta[v]);
  }
}

// fp32: probabilities over scores, ds over dp.
template <bool kMask, int kVectors>
inline void gradient_block(const GradientTile& tile, int64_t lane, float* p_rows, float* ds_rows, float*) {
  VecF lse[kVectors], delta[kVectors], p[kVectors], ds[kVectors];
  load_all(tile.lse + lane, lse);
  load_all(tile.delta + lane, delta);
  for (int64_t k = 0; k < tile.keys; ++k) {
    gradient_key<kMask, 5>(tile, k, lane, lse, delta, p, ds);
    store_all(p_rows + k * tile.lanes + lane, p);
    store_all(ds_rows + k * tile.lanes + lane, ds);
  }
}

// bf16: ds is a left operand of one product (rows) and a right operand of another (pairs of keys).
template <bool kMask, int kVectors>
inline void gradient_block(const GradientTile& tile, int64_t lane, c10::BFloat16* p_rows,
    c10::BFloat16* ds_rows, c10::BFloat16* ds_pairs) {
  VecF lse[kVectors], delta[kVectors], p[kVectors], even[kVectors], odd[kVectors];
  load_all(tile.lse + lane, lse);
  load_all(tile.delta + lane, delta);
  for (int64_t k = 0; k < tile.keys; k += 2) {
    int64_t at = k * tile.lanes + lane;
    gradient_key<kMask, 3>(tile, k, lane, lse, delta, p, even);
    store_all(p_rows + at, p);
    store_all(ds_rows + at, even);
    for (int v = 0; v < kVectors; ++v) odd[v] = VecF{};
    if (k + 1 < tile.keys) {
      at += tile.lanes;
      gradient_key<kMask, 3>(tile, k + 1, lane, lse, delta, p, odd);
      store_all(p_rows + at, p);
      store_all(ds_rows + at, odd);
    }
    for (int v = 0; v < kVectors; ++v) {
      store_pairs(ds_pairs + k * tile.lanes + 2 * (lane + v * kLanes), even[v], odd[v]);
    }
  }
}

// Queries go four vectors at a time, the rest one by one. tile.lanes is a multiple of 16.
#define RSK_FOR_BLOCKS(BLOCK, ...)                                                                    \
  do {                                                                                                \
    int64_t lane = 0;                                                                                 \
    for (; lane + 4 * kLanes <= tile.lanes; lane += 4 * kLanes) {                                     \
      tile.mask ? BLOCK<true, 4>(tile, lane, __VA_ARGS__) : BLOCK<false, 4>(tile, lane, __VA_ARGS__); \
    }                                                                                                 \
    for (; lane < tile.lanes; lane += kLanes) {                                                       \
      tile.mask ? BLOCK<true, 1>(tile, lane, __VA_ARGS__) : BLOCK<false, 1>(tile, lane, __VA_ARGS__); \
    }                                                                                                 \
  } while (false)

inline void row_max(const ScoreTile& tile, const float* scores, float* largest) {
  RSK_FOR_BLOCKS(max_block, scores, largest);
}

template <typename Tile>
inline void softmax(const ScoreTile& tile, const float* scores, const float* largest, float* sums, Tile* out) {
  RSK_FOR_BLOCKS(exp_block, scores, largest, sums, out);
}

inline void row_delta(const GradientTile& tile, float* delta) {
  RSK_FOR_BLOCKS(delta_block, delta);
}

template <typename Tile>
inline void score_gradient(const GradientTile& tile, Tile* p_rows, Tile* ds_rows, Tile* ds_pairs) {
  RSK_FOR_BLOCKS(gradient_block, p_rows, ds_rows, ds_pairs);
}

#undef RSK_FOR_BLOCKS

// ---------------------------------------------------------------- few queries: scores as queries x keys

// The first n lanes of x, all or none of them included.
RSK_INLINE VecF first_or(float otherwise, VecF x, int64_t n) {
  for (int64_t i = n < 0 ? 0 : n; i < kLanes; ++i) x[i] = otherwise;
  return x;
}

// Softmax of rows up to a factor, in place; lanes beyond the last key become 0.
inline void softmax_rows(
    int64_t rows, int64_t keys, int64_t lanes, float scale, float* scores, float* largest, float* sums) {
  for (int64_t r = 0; r < rows; ++r, scores += lanes) {
    VecF best = splat(kLowest), total{};
    for (int64_t k = 0; k < keys; k += kLanes) {
      best = vmax(best, first_or(kLowest, load(scores + k) * scale, keys - k));
    }
    float shift = best[0];
    for (int lane = 1; lane < kLanes; ++lane) shift = best[lane] > shift ? best[lane] : shift;
    for (int64_t k = 0; k < lanes; k += kLanes) {
      const VecF p = first_or(0.0f, exp2<5>((load(scores + k) * scale - shift) * kLog2e), keys - k);
      total += p;
      store(scores + k, p);
    }
    largest[r] = shift;
    sums[r] = sum_lanes(total);
  }
}

// p over scores, ds over dp.
inline void gradient_rows(int64_t rows, int64_t keys, int64_t lanes, float scale, const float* lse,
    const float* delta, float* scores, float* dp) {
  for (int64_t r = 0; r < rows; ++r, scores += lanes, dp += lanes) {
    for (int64_t k = 0; k < lanes; k += kLanes) {
      const VecF p = first_or(0.0f, exp2<5>((load(scores + k) * scale - lse[r]) * kLog2e), keys - k);
      store(scores + k, p);
      store(dp + k, p * (load(dp + k) - delta[r]));
    }
  }
}

template <typename Io, typename Tile>
inline constexpr cross::Kernels<Io, Tile> kKernels = {
    pack_rows<Io, Tile>,
    write_rows<Io>,
    write_columns<Io>,
    transpose_left,
    load_rows<Io>,
    load_columns<Io, Tile>,
    product,
    row_max,
    softmax<Tile>,
    rescale,
    merge,
    finish,
    dot_rows<Io>,
    row_delta,
    score_gradient<Tile>,
    softmax_rows,
    gradient_rows,
};

} // namespace cross_simd
