// The backward pass of cross_attention_rows.cpp.
#include "cross_attention_rows.h"

namespace rskernels::cross {
namespace rows {
namespace {

// Batch entries that one task of the backward pass takes: all of them, where they share keys.
int64_t entries_together(const Layout& layout, const Gradients& call) {
  return call.k.size(0) < layout.batch || call.v.size(0) < layout.batch ? layout.batch : 1;
}

template <typename Io>
class Backward : Worker<Io> {
 public:
  Backward(const Layout& layout, const Bits& bits, const KeyCut& cut, const Parts& parts, const Gradients& call)
      : Worker<Io>(layout, bits, cut),
        parts_(parts),
        call_(call),
        k_shared_(call.k.size(0) < layout.batch),
        v_shared_(call.v.size(0) < layout.batch),
        together_(entries_together(layout, call)),
        grad_(call.grad),
        q_(call.q),
        k_(call.k),
        v_(call.v),
        out_(call.out),
        dk_(call.dk),
        dv_(call.dv),
        lse_data_(call.lse.const_data_ptr<float>()) {
    const int64_t row = layout.row_size, rows = this->most_rows();
    for (float** all : {&q_rows_, &do_rows_}) *all = take(together_ * layout.queries * row);
    for (float** all : {&lse_, &delta_}) *all = take(together_ * layout.queries);
    out_rows_ = take(layout.queries * row);
    for (float** gathered : {&q_gathered_, &do_gathered_}) *gathered = take(rows * row);
    for (float** scores : {&scores_, &dp_}) *scores = take(rows * cut.tile);
    for (float** keys : {&k_t_, &v_t_, &k_rows_, &dk_sums_, &dv_sums_}) *keys = take(cut.tile * row);
  }

  // A part of the keys of one head; batch entries that share keys follow one another in one task.
  void run(int64_t task) {
    const Layout& layout = this->layout_;
    const int64_t head = task % layout.heads, part = task / layout.heads % this->cut_.parts;
    const int64_t first = task / layout.heads / this->cut_.parts * together_;
    for (int64_t b = 0; b < together_; ++b) load_unit(first + b, head, part, b);
    const int64_t end = this->cut_.first_tile(part + 1);
    for (int64_t t = this->cut_.first_tile(part); t < end; ++t) {
      for (int64_t b = 0; b < together_; ++b) {
        if (b == 0 || !k_shared_) clear(dk_sums_);
        if (b == 0 || !v_shared_) clear(dv_sums_);
        bool loaded = false;
        this->for_attending(first + b, t, [&](const RowTile& tile) {
          if (!loaded) load_keys(first + b, head, t, tile.lanes);
          if (!loaded && t + 1 < end) prefetch_keys(first + b, head, t + 1);
          loaded = true;
          add(tile, b, parts_.at((first + b) * layout.heads + head, part));
        });
        const bool last = b + 1 == together_;
        if (call_.wanted[1] && (last || !k_shared_)) write(dk_sums_, kLn2, dk_, first + b, head, t);
        if (!call_.wanted[2] || (!last && v_shared_)) continue;
        if (layout.drop_first && t == 0) std::fill_n(dv_sums_, layout.row_size, 0.0f);
        write(dv_sums_, 1.0f, dv_, first + b, head, t);
      }
    }
  }

 private:
  bool one_tile() const { return this->layout_.keys <= this->cut_.tile; }
  float* take(int64_t n) { return this->scratch_.template take<float>(n); }
  void clear(float* sums) { std::fill_n(sums, this->cut_.tile * this->layout_.row_size, 0.0f); }

  // What the unit's queries bring, entry b of those of a task.
  void load_unit(int64_t batch, int64_t head, int64_t part, int64_t b) {
    const Layout& layout = this->layout_;
    const int64_t queries = layout.queries, unit = batch * layout.heads + head, rows = b * queries;
    this->load_queries(q_, batch, head, layout.scale * kLog2e, q_rows_ + rows * layout.row_size);
    this->load_queries(grad_, batch, head, 1.0f, do_rows_ + rows * layout.row_size);
    for (int64_t q = 0; q < queries; ++q) lse_[rows + q] = lse_data_[unit * queries + q] * kLog2e;
    if (call_.wanted[0]) std::fill_n(parts_.at(unit, part), queries * layout.row_size, 0.0f);
    if (one_tile()) return;
    // do . out in the order in which a product sums do . v: where one key takes all, dp - delta is 0.
    const int64_t row = layout.row_size;
    this->load_queries(out_, batch, head, 1.0f, out_rows_);
    for (int64_t q = 0; q < queries; ++q) {
      tile_product(1, 1, layout.dim, do_rows_ + (rows + q) * row, row, out_rows_ + q * row, 1,
          delta_ + rows + q, 1, false);
    }
  }

