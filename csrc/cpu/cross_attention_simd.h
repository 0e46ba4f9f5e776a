// The vector passes of cross_attention, compiled once per instruction set by foreach_isa.h.
//
// Scores lie transposed, keys x queries, so that every maximum and sum is an operation between whole vectors of
// queries, and the mask of a key is one bit per lane.
#include "cross_attention_operands_simd.h"

namespace cross_simd {

using cross::GradientTile;
using cross::ScoreTile;

// ---------------------------------------------------------------- softmax

template <int kVectors>
RSK_INLINE void load_all(const float* from, VecF (&to)[kVectors]) {
  for (int v = 0; v < kVectors; ++v) to[v] = load(from + v * kLanes);
}

template <typename To, int kVectors>
RSK_INLINE void store_all(To* to, const VecF (&from)[kVectors]) {
  for (int v = 0; v < kVectors; ++v) store(to + v * kLanes, from[v]);
}

// Running maxima.
template <int kVectors>
inline void max_block(const ScoreTile& tile, int64_t lane, const float* scores, float* largest) {
  VecF best[kVectors];
  load_all(largest + lane, best);
  for (int64_t k = 0; k < tile.keys; ++k) {
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = lane + v * kLanes;
      const VecF logit = load(scores + k * tile.lanes + at) * tile.scale;
      best[v] = vmax(best[v], logit);
    }
  }
  store_all(largest + lane, best);
}

// exp(logit - shift). The difference comes first: it is exact where it matters, near
// 0. Probabilities that are rounded to bf16 need a polynomial of degree 3 only.
template <int kDegree, int kVectors>
RSK_INLINE void exp_key(const ScoreTile& tile, const float* scores, int64_t key, int64_t lane,
    const VecF (&shift)[kVectors], VecF (&p)[kVectors]) {
  for (int v = 0; v < kVectors; ++v) {
    const int64_t at = lane + v * kLanes;
    const VecF logit = load(scores + key * tile.lanes + at) * tile.scale;
    p[v] = exp2<kDegree>((logit - shift[v]) * kLog2e);
  }
}

// Probabilities up to a factor, and their sums (a tile's own sum first: adding one by one to a long sum would
// lose digits). fp32: out may be scores.
template <int kVectors>
inline void exp_block(
    const ScoreTile& tile, int64_t lane, const float* scores, const float* largest, float* sums, float* out) {
  VecF shift[kVectors], total[kVectors], p[kVectors];
  load_all(largest + lane, shift);
  for (int v = 0; v < kVectors; ++v) total[v] = VecF{};
  for (int64_t k = 0; k < tile.keys; ++k) {
    exp_key<5>(tile, scores, k, lane, shift, p);
    for (int v = 0; v < kVectors; ++v) total[v] += p[v];
    store_all(out + k * tile.lanes + lane, p);
  }
  for (int v = 0; v < kVectors; ++v) total[v] += load(sums + lane + v * kLanes);
  store_all(sums + lane, total);
}

