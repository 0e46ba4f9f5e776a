// The vector passes of rel_pos_attention, compiled once per instruction set by foreach_isa.h.
//
// Scores lie transposed, keys x queries, so that every maximum, sum and bias is an operation between whole
// vectors of queries: no reduction inside a vector, whatever the shape of the grid.

constexpr float kLog2e = 1.44269504f;

// The two bias rows of one key after the other, in the grid's raster order.
struct KeyCursor {
  const ScoreTile& tile;
  int64_t row, column;

  RSK_INLINE explicit KeyCursor(const ScoreTile& t)
      : tile(t), row(t.first_key / t.grid_width), column(t.first_key % t.grid_width) {}

  RSK_INLINE void next() {
    if (++column == tile.grid_width) {
      column = 0;
      ++row;
    }
  }
};

// scale * score + bias of one key and kLanes queries.
template <bool kBias>
RSK_INLINE VecF logit(const float* scores, const KeyCursor& key, int64_t lane) {
  const ScoreTile& tile = key.tile;
  const VecF scaled = load(scores + lane) * tile.scale;
  if constexpr (!kBias) return scaled;
  return scaled + load(tile.rel_h + key.row * tile.lanes + lane) +
         load(tile.rel_w + key.column * tile.lanes + lane);
}

template <int kVectors>
RSK_INLINE void load_all(const float* from, VecF (&to)[kVectors]) {
  for (int v = 0; v < kVectors; ++v) to[v] = load(from + v * kLanes);
}

template <int kVectors>
RSK_INLINE void store_all(float* to, const VecF (&from)[kVectors]) {
  for (int v = 0; v < kVectors; ++v) store(to + v * kLanes, from[v]);
}

template <int kVectors>
RSK_INLINE void add_all(float* to, const VecF (&from)[kVectors]) {
  for (int v = 0; v < kVectors; ++v) store(to + v * kLanes, load(to + v * kLanes) + from[v]);
}

// Probabilities that are added up before they join a longer sum, where each alone would be rounded more.
constexpr int64_t kSumTogether = 32;

// Running maxima.
template <bool kBias, int kVectors>
inline void max_block(const ScoreTile& tile, int64_t lane, const float* scores, float* largest) {
  VecF best[kVectors];
  load_all(largest + lane, best);
  KeyCursor key(tile);
  for (int64_t k = 0; k < tile.keys; ++k, key.next()) {
    for (int v = 0; v < kVectors; ++v) {
      best[v] = vmax(best[v], logit<kBias>(scores + k * tile.lanes, key, lane + v * kLanes));
    }
  }
  store_all(largest + lane, best);
}

// exp(logit - shift). The difference comes first: it is exact where it matters, near 0. Probabilities that are
// rounded to bf16 need a polynomial of degree 3 only.
template <bool kBias, int kDegree, int kVectors>
RSK_INLINE void exp_key(const float* scores, const KeyCursor& key, int64_t lane, const VecF (&shift)[kVectors],
    VecF (&result)[kVectors]) {
  for (int v = 0; v < kVectors; ++v) {
    result[v] = exp2<kDegree>((logit<kBias>(scores, key, lane + v * kLanes) - shift[v]) * kLog2e);
  }
}

// Probabilities up to a factor, and their sums (a tile's own sum first: adding one by one to a long sum would
// lose digits). fp32: out may be scores.
template <bool kBias, int kVectors>
inline void exp_block(
    const ScoreTile& tile, int64_t lane, const float* scores, const float* largest, float* sums, float* out) {
  VecF shift[kVectors], total[kVectors], p[kVectors];
  load_all(largest + lane, shift);
  for (int v = 0; v < kVectors; ++v) total[v] = VecF{};
  KeyCursor key(tile);
  for (int64_t k = 0; k < tile.keys; ++k, key.next()) {
    exp_key<kBias, 5>(scores + k * tile.lanes, key, lane, shift, p);
    for (int v = 0; v < kVectors; ++v) total[v] += p[v];
    store_all(out + k * tile.lanes + lane, p);
    if (k % kSumTogether != kSumTogether - 1) continue;
    add_all(sums + lane, total);
    for (int v = 0; v < kVectors; ++v) total[v] = VecF{};
  }
  add_all(sums + lane, total);
}