  void load_keys(int64_t batch, int64_t head, int64_t t, int64_t lanes) {
    this->load_columns(k_, batch, head, t, lanes, k_t_);
    this->load_columns(v_, batch, head, t, lanes, v_t_);
    if (call_.wanted[0]) this->load_rows(k_, batch, head, t, lanes, k_rows_);
    if (!this->layout_.drop_first || t > 0) return;
    for (int64_t c = 0; c < this->layout_.dim; ++c) v_t_[c * lanes] = 0;
  }

  void prefetch_keys(int64_t batch, int64_t head, int64_t t) {
    this->prefetch(k_, batch, head, t);
    this->prefetch(v_, batch, head, t);
    if (call_.wanted[1]) this->prefetch(dk_, batch, head, t);
    if (call_.wanted[2]) this->prefetch(dv_, batch, head, t);
  }

  void add(const RowTile& tile, int64_t b, float* dq) {
    const int64_t row = this->layout_.row_size, dim = this->layout_.dim, lanes = tile.lanes;
    const int64_t all = b * this->layout_.queries;
    const float* q = this->rows_of(tile, q_rows_ + all * row, q_gathered_);
    const float* grad = this->rows_of(tile, do_rows_ + all * row, do_gathered_);
    tile_product(tile.rows, lanes, dim, q, row, k_t_, lanes, scores_, lanes, false);
    tile_product(tile.rows, lanes, dim, grad, row, v_t_, lanes, dp_, lanes, false);
    this->simd_.gradient(tile, lse_ + all, one_tile() ? nullptr : delta_ + all, scores_, dp_);
    if (call_.wanted[0]) {
      tile_product(tile.rows, row, lanes, dp_, lanes, k_rows_, row, this->tile_rows_, row, false);
      this->simd_.add_rows(tile, this->tile_rows_, this->no_factors_, row, dq);
    }
    if (call_.wanted[1]) {
      tile_product_columns(lanes, row, tile.rows, dp_, lanes, q, row, dk_sums_, row, true);
    }
    if (call_.wanted[2]) {
      tile_product_columns(lanes, row, tile.rows, scores_, lanes, grad, row, dv_sums_, row, true);
    }
  }

  void write(const float* sums, float factor, const Rows<Io>& to, int64_t batch, int64_t head, int64_t t) {
    this->simd_.write_rows(sums, this->layout_.row_size, this->keys_of(t), this->layout_.dim, factor,
        to.at(batch, head, t * this->cut_.tile), to.stride);
  }

  const Parts& parts_;
  const Gradients& call_;
  const bool k_shared_, v_shared_;
  const int64_t together_;
  const Rows<const Io> grad_, q_, k_, v_, out_;
  const Rows<Io> dk_, dv_;
  const float* lse_data_;
  float *q_rows_, *do_rows_, *out_rows_, *lse_, *delta_, *q_gathered_, *do_gathered_, *scores_, *dp_;
  float *k_t_, *v_t_, *k_rows_, *dk_sums_, *dv_sums_;
};

// Adds up dq of a query, part after part, and writes it.
template <typename Io>
struct MergeBackward {
  const Layout& layout;
  const Parts& parts;
  const Rows<Io> dq;

  void run(int64_t index) const {
    const int64_t unit = index / layout.queries, q = index % layout.queries, row = layout.row_size;
    float* sum = parts.at(unit, 0) + q * row;
    add_slices(sum, parts.parts, parts.size, row, sum);
    row_kernels<Io>().write_rows(
        sum, row, 1, layout.dim, layout.scale, dq.at(unit / layout.heads, unit % layout.heads, q), dq.stride);
  }
};

template <typename Io>
void backward(const Layout& layout, const Bits& bits, const KeyCut& cut, const Gradients& call) {
  const Parts parts(layout, cut, call.q, call.wanted[0] ? layout.row_size : 0); // dq
  const int64_t tasks = layout.units() * cut.parts / entries_together(layout, call);
  run_tasks(tasks, heads_at_once(layout), [&] { return Backward<Io>(layout, bits, cut, parts, call); });
  if (!call.wanted[0]) return;
  at::parallel_for(0, layout.units() * layout.queries, kQueriesOfMerge, [&](int64_t begin, int64_t end) {
    const MergeBackward<Io> worker{layout, parts, Rows<Io>(call.dq)};
    for (int64_t i = begin; i < end; ++i) worker.run(i);
  });
}

} // namespace
} // namespace rows

void backward_by_rows(const Layout& layout, const std::optional<at::Tensor>& mask, const Gradients& call) {
  const rows::Bits bits(layout, mask);
  const rows::KeyCut cut(layout, mask.has_value());
  call.q.scalar_type() == at::kFloat ? rows::backward<float>(layout, bits, cut, call)
                                     : rows::backward<at::BFloat16>(layout, bits, cut, call);
}

} // namespace rskernels::cross
