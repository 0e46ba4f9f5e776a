// cross_attention on the CPU: the backward pass. Meaning and formulas: rskernels/ops/cross_attention.py.
//
// For each tile of queries and each tile of keys (everything keys x queries, as in the forward pass):
//   scores = K q^T,  dp = V do^T                                     [two products]
//   p = exp(scale * scores - lse),  ds = p * (dp - delta)            [one vector pass]
//   dV += p do,  dK += ds q,  dq^T += K^T ds                         [three products]
// where delta_i = do_i . out_i, or sum_j p_ij dp_ij where one tile holds all keys.
//
// Determinism: sums over queries run in order within a part of the queries, sums over keys within a part of the
// keys; parts, and the batch entries that share keys, are added in order. The cut depends on the shape alone.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "cross_attention.h"

namespace rskernels::cross {
namespace {

// The queries of a unit are cut into parts, each with its own sums of dk and dv, until there are this many tasks:
// few, as the sums are large.
constexpr int64_t kEnoughTasks = 24;
constexpr int64_t kLeastQueryTilesOfPart = 4;
constexpr int64_t kKeysOfMerge = 64; // rows of dk or dv that one task adds up

Cut cut_of(const Layout& layout) {
  if (layout.key_parts > 1) return {layout, 1};
  const int64_t most = std::max<int64_t>(1, layout.query_tiles.count / kLeastQueryTilesOfPart);
  return {layout, std::clamp<int64_t>(kEnoughTasks / layout.units(), 1, most)};
}

struct Call : Gradients {
  at::Tensor key_sums;   // (B, query parts, heads, 2, M, row) dk and dv, where they have several terms
  at::Tensor query_sums; // (units, query tiles, key parts, dim x lanes) dq^T, where the keys are cut

  bool keys() const { return wanted[1] || wanted[2]; }
};

template <typename Io, typename Operand>
class Backward : Worker<Io, Operand> {
 public:
  Backward(const Layout& layout, const Cut& cut, const Call& call)
      : Worker<Io, Operand>(layout),
        cut_(cut),
        call_(call),
        q_(call.q),
        k_(call.k),
        v_(call.v),
        grad_(call.grad),
        out_(call.out),
        dq_(call.dq),
        dk_out_(call.dk),
        dv_out_(call.dv),
        lse_data_(call.lse.const_data_ptr<float>()) {
    const int64_t queries = layout.query_tiles.size, row = layout.row_size, keys = this->keys_size();
    for (Operand** rows : {&k_rows_, &v_rows_}) *rows = take<Operand>(keys);
    k_columns_ = std::is_same_v<Operand, float> ? k_rows_ : take<Operand>(keys);
    if (!call.key_sums.defined() && call.keys()) own_sums_ = take<float>(2 * keys);
    for (Operand** rows : {&q_right_, &q_by_query_, &do_right_, &do_by_query_})
      *rows = take<Operand>(queries * row);
    const int64_t tile = layout.key_tiles.size * queries;
    scores_ = take<float>(tile);
    dp_ = take<float>(tile);
    if constexpr (std::is_same_v<Operand, float>) {
      p_rows_ = scores_;
      ds_rows_ = ds_pairs_ = dp_;
    } else {
      for (Operand** rows : {&p_rows_, &ds_rows_, &ds_pairs_}) *rows = take<Operand>(tile);
    }
    for (float** lanes : {&lse_, &delta_, &factors_}) *lanes = take<float>(queries);
    std::fill_n(factors_, queries, layout.scale);
    own_dq_ = take<float>(queries * row);
  }

  void run(int64_t index) {
    const Task task = cut_.task(index);
    load_keys(task);
    for (int64_t tile = task.first_query_tile; tile < task.last_query_tile; ++tile) add_queries(task, tile);
    if (own_sums_ == nullptr) return;
    const int64_t first = layout_.key_tiles.begin(task.first_key_tile);
    write_keys(task.batch, task.head, first, this->keys_of(task), key_sums(task, 0), key_sums(task, 1));
  }

