// cross_attention of few queries on many keys (SAM's tokens on the image), both passes.
//
// Queries along the vectors would leave most lanes empty; so here scores lie queries x keys:
//   scores = q K^T,  p = softmax(scale * scores) within a tile of keys,  out = p V
//   dp = do V^T,  ds = p * (dp - delta),  dq = ds K,  dK = ds^T q,  dV = p^T do
// with our own vector products (a handful of rows is too little for generated tiles). A task is one tile of keys
// of one unit; what the tiles add to out and dq is merged in their order, whatever the number of threads.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "cross_attention.h"

namespace rskernels::cross {
namespace {

constexpr int64_t kRows = 16;    // at most as many queries
constexpr int64_t kRowBlock = 4; // vector products go by so many rows; rows beyond the last query are zero

// What each tile of keys adds to the rows of a unit: (units, key tiles, kRows, width).
struct Parts {
  at::Tensor values;
  int64_t tiles, width;

  Parts(const Layout& layout, const at::Tensor& like, int64_t width_)
      : values(at::empty(
            {layout.units(), layout.key_tiles.count, kRows, width_}, like.options().dtype(at::kFloat))),
        tiles(layout.key_tiles.count),
        width(width_) {}
  float* at(int64_t unit, int64_t tile) const {
    return values.data_ptr<float>() + (unit * tiles + tile) * kRows * width;
  }
};

// One unit's tile of keys.
struct Tile {
  int64_t unit, batch, head, index, first, keys, lanes;

  Tile(const Layout& layout, int64_t task) {
    // Heads are innermost: they lie side by side in memory.
    head = task % layout.heads;
    index = task / layout.heads % layout.key_tiles.count;
    batch = task / layout.heads / layout.key_tiles.count;
    unit = batch * layout.heads + head;
    first = layout.key_tiles.begin(index);
    keys = layout.key_tiles.length(index);
    lanes = round_up(keys, kVector);
  }
};

int64_t tasks_of(const Layout& layout) {
  return layout.units() * layout.key_tiles.count;
}

// Neighbouring heads share cache lines and pages: a thread takes several at once.
int64_t heads_at_once(const Layout& layout) {
  return std::max<int64_t>(1, layout.heads / 2);
}

template <typename Io>
class Forward {
 public:
  Forward(
      const Layout& layout, const Parts& parts, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v)
      : layout_(layout),
        parts_(parts),
        simd_(kernels<Io, float>()),
        rows_(round_up(layout.queries, kRowBlock)),
        q_(q),
        k_(k),
        v_(v) {
    const int64_t tile = layout.key_tiles.size, row = layout.row_size;
    q_rows_ = scratch_.take<float>(kRows * row);
    k_t_ = scratch_.take<float>(tile * row);
    v_rows_ = scratch_.take<float>(tile * row);
    scores_ = scratch_.take<float>(kRows * tile);
  }

  void run(int64_t task) {
    const Tile tile(layout_, task);
    const int64_t row = layout_.row_size, dim = layout_.dim, lanes = tile.lanes;
    simd_.load_rows(q_.at(tile.batch, tile.head, 0), q_.stride, layout_.queries, dim, q_rows_, row);
    simd_.load_columns(k_.at(tile.batch, tile.head, tile.first), k_.stride, tile.keys, dim, k_t_, lanes);
    simd_.load_rows(v_.at(tile.batch, tile.head, tile.first), v_.stride, tile.keys, dim, v_rows_, row);
    if (layout_.drop_first && tile.first == 0) std::fill_n(v_rows_, row, 0.0f);
    simd_.product(rows_, lanes, dim, q_rows_, row, 1, k_t_, lanes, scores_, lanes, false);
    float* out = parts_.at(tile.unit, tile.index);
    float* largest = out + kRows * row;
    simd_.softmax_rows(layout_.queries, tile.keys, lanes, layout_.scale, scores_, largest, largest + kRows);
    simd_.product(rows_, row, lanes, scores_, lanes, 1, v_rows_, row, out, row, false);
  }

