// The vector passes of cross_attention, compiled once per instruction set by foreach_isa.h.
#include "cross_attention_operands_simd.h"
#include "softmax_simd.h"

namespace cross_simd {

using cross::GradientTile;
using cross::ScoreTile;

using Keys = PlainKeys<cross::kLargestKeyTile>; // a tile's probabilities are one sum

// ---------------------------------------------------------------- softmax

inline void row_max(const ScoreTile& tile, const float* scores, float* largest) {
  row_max_of<Keys>(tile, scores, largest);
}

template <typename Operand>
inline void softmax(
    const ScoreTile& tile, const float* scores, const float* largest, float* sums, Operand* out) {
  softmax_of<Keys>(tile, scores, largest, sums, out);
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
    store_some(lse + q, load(largest + q) + log(sum), count - q);
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
  const Keys key(tile);
  for (int64_t k = 0; k < tile.keys; ++k) {
    exp_key<5>(tile.scores + k * tile.lanes, key, lane, lse, p);
    for (int v = 0; v < kVectors; ++v) {
      total[v] += p[v];
      weighted[v] += p[v] * load(tile.dp + k * tile.lanes + lane + v * kLanes);
    }
  }
  for (int v = 0; v < kVectors; ++v) weighted[v] /= total[v];
  store_all(delta + lane, weighted);
}

inline void row_delta(const GradientTile& tile, float* delta) {
  int64_t lane = 0;
  for (; lane + 4 * kLanes <= tile.lanes; lane += 4 * kLanes) delta_block<4>(tile, lane, delta);
  for (; lane < tile.lanes; lane += kLanes) delta_block<1>(tile, lane, delta);
}

template <typename Operand>
inline void score_gradient(const GradientTile& tile, Operand* p_rows, Operand* ds_rows, Operand* ds_pairs) {
  score_gradient_of<false, Keys>(tile, p_rows, ds_rows, ds_pairs);
}

template <typename Io, typename Operand>
inline constexpr cross::Kernels<Io, Operand> kKernels = {
    pack_rows<Io, Operand>,
    write_rows<Io>,
    write_columns<Io>,
    load_rows<Io>,
    load_columns<Io, Operand>,
    row_max,
    softmax<Operand>,
    rescale,
    merge,
    finish,
    dot_rows<Io>,
    row_delta,
    score_gradient<Operand>,
};

} // namespace cross_simd