  // Adds up the sums of dk and dv: task `index` is a block of keys of one head, for every batch entry that has
  // keys of its own.
  void merge_keys(int64_t index) {
    const int64_t blocks = (layout_.keys + kKeysOfMerge - 1) / kKeysOfMerge;
    const int64_t head = index / blocks, first = index % blocks * kKeysOfMerge;
    const int64_t count = std::min(kKeysOfMerge, layout_.keys - first), n = count * layout_.row_size;
    if (merged_ == nullptr) merged_ = take<float>(2 * kKeysOfMerge * layout_.row_size);
    for (int64_t which = 0; which < 2; ++which) {
      if (!call_.wanted[1 + which]) continue;
      const int64_t batches = (which == 0 ? call_.k : call_.v).size(0);
      const int64_t terms = layout_.batch / batches * cut_.query_parts;
      for (int64_t batch = 0; batch < batches; ++batch) {
        const float* from = sums_at(batch * terms, head, which) + first * layout_.row_size;
        add_slices(from, terms, 2 * layout_.heads * layout_.keys * layout_.row_size, n, merged_);
        write_keys(batch, head, first, count, which == 0 ? merged_ : nullptr, which == 1 ? merged_ : nullptr);
      }
    }
  }

  // Adds up dq^T: task `index` is one query tile of one unit.
  void merge_queries(int64_t index) {
    const int64_t unit = index / layout_.query_tiles.count, tile = index % layout_.query_tiles.count;
    const int64_t n = layout_.dim * round_up(layout_.query_tiles.length(tile), kVector);
    const int64_t size = layout_.dim * layout_.query_tiles.size;
    add_slices(query_sums(unit, tile, 0), layout_.key_parts, size, n, own_dq_);
    write_queries(unit / layout_.heads, unit % layout_.heads, tile, own_dq_);
  }

 private:
  using Worker<Io, Operand>::layout_;
  using Worker<Io, Operand>::simd_;
  using Worker<Io, Operand>::scratch_;

  template <typename T>
  T* take(int64_t n) {
    return scratch_.template take<T>(n);
  }

  // All sums of dk (which = 0) or dv (1) of one head, from one part of the queries of one batch entry.
  float* sums_at(int64_t batch_and_part, int64_t head, int64_t which) const {
    return call_.key_sums.template data_ptr<float>() +
           ((batch_and_part * layout_.heads + head) * 2 + which) * layout_.keys * layout_.row_size;
  }

  // The same from the task's first key on.
  float* key_sums(const Task& task, int64_t which) const {
    if (own_sums_ != nullptr) return own_sums_ + which * this->keys_size();
    return sums_at(task.batch * cut_.query_parts + task.query_part, task.head, which) +
           layout_.key_tiles.begin(task.first_key_tile) * layout_.row_size;
  }

  float* query_sums(int64_t unit, int64_t tile, int64_t part) const {
    const int64_t size = layout_.dim * layout_.query_tiles.size;
    return call_.query_sums.template data_ptr<float>() +
           ((unit * layout_.query_tiles.count + tile) * layout_.key_parts + part) * size;
  }

  void load_keys(const Task& task) {
    this->pack_keys(k_, task, k_rows_);
    this->pack_keys(v_, task, v_rows_);
    this->drop_first(task, v_rows_, 1);
    if (call_.wanted[0] && k_columns_ != k_rows_) this->pack_key_columns(k_, task, k_columns_);
    if (!call_.keys()) return;
    for (int64_t which = 0; which < 2; ++which) {
      std::fill_n(key_sums(task, which), this->keys_of(task) * layout_.row_size, 0.0f);
    }
  }

  void add_queries(const Task& task, int64_t query_tile) {
    load_queries(task, query_tile);
    const bool alone = layout_.key_parts == 1;
    const int64_t unit = task.batch * layout_.heads + task.head;
    float* dq = alone || !call_.wanted[0] ? own_dq_ : query_sums(unit, query_tile, task.key_part);
    for (int64_t t = task.first_key_tile; t < task.last_key_tile; ++t) {
      add_pair(task, this->score_tile(query_tile, t), t - task.first_key_tile, dq);
    }
    if (alone && call_.wanted[0]) write_queries(task.batch, task.head, query_tile, dq);
  }