// The same into pairs of keys in bf16; an odd last key is paired with zeros.
template <int kVectors>
inline void exp_block(const ScoreTile& tile, int64_t lane, const float* scores, const float* largest,
    float* sums, c10::BFloat16* out) {
  VecF shift[kVectors], total[kVectors], even[kVectors], odd[kVectors];
  load_all(largest + lane, shift);
  for (int v = 0; v < kVectors; ++v) total[v] = VecF{};
  for (int64_t k = 0; k < tile.keys; k += 2) {
    exp_key<3>(tile, scores, k, lane, shift, even);
    for (int v = 0; v < kVectors; ++v) odd[v] = VecF{};
    if (k + 1 < tile.keys) exp_key<3>(tile, scores, k + 1, lane, shift, odd);
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

// The factors that make out of its sums, and the log-sum-exp of `count` queries.
inline void finish(int64_t count, const float* largest, const float* sums, float* factors, float* lse) {
  for (int64_t q = 0; q < count; q += kLanes) {
    const VecF sum = load(sums + q);
    store(factors + q, 1.0f / sum);
    store_first(lse + q, load(largest + q) + log(sum), count - q);
  }
}

// ---------------------------------------------------------------- gradient

// delta = sum p dp / sum p, where all keys of the queries are in this tile. More exact than do . out: where keys
// are alike, or one takes all, dp - delta is a small difference of two large numbers.
template <int kVectors>
inline void delta_block(const GradientTile& tile, int64_t lane, float* delta) {
  VecF lse[kVectors], total[kVectors], weighted[kVectors], p[kVectors];
  load_all(tile.lse + lane, lse);
  for (int v = 0; v < kVectors; ++v) total[v] = weighted[v] = VecF{};
  for (int64_t k = 0; k < tile.keys; ++k) {
    exp_key<5>(tile, tile.scores, k, lane, lse, p);
    for (int v = 0; v < kVectors; ++v) {
      total[v] += p[v];
      weighted[v] += p[v] * load(tile.dp + k * tile.lanes + lane + v * kLanes);
    }
  }
  for (int v = 0; v < kVectors; ++v) weighted[v] /= total[v];
  store_all(delta + lane, weighted);
}

// p = exp(logit - lse), ds = p * (dp - delta)
template <int kDegree, int kVectors>
RSK_INLINE void gradient_key(const GradientTile& tile, int64_t key, int64_t lane, const VecF (&lse)[kVectors],
    const VecF (&delta)[kVectors], VecF (&p)[kVectors], VecF (&ds)[kVectors]) {
  exp_key<kDegree>(tile, tile.scores, key, lane, lse, p);
  for (int v = 0; v < kVectors; ++v) {
    ds[v] = p[v] * (load(tile.dp + key * tile.lanes + lane + v * kLanes) - delta[v]);
  }
}

// fp32: probabilities over scores, ds over dp.
template <int kVectors>
inline void gradient_block(const GradientTile& tile, int64_t lane, float* p_rows, float* ds_rows, float*) {
  VecF lse[kVectors], delta[kVectors], p[kVectors], ds[kVectors];
  load_all(tile.lse + lane, lse);
  load_all(tile.delta + lane, delta);
  for (int64_t k = 0; k < tile.keys; ++k) {
    gradient_key<5>(tile, k, lane, lse, delta, p, ds);
    store_all(p_rows + k * tile.lanes + lane, p);
    store_all(ds_rows + k * tile.lanes + lane, ds);
  }
}

// bf16: ds is a left operand of one product (rows) and a right operand of another (pairs of keys).
template <int kVectors>
inline void gradient_block(const GradientTile& tile, int64_t lane, c10::BFloat16* p_rows,
    c10::BFloat16* ds_rows, c10::BFloat16* ds_pairs) {
  VecF lse[kVectors], delta[kVectors], p[kVectors], even[kVectors], odd[kVectors];
  load_all(tile.lse + lane, lse);
  load_all(tile.delta + lane, delta);
  for (int64_t k = 0; k < tile.keys; k += 2) {
    int64_t at = k * tile.lanes + lane;
    gradient_key<3>(tile, k, lane, lse, delta, p, even);
    store_all(p_rows + at, p);
    store_all(ds_rows + at, even);
    for (int v = 0; v < kVectors; ++v) odd[v] = VecF{};
    if (k + 1 < tile.keys) {
      at += tile.lanes;
      gradient_key<3>(tile, k + 1, lane, lse, delta, p, odd);
      store_all(p_rows + at, p);
      store_all(ds_rows + at, odd);
    }
    for (int v = 0; v < kVectors; ++v) {
      store_pairs(ds_pairs + k * tile.lanes + 2 * (lane + v * kLanes), even[v], odd[v]);
    }
  }
}

// Queries go four vectors at a time, the rest one by one. tile.lanes is a multiple of 16.
#define RSK_FOR_BLOCKS(BLOCK, ...)                                                                 \
  do {                                                                                             \
    int64_t lane = 0;                                                                              \
    for (; lane + 4 * kLanes <= tile.lanes; lane += 4 * kLanes) BLOCK<4>(tile, lane, __VA_ARGS__); \
    for (; lane < tile.lanes; lane += kLanes) BLOCK<1>(tile, lane, __VA_ARGS__);                   \
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

template <typename Io, typename Tile>
inline constexpr cross::Kernels<Io, Tile> kKernels = {
    pack_rows<Io, Tile>,
    write_rows<Io>,
    write_columns<Io>,
    transpose_left,
    load_rows<Io>,
    load_columns<Io, Tile>,
    row_max,
    softmax<Tile>,
    rescale,
    merge,
    finish,
    dot_rows<Io>,
    row_delta,
    score_gradient<Tile>,
};

} // namespace cross_simd
