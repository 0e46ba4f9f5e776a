// Vector passes over a tile of scores that lies keys x queries, for rel_pos_attention and cross_attention: every
// maximum, sum and bias is an operation between whole vectors of queries, no reduction inside a vector. Like vec.h,
// included inside a namespace, without guard, by the files that foreach_isa.h compiles.
//
// A tile has `keys`, `lanes` (a multiple of 16) and `scale`; in the backward pass `scores`, `dp`, `lse` and `delta`,
// too. `Keys` makes logits of its scores, one key after the other, and takes sums of ds where somebody wants them.

template <int kVectors>
RSK_INLINE void load_all(const float* from, VecF (&to)[kVectors]) {
  for (int v = 0; v < kVectors; ++v) to[v] = load(from + v * kLanes);
}

template <typename To, int kVectors>
RSK_INLINE void store_all(To* to, const VecF (&from)[kVectors]) {
  for (int v = 0; v < kVectors; ++v) store(to + v * kLanes, from[v]);
}

template <int kVectors>
RSK_INLINE void add_all(float* to, const VecF (&from)[kVectors]) {
  for (int v = 0; v < kVectors; ++v) store(to + v * kLanes, load(to + v * kLanes) + from[v]);
}

// Keys without a bias. Probabilities of kTogether keys are added up before they join a longer sum, where each
// alone would be rounded more.
template <int64_t kTogether>
struct PlainKeys {
  static constexpr int64_t kSumTogether = kTogether;
  float scale;

  template <typename Tile>
  RSK_INLINE explicit PlainKeys(const Tile& tile) : scale(tile.scale) {}
  RSK_INLINE VecF logit(const float* scores, int64_t lane) const { return load(scores + lane) * scale; }
  RSK_INLINE void next() {}

  template <typename Tile, int kVectors>
  struct Sums {
    RSK_INLINE Sums(const Tile&, int64_t) {}
    RSK_INLINE void add(const PlainKeys&, const VecF (&)[kVectors]) {}
    RSK_INLINE void flush() {}
  };
};

// Running maxima.
template <typename Keys, int kVectors, typename Tile>
inline void max_block(const Tile& tile, int64_t lane, const float* scores, float* largest) {
  VecF best[kVectors];
  load_all(largest + lane, best);
  Keys key(tile);
  for (int64_t k = 0; k < tile.keys; ++k, key.next()) {
    for (int v = 0; v < kVectors; ++v) {
      best[v] = vmax(best[v], key.logit(scores + k * tile.lanes, lane + v * kLanes));
    }
  }
  store_all(largest + lane, best);
}

// exp(logit - shift). The difference comes first: it is exact where it matters, near 0. Probabilities that are
// rounded to bf16 need a polynomial of degree 3 only.
template <int kDegree, typename Keys, int kVectors>
RSK_INLINE void exp_key(const float* scores, const Keys& key, int64_t lane, const VecF (&shift)[kVectors],
    VecF (&result)[kVectors]) {
  for (int v = 0; v < kVectors; ++v) {
    result[v] = exp2<kDegree>((key.logit(scores, lane + v * kLanes) - shift[v]) * kLog2e);
  }
}

// Probabilities up to a factor, and their sums. fp32: out may be scores.
template <typename Keys, int kVectors, typename Tile>
inline void exp_block(
    const Tile& tile, int64_t lane, const float* scores, const float* largest, float* sums, float* out) {
  VecF shift[kVectors], total[kVectors], p[kVectors];
  load_all(largest + lane, shift);
  for (int v = 0; v < kVectors; ++v) total[v] = VecF{};
  Keys key(tile);
  for (int64_t k = 0; k < tile.keys; ++k, key.next()) {
    exp_key<5>(scores + k * tile.lanes, key, lane, shift, p);
    for (int v = 0; v < kVectors; ++v) total[v] += p[v];
    store_all(out + k * tile.lanes + lane, p);
    if (k % Keys::kSumTogether != Keys::kSumTogether - 1) continue;
    add_all(sums + lane, total);
    for (int v = 0; v < kVectors; ++v) total[v] = VecF{};
  }
  add_all(sums + lane, total);
}

// The same into pairs of keys in bf16; an odd last key is paired with zeros.
template <typename Keys, int kVectors, typename Tile>
inline void exp_block(const Tile& tile, int64_t lane, const float* scores, const float* largest, float* sums,
    c10::BFloat16* out) {
  VecF shift[kVectors], total[kVectors], even[kVectors], odd[kVectors];
  load_all(largest + lane, shift);
  for (int v = 0; v < kVectors; ++v) total[v] = VecF{};
  Keys key(tile);
  for (int64_t k = 0; k < tile.keys; k += 2) {
    exp_key<3>(scores + k * tile.lanes, key, lane, shift, even);
    key.next();
    for (int v = 0; v < kVectors; ++v) odd[v] = VecF{};
    if (k + 1 < tile.keys) {
      exp_key<3>(scores + (k + 1) * tile.lanes, key, lane, shift, odd);
      key.next();
    }
    for (int v = 0; v < kVectors; ++v) {
      total[v] += even[v] + odd[v];
      store_pairs(out + k * tile.lanes + 2 * (lane + v * kLanes), even[v], odd[v]);
    }
  }
  add_all(sums + lane, total);
}