  void load_queries(const Task& task, int64_t query_tile) {
    const int64_t head = task.head, row = layout_.row_size, dim = layout_.dim;
    const int64_t first = layout_.query_tiles.begin(query_tile), count = layout_.query_tiles.length(query_tile);
    const int64_t lanes = round_up(count, kVector);
    const Io* q = q_.at(task.batch, head, first);
    const Io* grad = grad_.at(task.batch, head, first);
    simd_.load_columns(q, q_.stride, count, dim, q_right_, lanes);
    simd_.load_columns(grad, grad_.stride, count, dim, do_right_, lanes);
    simd_.load_rows(q, q_.stride, count, dim, q_by_query_, row);
    simd_.load_rows(grad, grad_.stride, count, dim, do_by_query_, row);
    // Lanes without a query add nothing: their q and do are zero.
    std::fill(lse_ + count, lse_ + lanes, 0.0f);
    std::fill(delta_ + count, delta_ + lanes, 0.0f);
    std::copy_n(lse_data_ + (task.batch * layout_.heads + head) * layout_.queries + first, count, lse_);
    if (layout_.key_tiles.count == 1) return; // row_delta finds delta
    simd_.dot_rows(grad, grad_.stride, out_.at(task.batch, head, first), out_.stride, count, dim, delta_);
  }

  // Tile t of the task's keys against the tile of queries.
  void add_pair(const Task& task, const ScoreTile& scores, int64_t t, float* dq) {
    const int64_t lanes = scores.lanes, keys = scores.keys, dim = layout_.dim, row = layout_.row_size;
    const int64_t at = t * layout_.key_tiles.size * row;
    tile_product(keys, lanes, depth<Operand>(dim), k_rows_ + at, row, q_right_, lanes, scores_, lanes, false);
    tile_product(keys, lanes, depth<Operand>(dim), v_rows_ + at, row, do_right_, lanes, dp_, lanes, false);
    const GradientTile tile{scores, scores_, dp_, lse_, delta_};
    if (layout_.key_tiles.count == 1) simd_.row_delta(tile, delta_);
    simd_.score_gradient(tile, p_rows_, ds_rows_, ds_pairs_);
    if (call_.wanted[1]) {
      tile_product(keys, row, lanes, ds_rows_, lanes, q_by_query_, row, key_sums(task, 0) + at, row, true);
    }
    if (call_.wanted[2]) {
      tile_product(keys, row, lanes, p_rows_, lanes, do_by_query_, row, key_sums(task, 1) + at, row, true);
    }
    if (call_.wanted[0]) {
      tile_product_columns(
          dim, lanes, depth<Operand>(keys), k_columns_ + at, row, ds_pairs_, lanes, dq, lanes, t > 0);
    }
  }

  void write_queries(int64_t batch, int64_t head, int64_t query_tile, const float* dq) {
    const int64_t count = layout_.query_tiles.length(query_tile), first = layout_.query_tiles.begin(query_tile);
    simd_.write_columns(
        dq, round_up(count, kVector), layout_.dim, factors_, count, dq_.at(batch, head, first), dq_.stride);
  }

  // Rows of dk and dv from their sums; null: not this one.
  void write_keys(int64_t batch, int64_t head, int64_t first, int64_t count, float* dk, float* dv) {
    const int64_t row = layout_.row_size, dim = layout_.dim;
    if (call_.wanted[1] && dk != nullptr) {
      simd_.write_rows(dk, row, count, dim, layout_.scale, dk_out_.at(batch, head, first), dk_out_.stride);
    }
    if (call_.wanted[2] && dv != nullptr) {
      if (layout_.drop_first && first == 0) std::fill_n(dv, row, 0.0f);
      simd_.write_rows(dv, row, count, dim, 1.0f, dv_out_.at(batch, head, first), dv_out_.stride);
    }
  }

