// cross_attention of queries that attend to some keys only (Mask2Former), and of few queries on many keys (SAM's
// tokens on the image), both passes. Scores lie queries x keys:
//   scores = q K^T,  p = softmax(scale * scores),  out = p V
//   dp = do V^T,  ds = p * (dp - delta),  dq = ds K,  dK = ds^T q,  dV = p^T do
//
// For each tile of keys the queries that attend to any of them are gathered into one dense tile: masks of objects
// leave most queries out of most tiles of 32 keys. What remains masked in a tile has its probability set to 0.
//
// A task is a part of the keys of one head. What the parts add to out and dq is merged in their order; the cut
// depends on the shape alone.
#include "cross_attention_rows.h"

#include <cmath>
#include <limits>

#define RSK_SIMD_FILE "cross_attention_rows_simd.h"
#include "foreach_isa.h"

namespace rskernels::cross {

template <typename Io>
const RowKernels<Io>& row_kernels() {
  return RSK_AT_ISA_LEVEL(cross_simd::kRowKernels<Io>);
}
template const RowKernels<float>& row_kernels();
template const RowKernels<at::BFloat16>& row_kernels();

namespace rows {
namespace {

template <typename Io>
class Forward : Worker<Io> {
 public:
  Forward(const Layout& layout, const Bits& bits, const KeyCut& cut, const Parts& parts, const Tensors& call)
      : Worker<Io>(layout, bits, cut), parts_(parts), q_(call.q), k_(call.k), v_(call.v) {
    const int64_t row = layout.row_size, rows = this->most_rows();
    q_rows_ = take(layout.queries * row);
    sums_ = take(layout.queries * kSumLanes);
    gathered_ = take(rows * row);
    factors_ = take(rows);
    scores_ = take(rows * cut.tile);
    for (float** keys : {&k_t_, &v_rows_}) *keys = take(cut.tile * row);
  }

  // Heads are innermost: they lie side by side in memory.
  void run(int64_t task) {
    const Layout& layout = this->layout_;
    const int64_t head = task % layout.heads, part = task / layout.heads % this->cut_.parts;
    const int64_t batch = task / layout.heads / this->cut_.parts;
    this->load_queries(q_, batch, head, layout.scale * kLog2e, q_rows_);
    float* out = parts_.at(batch * layout.heads + head, part);
    float* largest = out + layout.queries * layout.row_size;
    std::fill(out, largest, 0.0f);
    std::fill_n(largest, layout.queries, std::numeric_limits<float>::lowest());
    std::fill_n(sums_, layout.queries * kSumLanes, 0.0f);
    const int64_t last = this->cut_.first_tile(part + 1) - 1;
    for (int64_t t = this->cut_.first_tile(part); t <= last; ++t) {
      bool loaded = false;
      this->for_attending(batch, t, [&](const RowTile& tile) {
        if (!loaded) load_keys(batch, head, t, tile.lanes);
        if (!loaded && t < last) prefetch_keys(batch, head, t + 1);
        loaded = true;
        attend(tile, out, largest);
      });
    }
    this->simd_.reduce_sums(layout.queries, sums_, largest + layout.queries);
  }

 private:
  float* take(int64_t n) { return this->scratch_.template take<float>(n); }

  void load_keys(int64_t batch, int64_t head, int64_t t, int64_t lanes) {
    this->load_columns(k_, batch, head, t, lanes, k_t_);
    this->load_rows(v_, batch, head, t, lanes, v_rows_);
    if (this->layout_.drop_first && t == 0) std::fill_n(v_rows_, this->layout_.row_size, 0.0f);
  }

  void prefetch_keys(int64_t batch, int64_t head, int64_t t) {
    this->prefetch(k_, batch, head, t);
    this->prefetch(v_, batch, head, t);
  }

  void attend(const RowTile& tile, float* out, float* largest) {
    const int64_t row = this->layout_.row_size, lanes = tile.lanes;
    const float* q = this->rows_of(tile, q_rows_, gathered_);
    tile_product(tile.rows, lanes, this->layout_.dim, q, row, k_t_, lanes, scores_, lanes, false);
    this->simd_.softmax(tile, scores_, largest, sums_, factors_);
    tile_product(tile.rows, row, lanes, scores_, lanes, v_rows_, row, this->tile_rows_, row, false);
    this->simd_.add_rows(tile, this->tile_rows_, factors_, row, out);
  }

  const Parts& parts_;
  const Rows<const Io> q_, k_, v_;
  float *q_rows_, *sums_, *gathered_, *factors_, *scores_, *k_t_, *v_rows_;
};

// Adds up the parts of a query.
template <typename Io>
class MergeForward {
 public:
  MergeForward(const Layout& layout, const Parts& parts, const Tensors& call)
      : layout_(layout), parts_(parts), out_(call.out), lse_(call.lse.data_ptr<float>()) {
    sums_ = scratch_.take<float>(layout.row_size);
  }

  void run(int64_t index) {
    const int64_t unit = index / layout_.queries, q = index % layout_.queries, row = layout_.row_size;
    const int64_t at_largest = layout_.queries * row + q, at_total = at_largest + layout_.queries;
    float largest = std::numeric_limits<float>::lowest(), total = 0;
    for (int64_t p = 0; p < parts_.parts; ++p) largest = std::max(largest, parts_.at(unit, p)[at_largest]);
    std::fill_n(sums_, row, 0.0f);
    for (int64_t p = 0; p < parts_.parts; ++p) {
      const float* part = parts_.at(unit, p);
      const float factor = std::exp2(part[at_largest] - largest);
      total += part[at_total] * factor;
      for (int64_t c = 0; c < row; ++c) sums_[c] += part[q * row + c] * factor;
    }
    row_kernels<Io>().write_rows(sums_, row, 1, layout_.dim, 1.0f / total,
        out_.at(unit / layout_.heads, unit % layout_.heads, q), out_.stride);
    lse_[index] = (largest + std::log2(total)) * kLn2;
  }

 private:
  const Layout& layout_;
  const Parts& parts_;
  const Rows<Io> out_;
  float* lse_;
  Scratch scratch_;
  float* sums_;
};

template <typename Io>
void forward(const Layout& layout, const Bits& bits, const KeyCut& cut, const Tensors& call) {
  const Parts parts(layout, cut, call.q, layout.row_size + 2); // out, maximum, sum of p
  run_tasks(layout.units() * cut.parts, heads_at_once(layout),
      [&] { return Forward<Io>(layout, bits, cut, parts, call); });
  at::parallel_for(0, layout.units() * layout.queries, kQueriesOfMerge, [&](int64_t begin, int64_t end) {
    MergeForward<Io> worker(layout, parts, call);
    for (int64_t i = begin; i < end; ++i) worker.run(i);
  });
}

} // namespace
} // namespace rows

void forward_by_rows(const Layout& layout, const std::optional<at::Tensor>& mask, const Tensors& call) {
  const rows::Bits bits(layout, mask);
  const rows::KeyCut cut(layout, mask.has_value());
  call.q.scalar_type() == at::kFloat ? rows::forward<float>(layout, bits, cut, call)
                                     : rows::forward<at::BFloat16>(layout, bits, cut, call);
}

} // namespace rskernels::cross
