// The vector passes of cross_attention_rows.cpp, compiled once per instruction set by foreach_isa.h: scores lie
// queries x keys, and a query's mask is one bit per key.
#include "cross_attention_operands_simd.h"

namespace cross_simd {

using cross::RowTile;

RSK_INLINE uint32_t mask_of(const RowTile& tile, int64_t query, int64_t lane) {
  return tile.words[lane / 32 * tile.word_stride + query * tile.query_stride] >> (lane % 32);
}

// x where the lane's bit is set, else a constant.
RSK_INLINE VecF attended_or(float otherwise, uint32_t bits, VecF x) {
#if RSK_LEVEL >= 2
  return _mm512_mask_mov_ps(_mm512_set1_ps(otherwise), static_cast<__mmask16>(bits), x);
#else
  VecU lane_bits;
  for (int i = 0; i < kLanes; ++i) lane_bits[i] = 1u << i;
  return ((VecU{} + bits) & lane_bits) != 0 ? x : splat(otherwise);
#endif
}

// The rows of the tile's queries, one after the other.
inline void gather(const RowTile& tile, const float* from, int64_t row, float* to) {
  for (int64_t i = 0; i < tile.rows; ++i, to += row) {
    const float* source = from + tile.queries[i] * row;
    for (int64_t c = 0; c < row; c += kLanes) store(to + c, load(source + c));
  }
}

// Online softmax, scores in base 2 and in place: the maxima grow, sums (16 a query) and what was added under the
// old maxima shrink by `factors`.
inline void softmax_rows(const RowTile& tile, float* scores, float* largest, float* sums, float* factors) {
  for (int64_t i = 0; i < tile.rows; ++i, scores += tile.lanes) {
    const int64_t query = tile.queries[i];
    const float before = largest[query];
    VecF best = splat(before);
    for (int64_t l = 0; l < tile.lanes; l += kLanes) {
      best = vmax(attended_or(kLowest, mask_of(tile, query, l), load(scores + l)), best);
    }
    best = largest_lane(best);
    const VecF factor = exp2<5>(before - best);
    VecF total{};
    for (int64_t l = 0; l < tile.lanes; l += kLanes) {
      const VecF p = attended_or(0.0f, mask_of(tile, query, l), exp2<5>(load(scores + l) - best));
      total += p;
      store(scores + l, p);
    }
    largest[query] = best[0];
    factors[i] = factor[0];
    float* sum = sums + query * kLanes;
    store(sum, load(sum) * factor + total);
  }
}

// to's rows of the tile's queries = their factors times themselves + from's rows.
inline void add_rows(const RowTile& tile, const float* from, const float* factors, int64_t row, float* to) {
  for (int64_t i = 0; i < tile.rows; ++i, from += row) {
    float* target = to + tile.queries[i] * row;
    const VecF factor = splat(factors[i]);
    for (int64_t c = 0; c < row; c += kLanes) store(target + c, load(target + c) * factor + load(from + c));
  }
}

inline void reduce_sums(int64_t queries, const float* sums, float* to) {
  for (int64_t q = 0; q < queries; ++q) to[q] = sum_lanes(load(sums + q * kLanes));
}

// p over scores, ds over dp; lse in base 2. delta: do . out per query, or null where this tile holds all keys: then it
// is the mean of dp, which knows nothing of the rounding of out.
inline void gradient_rows(const RowTile& tile, const float* lse, const float* delta, float* scores, float* dp) {
  for (int64_t i = 0; i < tile.rows; ++i, scores += tile.lanes, dp += tile.lanes) {
    const int64_t query = tile.queries[i];
    VecF total{}, weighted{};
    for (int64_t l = 0; l < tile.lanes; l += kLanes) {
      const VecF p = attended_or(0.0f, mask_of(tile, query, l), exp2<5>(load(scores + l) - lse[query]));
      store(scores + l, p);
      total += p;
      weighted += p * load(dp + l);
    }
    const float mean = delta != nullptr ? delta[query] : sum_lanes(weighted) / sum_lanes(total);
    for (int64_t l = 0; l < tile.lanes; l += kLanes) {
      store(dp + l, load(scores + l) * (load(dp + l) - mean));
    }
  }
}

template <typename Io>
inline constexpr cross::RowKernels<Io> kRowKernels = {
    pack_rows<Io, float>,
    load_columns<Io, float>,
    write_rows<Io>,
    gather,
    softmax_rows,
    add_rows,
    reduce_sums,
    gradient_rows,
};

} // namespace cross_simd