 private:
  const Layout& layout_;
  const Parts& parts_;
  const Kernels<Io, float>& simd_;
  const int64_t rows_;
  const Rows<const Io> q_, k_, v_;
  Scratch scratch_;
  float *q_rows_, *k_t_, *v_rows_, *scores_;
};

// Adds up the tiles of a unit.
template <typename Io>
class MergeForward {
 public:
  MergeForward(const Layout& layout, const Parts& parts, const at::Tensor& out, const at::Tensor& lse)
      : layout_(layout), parts_(parts), out_(out), lse_(lse.data_ptr<float>()) {
    sums_ = scratch_.take<float>(layout.row_size);
  }

  void run(int64_t unit) {
    for (int64_t q = 0; q < layout_.queries; ++q) merge_query(unit, q);
  }

 private:
  void merge_query(int64_t unit, int64_t q) {
    const int64_t row = layout_.row_size;
    float largest = std::numeric_limits<float>::lowest(), total = 0;
    for (int64_t t = 0; t < parts_.tiles; ++t) {
      const float other = parts_.at(unit, t)[kRows * row + q];
      largest = largest > other ? largest : other;
    }
    std::fill_n(sums_, row, 0.0f);
    for (int64_t t = 0; t < parts_.tiles; ++t) {
      const float* part = parts_.at(unit, t);
      const float factor = std::exp(part[kRows * row + q] - largest);
      total += part[kRows * (row + 1) + q] * factor;
      for (int64_t c = 0; c < row; ++c) sums_[c] += part[q * row + c] * factor;
    }
    Io* to = out_.at(unit / layout_.heads, unit % layout_.heads, q);
    kernels<Io, float>().write_rows(sums_, row, 1, layout_.dim, 1.0f / total, to, out_.stride);
    lse_[unit * layout_.queries + q] = largest + std::log(total);
  }

  const Layout& layout_;
  const Parts& parts_;
  const Rows<Io> out_;
  float* lse_;
  Scratch scratch_;
  float* sums_;
};

struct Gradients {
  at::Tensor grad, q, k, v, out, lse; // in
  at::Tensor dq, dk, dv;              // out
  std::array<bool, 3> wanted;
};

template <typename Io>
class Backward {
 public:
  Backward(const Layout& layout, const Parts& parts, const Gradients& call)
      : layout_(layout),
        parts_(parts),
        call_(call),
        simd_(kernels<Io, float>()),
        rows_(round_up(layout.queries, kRowBlock)),
        grad_(call.grad),
        q_(call.q),
        k_(call.k),
        v_(call.v),
        out_(call.out),
        dk_(call.dk),
        dv_(call.dv),
        lse_(call.lse.const_data_ptr<float>()) {
    const int64_t tile = layout.key_tiles.size, row = layout.row_size;
    for (float** rows : {&q_rows_, &do_rows_}) *rows = scratch_.take<float>(kRows * row);
    for (float** rows : {&k_t_, &v_t_, &k_rows_, &sums_}) *rows = scratch_.take<float>(tile * row);
    for (float** rows : {&scores_, &dp_}) *rows = scratch_.take<float>(kRows * tile);
    delta_ = scratch_.take<float>(kRows);
  }

  void run(int64_t task) {
    const Tile tile(layout_, task);
    const int64_t row = layout_.row_size, dim = layout_.dim, lanes = tile.lanes, queries = layout_.queries;
    load(tile);
    simd_.product(rows_, lanes, dim, q_rows_, row, 1, k_t_, lanes, scores_, lanes, false);
    simd_.product(rows_, lanes, dim, do_rows_, row, 1, v_t_, lanes, dp_, lanes, false);
    simd_.gradient_rows(
        queries, tile.keys, lanes, layout_.scale, lse_ + tile.unit * queries, delta_, scores_, dp_);
    if (call_.wanted[0]) {
      simd_.product(
          rows_, row, lanes, dp_, lanes, 1, k_rows_, row, parts_.at(tile.unit, tile.index), row, false);
    }
    if (call_.wanted[1]) {
      simd_.product(tile.keys, row, queries, dp_, 1, lanes, q_rows_, row, sums_, row, false);
      write(tile, layout_.scale, dk_);
    }
    if (call_.wanted[2]) {
      simd_.product(tile.keys, row, queries, scores_, 1, lanes, do_rows_, row, sums_, row, false);
      if (layout_.drop_first && tile.first == 0) std::fill_n(sums_, row, 0.0f);
      write(tile, 1.0f, dv_);
    }
  }