  const Cut& cut_;
  const Call& call_;
  const Rows<const Io> q_, k_, v_, grad_, out_;
  const Rows<Io> dq_, dk_out_, dv_out_;
  const float* lse_data_;
  Operand *k_rows_, *v_rows_, *k_columns_, *q_right_, *q_by_query_, *do_right_, *do_by_query_;
  Operand *p_rows_, *ds_rows_, *ds_pairs_;
  float *own_sums_ = nullptr, *merged_ = nullptr, *scores_, *dp_, *lse_, *delta_, *factors_, *own_dq_;
};

template <typename Io, typename Operand>
void backward(const Layout& layout, const Cut& cut, const Call& call) {
  using Pass = Backward<Io, Operand>;
  const auto worker = [&] { return Pass(layout, cut, call); };
  run_tasks(cut.tasks(), 1, worker);
  if (call.key_sums.defined()) {
    const int64_t blocks = (layout.keys + kKeysOfMerge - 1) / kKeysOfMerge;
    run_tasks(layout.heads * blocks, 1, [&] { return TasksOf<&Pass::merge_keys>{worker()}; });
  }
  if (call.query_sums.defined()) {
    run_tasks(
        layout.units() * layout.query_tiles.count, 1, [&] { return TasksOf<&Pass::merge_queries>{worker()}; });
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> cross_attention_backward(const at::Tensor& grad,
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& out, const at::Tensor& lse,
    const std::optional<at::Tensor>& mask, double scale, bool drop_first_key_value,
    std::array<bool, 3> wanted) {
  check_arguments(q, k, v, mask);
  const Check check{"cross_attention"};
  check.same("the gradient", grad, q.sizes(), q.scalar_type());
  check.same("the output", out, q.sizes(), q.scalar_type());
  check.same("the log-sum-exp", lse, q.sizes().slice(0, 3), at::kFloat);
  const auto gradient_of = [&](const at::Tensor& t, bool asked) {
    return asked ? empty_tokens(t.size(0), t, t.size(2)) : at::empty({0, 0, 0, 0}, t.options());
  };
  Call call;
  call.wanted = wanted;
  call.dq = gradient_of(q, wanted[0]);
  call.dk = gradient_of(k, wanted[1]);
  call.dv = gradient_of(v, wanted[2]);
  if (q.numel() == 0) {
    call.dk.zero_();
    call.dv.zero_();
    return {call.dq, call.dk, call.dv};
  }
  call.grad = with_contiguous_rows(grad);
  call.q = with_contiguous_rows(q);
  call.k = with_contiguous_rows(k);
  call.v = with_contiguous_rows(v);
  call.out = with_contiguous_rows(out);
  call.lse = lse.contiguous();

  const Layout layout(q, k, v, mask, scale, drop_first_key_value);
  if (layout.few_keys || layout.by_rows) {
    layout.few_keys ? backward_of_few_keys(layout, call) : backward_by_rows(layout, mask, call);
    return {call.dq, call.dk, call.dv};
  }
  const Cut cut = cut_of(layout);
  const auto floats = q.options().dtype(at::kFloat);
  const bool shared = layout.batch > 1 && (k.size(0) == 1 || v.size(0) == 1);
  if (call.keys() && (cut.query_parts > 1 || shared)) {
    call.key_sums =
        at::empty({layout.batch * cut.query_parts, layout.heads, 2, layout.keys, layout.row_size}, floats);
  }
  if (wanted[0] && layout.key_parts > 1) {
    call.query_sums = at::empty(
        {layout.units(), layout.query_tiles.count, layout.key_parts, layout.dim * layout.query_tiles.size},
        floats);
  }
  with_operand_types(q.scalar_type(),
      [&](auto io, auto operand) { backward<decltype(io), decltype(operand)>(layout, cut, call); });
  return {call.dq, call.dk, call.dv};
}

} // namespace

TORCH_LIBRARY_IMPL(rskernels, CPU, m) {
  m.impl("cross_attention_backward", &cross_attention_backward);
}

} // namespace rskernels::cross