// The same into pairs of keys in bf16; an odd last key is paired with zeros.
template <bool kBias, int kVectors>
inline void exp_block(const ScoreTile& tile, int64_t lane, const float* scores, const float* largest,
    float* sums, c10::BFloat16* out) {
  VecF shift[kVectors], total[kVectors], even[kVectors], odd[kVectors];
  load_all(largest + lane, shift);
  for (int v = 0; v < kVectors; ++v) total[v] = VecF{};
  KeyCursor key(tile);
  for (int64_t k = 0; k < tile.keys; k += 2) {
    exp_key<kBias, 3>(scores + k * tile.lanes, key, lane, shift, even);
    key.next();
    for (int v = 0; v < kVectors; ++v) odd[v] = VecF{};
    if (k + 1 < tile.keys) {
      exp_key<kBias, 3>(scores + (k + 1) * tile.lanes, key, lane, shift, odd);
      key.next();
    }
    for (int v = 0; v < kVectors; ++v) {
      total[v] += even[v] + odd[v];
      store_pairs(out + k * tile.lanes + 2 * (lane + v * kLanes), even[v], odd[v]);
    }
  }
  add_all(sums + lane, total);
}

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
template <bool kBias, int kVectors>
inline void delta_block(const GradientTile& tile, int64_t lane, float* delta) {
  VecF lse[kVectors], total[kVectors], weighted[kVectors], p[kVectors];
  load_all(tile.lse + lane, lse);
  for (int v = 0; v < kVectors; ++v) total[v] = weighted[v] = VecF{};
  KeyCursor key(tile);
  for (int64_t first = 0; first < tile.keys; first += kSumTogether) {
    VecF some[kVectors], some_weighted[kVectors];
    for (int v = 0; v < kVectors; ++v) some[v] = some_weighted[v] = VecF{};
    for (int64_t k = first; k < std::min(first + kSumTogether, tile.keys); ++k, key.next()) {
      float* scores = tile.scores + k * tile.lanes;
      exp_key<kBias, 5>(scores, key, lane, lse, p);
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

// The sums of ds over the keys of one grid row, in registers until the row is complete.
template <bool kBias, int kVectors>
struct RowSum {
  const GradientTile& tile;
  int64_t lane, row;
  VecF sums[kVectors];

  RSK_INLINE RowSum(const GradientTile& t, int64_t first_lane) : tile(t), lane(first_lane), row(-1) {}
  RSK_INLINE void add(const KeyCursor& key, const VecF (&ds)[kVectors]) {
    if constexpr (!kBias) return;
    if (key.row != row) {
      flush();
      row = key.row;
      for (int v = 0; v < kVectors; ++v) sums[v] = VecF{};
    }
    for (int v = 0; v < kVectors; ++v) sums[v] += ds[v];
    add_all(tile.grad_w + key.column * tile.lanes + lane, ds);
  }
  RSK_INLINE void flush() {
    if constexpr (!kBias) return;
    if (row >= 0) add_all(tile.grad_h + row * tile.lanes + lane, sums);
  }
};

// One key of the backward pass: p = exp(logit - lse), unless row_delta left it in scores, ds = p * (dp - delta).
template <bool kBias, bool kWeighed, int kDegree, int kVectors>
RSK_INLINE void gradient_key(const GradientTile& tile, int64_t k, const KeyCursor& key, int64_t lane,
    const VecF (&lse)[kVectors], const VecF (&delta)[kVectors], VecF (&p)[kVectors], VecF (&ds)[kVectors]) {
  const float *scores = tile.scores + k * tile.lanes, *dp = tile.dp + k * tile.lanes;
  if constexpr (kWeighed) {
    load_all(scores + lane, p);
  } else {
    exp_key<kBias, kDegree>(scores, key, lane, lse, p);
  }
  for (int v = 0; v < kVectors; ++v) ds[v] = p[v] * (load(dp + lane + v * kLanes) - delta[v]);
}

// fp32: probabilities over scores, ds over dp.
template <bool kBias, bool kWeighed, int kVectors>
inline void gradient_block(const GradientTile& tile, int64_t lane, float* p_rows, float* ds_rows, float*) {
  VecF lse[kVectors], delta[kVectors], p[kVectors], ds[kVectors];
  load_all(tile.lse + lane, lse);
  load_all(tile.delta + lane, delta);
  RowSum<kBias, kVectors> row_sum(tile, lane);
  KeyCursor key(tile);
  for (int64_t k = 0; k < tile.keys; ++k, key.next()) {
    const int64_t at = k * tile.lanes + lane;
    gradient_key<kBias, kWeighed, 5>(tile, k, key, lane, lse, delta, p, ds);
    row_sum.add(key, ds);
    if constexpr (!kWeighed) store_all(p_rows + at, p);
    store_all(ds_rows + at, ds);
  }
  row_sum.flush();
}

template <int kVectors>
RSK_INLINE void store_all(c10::BFloat16* to, const VecF (&from)[kVectors]) {
  for (int v = 0; v < kVectors; ++v) store(to + v * kLanes, from[v]);
}

// bf16: ds is a left operand of two products, by rows and by columns (pairs of keys).
template <bool kBias, bool kWeighed, int kVectors>
inline void gradient_block(const GradientTile& tile, int64_t lane, c10::BFloat16* p_rows,
    c10::BFloat16* ds_rows, c10::BFloat16* ds_pairs) {
  VecF lse[kVectors], delta[kVectors], p[kVectors], even[kVectors], odd[kVectors];
  load_all(tile.lse + lane, lse);
  load_all(tile.delta + lane, delta);
  RowSum<kBias, kVectors> row_sum(tile, lane);
  KeyCursor key(tile);
  for (int64_t k = 0; k < tile.keys; k += 2) {
    int64_t at = k * tile.lanes + lane;
    gradient_key<kBias, kWeighed, 3>(tile, k, key, lane, lse, delta, p, even);
    row_sum.add(key, even);
    store_all(p_rows + at, p);
    store_all(ds_rows + at, even);
    key.next();
    for (int v = 0; v < kVectors; ++v) odd[v] = VecF{};
    if (k + 1 < tile.keys) {
      at += tile.lanes;
      gradient_key<kBias, kWeighed, 3>(tile, k + 1, key, lane, lse, delta, p, odd);
      row_sum.add(key, odd);
      store_all(p_rows + at, p);
      store_all(ds_rows + at, odd);
      key.next();
    }
    for (int v = 0; v < kVectors; ++v) {
      store_pairs(ds_pairs + k * tile.lanes + 2 * (lane + v * kLanes), even[v], odd[v]);
    }
  }
  row_sum.flush();
}

// Queries go four vectors at a time, the rest one by one. tile.lanes is a multiple of 16.
#define RSK_FOR_BLOCKS(BLOCK, ...)                                                                     \
  do {                                                                                                 \
    int64_t lane = 0;                                                                                  \
    for (; lane + 4 * kLanes <= tile.lanes; lane += 4 * kLanes) {                                      \
      tile.rel_h ? BLOCK<true, 4>(tile, lane, __VA_ARGS__) : BLOCK<false, 4>(tile, lane, __VA_ARGS__); \
    }                                                                                                  \
    for (; lane < tile.lanes; lane += kLanes) {                                                        \
      tile.rel_h ? BLOCK<true, 1>(tile, lane, __VA_ARGS__) : BLOCK<false, 1>(tile, lane, __VA_ARGS__); \
    }                                                                                                  \
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

template <bool kBias, int kVectors, typename Tile>
RSK_INLINE void weighed_gradient_block(
    const GradientTile& tile, int64_t lane, Tile* p_rows, Tile* ds_rows, Tile* ds_pairs) {
  gradient_block<kBias, true, kVectors>(tile, lane, p_rows, ds_rows, ds_pairs);
}

template <bool kBias, int kVectors, typename Tile>
RSK_INLINE void whole_gradient_block(
    const GradientTile& tile, int64_t lane, Tile* p_rows, Tile* ds_rows, Tile* ds_pairs) {
  gradient_block<kBias, false, kVectors>(tile, lane, p_rows, ds_rows, ds_pairs);
}

template <typename Tile>
inline void score_gradient(
    const GradientTile& tile, bool weighed, Tile* p_rows, Tile* ds_rows, Tile* ds_pairs) {
  if (weighed) {
    RSK_FOR_BLOCKS(weighed_gradient_block, p_rows, ds_rows, ds_pairs);
  } else {
    RSK_FOR_BLOCKS(whole_gradient_block, p_rows, ds_rows, ds_pairs);
  }
}

#undef RSK_FOR_BLOCKS

template <typename Io, typename Tile>
inline constexpr AttentionKernels<Io, Tile> kAttentionKernels = {
    copy_row<Io, Tile>,
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
    softmax<Tile>,
    rescale,
    row_delta,
    score_gradient<Tile>,
};
