// The vector passes of rel_pos_attention, compiled once per instruction set by foreach_isa.h.
#include "softmax_simd.h"

// Probabilities that are added up before they join a longer sum.
constexpr int64_t kSumTogether = 32;

using UnbiasedKeys = PlainKeys<kSumTogether>;

// Keys in the grid's raster order: the two bias rows of one after the other.
struct BiasedKeys {
  static constexpr int64_t kSumTogether = UnbiasedKeys::kSumTogether;
  const ScoreTile& tile;
  int64_t row, column;

  RSK_INLINE explicit BiasedKeys(const ScoreTile& t)
      : tile(t), row(t.first_key / t.grid_width), column(t.first_key % t.grid_width) {}

  // scale * score + bias of one key and kLanes queries.
  RSK_INLINE VecF logit(const float* scores, int64_t lane) const {
    const VecF scaled = load(scores + lane) * tile.scale;
    return scaled + load(tile.rel_h + row * tile.lanes + lane) + load(tile.rel_w + column * tile.lanes + lane);
  }

  RSK_INLINE void next() {
    if (++column == tile.grid_width) {
      column = 0;
      ++row;
    }
  }

  // The sums of ds over the keys of one grid row, in registers until the row is complete; over those of a column,
  // in memory.
  template <typename Tile, int kVectors>
  struct Sums {
    const Tile& tile;
    int64_t lane, row;
    VecF sums[kVectors];

    RSK_INLINE Sums(const Tile& t, int64_t first_lane) : tile(t), lane(first_lane), row(-1) {}
    RSK_INLINE void add(const BiasedKeys& key, const VecF (&ds)[kVectors]) {
      if (key.row != row) {
        flush();
        row = key.row;
        for (int v = 0; v < kVectors; ++v) sums[v] = VecF{};
      }
      for (int v = 0; v < kVectors; ++v) sums[v] += ds[v];
      add_all(tile.grad_w + key.column * tile.lanes + lane, ds);
    }
    RSK_INLINE void flush() {
      if (row >= 0) add_all(tile.grad_h + row * tile.lanes + lane, sums);
    }
  };
};

// After the maxima grew: what was summed under the old ones shrinks by exp(old - new), which replaces `old`.
inline void rescale(
    int64_t lanes, float* old_largest, const float* largest, float* sums, float* out, int64_t row) {
  for (int64_t q = 0; q < lanes; q += kLanes) {
    const VecF factor = exp(load(old_largest + q) - load(largest + q));
    store(sums + q, load(sums + q) * factor);
    store(old_largest + q, factor);
  }
  for (int64_t q = 0; q < lanes; ++q) {
    const float factor = old_largest[q];
    if (factor == 1.0f) continue;
    for (int64_t c = 0; c < row; c += kLanes) store(out + q * row + c, load(out + q * row + c) * factor);
  }
}

// delta = sum p dp / sum p, where all keys of the queries are in this tile. More exact than do . out: where keys
// are alike, or one takes all, dp - delta is a small difference of two large numbers. Leaves p in scores.
template <typename Keys, int kVectors>
inline void delta_block(const GradientTile& tile, int64_t lane, float* delta) {
  VecF lse[kVectors], total[kVectors], weighted[kVectors], p[kVectors];
  load_all(tile.lse + lane, lse);
  for (int v = 0; v < kVectors; ++v) total[v] = weighted[v] = VecF{};
  Keys key(tile);
  for (int64_t first = 0; first < tile.keys; first += kSumTogether) {
    VecF some[kVectors], some_weighted[kVectors];
    for (int v = 0; v < kVectors; ++v) some[v] = some_weighted[v] = VecF{};
    for (int64_t k = first; k < std::min(first + kSumTogether, tile.keys); ++k, key.next()) {
      float* scores = tile.scores + k * tile.lanes;
      exp_key<5>(scores, key, lane, lse, p);
      store_all(scores + lane, p);
      for (int v = 0; v < kVectors; ++v) {
        some[v] += p[v];
        some_weighted[v] += p[v] * load(tile.dp + k * tile.lanes + lane + v * kLanes);
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      total[v] += some[v];
      weighted[v] += some_weighted[v];
    }
  }
  for (int v = 0; v < kVectors; ++v) weighted[v] /= total[v];
  store_all(delta + lane, weighted);
}

template <typename Keys>
RSK_INLINE void row_delta_of(const GradientTile& tile, float* delta) {
  int64_t lane = 0;
  for (; lane + 4 * kLanes <= tile.lanes; lane += 4 * kLanes) delta_block<Keys, 4>(tile, lane, delta);
  for (; lane < tile.lanes; lane += kLanes) delta_block<Keys, 1>(tile, lane, delta);
}

inline void row_max(const ScoreTile& tile, const float* scores, float* largest) {
  tile.rel_h ? row_max_of<BiasedKeys>(tile, scores, largest) : row_max_of<UnbiasedKeys>(tile, scores, largest);
}

template <typename Operand>
inline void softmax(
    const ScoreTile& tile, const float* scores, const float* largest, float* sums, Operand* out) {
  tile.rel_h ? softmax_of<BiasedKeys>(tile, scores, largest, sums, out)
             : softmax_of<UnbiasedKeys>(tile, scores, largest, sums, out);
}

inline void row_delta(const GradientTile& tile, float* delta) {
  tile.rel_h ? row_delta_of<BiasedKeys>(tile, delta) : row_delta_of<UnbiasedKeys>(tile, delta);
}

template <bool kWeighed, typename Operand>
RSK_INLINE void score_gradient_as(
    const GradientTile& tile, Operand* p_rows, Operand* ds_rows, Operand* ds_pairs) {
  tile.rel_h ? score_gradient_of<kWeighed, BiasedKeys>(tile, p_rows, ds_rows, ds_pairs)
             : score_gradient_of<kWeighed, UnbiasedKeys>(tile, p_rows, ds_rows, ds_pairs);
}

template <typename Operand>
inline void score_gradient(
    const GradientTile& tile, bool weighed, Operand* p_rows, Operand* ds_rows, Operand* ds_pairs) {
  weighed ? score_gradient_as<true>(tile, p_rows, ds_rows, ds_pairs)
          : score_gradient_as<false>(tile, p_rows, ds_rows, ds_pairs);
}

template <typename Io, typename Operand>
inline constexpr AttentionKernels<Io, Operand> kAttentionKernels = {
    copy_row<Io, Operand>,
    pack_two,
    write_row<Io>,
    write_row<float>,
    dot<Io>,
    transpose_right,
    pair_rows,
    round_rows,
    transpose,
    transpose_into_shifted,
    row_max,
    softmax<Operand>,
    rescale,
    row_delta,
    score_gradient<Operand>,
};