 private:
  void load(const Tile& tile) {
    const int64_t row = layout_.row_size, dim = layout_.dim, queries = layout_.queries;
    const Io* q = q_.at(tile.batch, tile.head, 0);
    const Io* grad = grad_.at(tile.batch, tile.head, 0);
    const Io* k = k_.at(tile.batch, tile.head, tile.first);
    const Io* v = v_.at(tile.batch, tile.head, tile.first);
    simd_.load_rows(q, q_.stride, queries, dim, q_rows_, row);
    simd_.load_rows(grad, grad_.stride, queries, dim, do_rows_, row);
    simd_.load_columns(k, k_.stride, tile.keys, dim, k_t_, tile.lanes);
    simd_.load_columns(v, v_.stride, tile.keys, dim, v_t_, tile.lanes);
    if (call_.wanted[0]) simd_.load_rows(k, k_.stride, tile.keys, dim, k_rows_, row);
    simd_.dot_rows(grad, grad_.stride, out_.at(tile.batch, tile.head, 0), out_.stride, queries, dim, delta_);
    if (!layout_.drop_first || tile.first > 0) return;
    for (int64_t c = 0; c < dim; ++c) v_t_[c * tile.lanes] = 0;
  }

  void write(const Tile& tile, float factor, const Rows<Io>& to) {
    simd_.write_rows(sums_, layout_.row_size, tile.keys, layout_.dim, factor,
        to.at(tile.batch, tile.head, tile.first), to.stride);
  }

  const Layout& layout_;
  const Parts& parts_;
  const Gradients& call_;
  const Kernels<Io, float>& simd_;
  const int64_t rows_;
  const Rows<const Io> grad_, q_, k_, v_, out_;
  const Rows<Io> dk_, dv_;
  const float* lse_;
  Scratch scratch_;
  float *q_rows_, *do_rows_, *k_t_, *v_t_, *k_rows_, *sums_, *scores_, *dp_, *delta_;
};

// Adds up dq of a unit, tile after tile, and writes it.
template <typename Io>
struct MergeBackward {
  const Layout& layout;
  const Parts& parts;
  const Rows<Io> dq;

  void run(int64_t unit) {
    const int64_t n = layout.queries * layout.row_size;
    float* sums = parts.at(unit, 0);
    for (int64_t t = 1; t < parts.tiles; ++t) {
      const float* part = parts.at(unit, t);
      for (int64_t i = 0; i < n; ++i) sums[i] += part[i];
    }
    kernels<Io, float>().write_rows(sums, layout.row_size, layout.queries, layout.dim, layout.scale,
        dq.at(unit / layout.heads, unit % layout.heads, 0), dq.stride);
  }
};

template <typename Io>
void forward(const Layout& layout, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const at::Tensor& out, const at::Tensor& lse) {
  const Parts parts(layout, q, layout.row_size + 2); // out, maximum, sum of p
  run_tasks(tasks_of(layout), heads_at_once(layout), [&] { return Forward<Io>(layout, parts, q, k, v); });
  run_tasks(layout.units(), 1, [&] { return MergeForward<Io>(layout, parts, out, lse); });
}

template <typename Io>
void backward(const Layout& layout, const Gradients& call) {
  const Parts parts(layout, call.q, layout.row_size); // dq
  run_tasks(tasks_of(layout), heads_at_once(layout), [&] { return Backward<Io>(layout, parts, call); });
  if (!call.wanted[0]) return;
  run_tasks(layout.units(), 1, [&] { return MergeBackward<Io>{layout, parts, Rows<Io>(call.dq)}; });
}

} // namespace

void forward_of_few_queries(const Layout& layout, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const at::Tensor& out, const at::Tensor& lse) {
  q.scalar_type() == at::kFloat ? forward<float>(layout, q, k, v, out, lse)
                                : forward<at::BFloat16>(layout, q, k, v, out, lse);
}

void backward_of_few_queries(const Layout& layout, const at::Tensor& grad, const at::Tensor& q,
    const at::Tensor& k, const at::Tensor& v, const at::Tensor& out, const at::Tensor& lse,
    const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& dv, const std::array<bool, 3>& wanted) {
  const Gradients call{grad, q, k, v, out, lse, dq, dk, dv, wanted};
  q.scalar_type() == at::kFloat ? backward<float>(layout, call) : backward<at::BFloat16>(layout, call);
}

} // namespace rskernels::cross