// One key of the backward pass: p = exp(logit - lse), unless kWeighed: then it is in scores. ds = p * (dp - delta).
template <bool kWeighed, int kDegree, typename Keys, int kVectors, typename Tile>
RSK_INLINE void gradient_key(const Tile& tile, int64_t k, const Keys& key, int64_t lane,
    const VecF (&lse)[kVectors], const VecF (&delta)[kVectors], VecF (&p)[kVectors], VecF (&ds)[kVectors]) {
  const float *scores = tile.scores + k * tile.lanes, *dp = tile.dp + k * tile.lanes;
  if constexpr (kWeighed) {
    load_all(scores + lane, p);
  } else {
    exp_key<kDegree>(scores, key, lane, lse, p);
  }
  for (int v = 0; v < kVectors; ++v) ds[v] = p[v] * (load(dp + lane + v * kLanes) - delta[v]);
}

// fp32: probabilities over scores, ds over dp.
template <bool kWeighed, typename Keys, int kVectors, typename Tile>
inline void gradient_block(const Tile& tile, int64_t lane, float* p_rows, float* ds_rows, float*) {
  VecF lse[kVectors], delta[kVectors], p[kVectors], ds[kVectors];
  load_all(tile.lse + lane, lse);
  load_all(tile.delta + lane, delta);
  typename Keys::template Sums<Tile, kVectors> sums(tile, lane);
  Keys key(tile);
  for (int64_t k = 0; k < tile.keys; ++k, key.next()) {
    const int64_t at = k * tile.lanes + lane;
    gradient_key<kWeighed, 5>(tile, k, key, lane, lse, delta, p, ds);
    sums.add(key, ds);
    if constexpr (!kWeighed) store_all(p_rows + at, p);
    store_all(ds_rows + at, ds);
  }
  sums.flush();
}

// bf16: operands by rows, and ds by pairs of keys, too.
template <bool kWeighed, typename Keys, int kVectors, typename Tile>
inline void gradient_block(
    const Tile& tile, int64_t lane, c10::BFloat16* p_rows, c10::BFloat16* ds_rows, c10::BFloat16* ds_pairs) {
  VecF lse[kVectors], delta[kVectors], p[kVectors], even[kVectors], odd[kVectors];
  load_all(tile.lse + lane, lse);
  load_all(tile.delta + lane, delta);
  typename Keys::template Sums<Tile, kVectors> sums(tile, lane);
  Keys key(tile);
  for (int64_t k = 0; k < tile.keys; k += 2) {
    int64_t at = k * tile.lanes + lane;
    gradient_key<kWeighed, 3>(tile, k, key, lane, lse, delta, p, even);
    sums.add(key, even);
    store_all(p_rows + at, p);
    store_all(ds_rows + at, even);
    key.next();
    for (int v = 0; v < kVectors; ++v) odd[v] = VecF{};
    if (k + 1 < tile.keys) {
      at += tile.lanes;
      gradient_key<kWeighed, 3>(tile, k + 1, key, lane, lse, delta, p, odd);
      sums.add(key, odd);
      store_all(p_rows + at, p);
      store_all(ds_rows + at, odd);
      key.next();
    }
    for (int v = 0; v < kVectors; ++v) {
      store_pairs(ds_pairs + k * tile.lanes + 2 * (lane + v * kLanes), even[v], odd[v]);
    }
  }
  sums.flush();
}

// Blocks of all lanes: four vectors of queries at a time, the rest one by one.
template <typename Keys, typename Tile>
RSK_INLINE void row_max_of(const Tile& tile, const float* scores, float* largest) {
  int64_t lane = 0;
  for (; lane + 4 * kLanes <= tile.lanes; lane += 4 * kLanes) max_block<Keys, 4>(tile, lane, scores, largest);
  for (; lane < tile.lanes; lane += kLanes) max_block<Keys, 1>(tile, lane, scores, largest);
}

template <typename Keys, typename Tile, typename Operand>
RSK_INLINE void softmax_of(
    const Tile& tile, const float* scores, const float* largest, float* sums, Operand* out) {
  int64_t lane = 0;
  for (; lane + 4 * kLanes <= tile.lanes; lane += 4 * kLanes) {
    exp_block<Keys, 4>(tile, lane, scores, largest, sums, out);
  }
  for (; lane < tile.lanes; lane += kLanes) exp_block<Keys, 1>(tile, lane, scores, largest, sums, out);
}

template <bool kWeighed, typename Keys, typename Tile, typename Operand>
RSK_INLINE void score_gradient_of(const Tile& tile, Operand* p_rows, Operand* ds_rows, Operand* ds_pairs) {
  int64_t lane = 0;
  for (; lane + 4 * kLanes <= tile.lanes; lane += 4 * kLanes) {
    gradient_block<kWeighed, Keys, 4>(tile, lane, p_rows, ds_rows, ds_pairs);
  }
  for (; lane < tile.lanes; lane += kLanes) {
    gradient_block<kWeighed, Keys, 1>(tile, lane, p_rows, ds_rows, ds_pairs);
  }
}
