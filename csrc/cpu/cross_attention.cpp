// cross_attention on the CPU: the forward pass. Meaning and formulas: rskernels/ops/cross_attention.py.
//
// As in rel_pos_attention, for each tile of queries and each tile of keys, everything keys x queries:
//   scores = K q^T                                                   [product]
//   maxima, then p = exp(scale * scores - max)                       [two vector passes]
//   out^T += V^T p                                                   [product]
// with the usual online softmax over the key tiles. Where few queries meet many keys, the keys are cut into parts,
// whose results are merged in order. Masks and small sizes have kernels of their own (cross_attention_rows.cpp,
// cross_attention_few_keys.cpp).
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

#include "cross_attention.h"

#define RSK_SIMD_FILE "cross_attention_simd.h"
#include "foreach_isa.h"

namespace rskernels::cross {

template <typename Io, typename Operand>
const Kernels<Io, Operand>& kernels() {
  return RSK_AT_ISA_LEVEL(cross_simd::kKernels<Io, Operand>);
}
template const Kernels<float, float>& kernels();
template const Kernels<at::BFloat16, float>& kernels();
template const Kernels<at::BFloat16, at::BFloat16>& kernels();

namespace {

constexpr int64_t kLargeDim = 256;
constexpr int64_t kEnoughTasks = 64;
constexpr int64_t kFewQueryTiles = 2, kLeastKeyTilesOfPart = 2;
constexpr int64_t kFewQueries = 16;

} // namespace

void check_arguments(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& mask) {
  const Check check{"cross_attention"};
  check.rank("q", q, 4);
  check.served("q", q);
  check.rank("k", k, 4);
  check.rank("v", v, 4);
  const int64_t keys = k.size(2);
  TORCH_CHECK_VALUE(keys > 0 && q.size(3) > 0, "cross_attention: k has shape ", k.sizes(),
      "; expected at least one key and one channel");
  for (const auto& [name, t] : {std::pair{"k", k}, std::pair{"v", v}}) {
    const int64_t batch = t.size(0) == 1 ? 1 : q.size(0);
    check.same(name, t, {batch, q.size(1), keys, q.size(3)}, q.scalar_type());
  }
  if (mask.has_value()) check.same("mask", *mask, {q.size(0), q.size(2), keys}, at::kBool);
}

Layout::Layout(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const std::optional<at::Tensor>& mask, double scale_, bool drop_first_)
    : batch(q.size(0)),
      heads(q.size(1)),
      queries(q.size(2)),
      keys(k.size(2)),
      dim(q.size(3)),
      row_size(round_up(dim, kVector)),
      scale(static_cast<float>(scale_)),
      drop_first(drop_first_),
      query_tiles(queries, dim > kLargeDim ? kLargestQueryTile / 2 : kLargestQueryTile),
      key_tiles(keys, kLargestKeyTile),
      few_keys(!mask.has_value() && keys <= kMostFewKeys && dim <= kMostFewDim),
      by_rows(mask.has_value() || (!few_keys && queries <= kFewQueries && dim <= kMostFewDim)),
      key_parts(1) {
  if (query_tiles.count > kFewQueryTiles) return;
  const int64_t most = std::max<int64_t>(1, key_tiles.count / kLeastKeyTilesOfPart);
  key_parts = std::clamp<int64_t>(kEnoughTasks / units(), 1, most);
}

at::Tensor empty_tokens(int64_t batch, const at::Tensor& like, int64_t tokens) {
  // Not a transposed view: autograd would refuse to change that in place.
  const int64_t heads = like.size(1), dim = like.size(3);
  return at::empty_strided(
      {batch, heads, tokens, dim}, {tokens * heads * dim, dim, heads * dim, 1}, like.options());
}

namespace {

// Results of the parts of the keys, for one query tile of one unit: dim x lanes sums, maxima, sums of p.
struct Parts {
  at::Tensor values; // (units, query tiles, parts, size)
  int64_t size, tiles, parts;

  explicit Parts(const Layout& layout, const at::TensorOptions& options)
      : size((layout.dim + 2) * layout.query_tiles.size),
        tiles(layout.query_tiles.count),
        parts(layout.key_parts) {
    if (parts > 1) values = at::empty({layout.units(), tiles, parts, size}, options);
  }
  float* at(int64_t unit, int64_t tile, int64_t part) const {
    return values.data_ptr<float>() + ((unit * tiles + tile) * parts + part) * size;
  }
};

template <typename Io, typename Operand>
class Forward : Worker<Io, Operand> {
 public:
  Forward(const Layout& layout, const Cut& cut, const Parts& parts, const Tensors& call)
      : Worker<Io, Operand>(layout),
        cut_(cut),
        parts_(parts),
        q_(call.q),
        k_(call.k),
        v_(call.v),
        out_(call.out),
        lse_(call.lse.data_ptr<float>()) {
    const int64_t queries = layout.query_tiles.size, row = layout.row_size;
    for (Operand** keys : {&k_rows_, &v_columns_}) *keys = scratch_.template take<Operand>(this->keys_size());
    q_right_ = scratch_.template take<Operand>(queries * row);
    scores_ = scratch_.template take<float>(layout.key_tiles.size * queries);
    if constexpr (std::is_same_v<Operand, float>) {
      p_ = scores_;
    } else {
      p_ = scratch_.template take<Operand>(layout.key_tiles.size * queries);
    }
    for (float** lanes : {&old_largest_, &factors_}) *lanes = scratch_.template take<float>(queries);
    own_result_ = scratch_.template take<float>(queries * (row + 2));
  }

  void run(int64_t index) {
    const Task task = cut_.task(index);
    if (task.first_query_tile == task.last_query_tile) return;
    this->pack_keys(k_, task, k_rows_);
    this->pack_key_columns(v_, task, v_columns_);
    this->drop_first(task, v_columns_, std::is_same_v<Operand, float> ? 1 : 2);
    for (int64_t tile = task.first_query_tile; tile < task.last_query_tile; ++tile) attend(task, tile);
  }

  // Adds up the parts of the keys: task `index` is one query tile of one unit.
  void merge(int64_t index) {
    const int64_t unit = index / layout_.query_tiles.count, tile = index % layout_.query_tiles.count;
    const int64_t lanes = round_up(layout_.query_tiles.length(tile), kVector);
    set_result(own_result_, lanes);
    simd_.merge(
        layout_.key_parts, parts_.size, lanes, layout_.dim, parts_.at(unit, tile, 0), out_t_, largest_, sums_);
    write(unit / layout_.heads, unit % layout_.heads, tile);
  }

 private:
  using Worker<Io, Operand>::layout_;
  using Worker<Io, Operand>::simd_;
  using Worker<Io, Operand>::scratch_;

  void set_result(float* to, int64_t lanes) {
    out_t_ = to;
    largest_ = to + layout_.dim * lanes;
    sums_ = largest_ + lanes;
  }

  void attend(const Task& task, int64_t query_tile) {
    const int64_t count = layout_.query_tiles.length(query_tile), lanes = round_up(count, kVector);
    const bool alone = layout_.key_parts == 1;
    const int64_t unit = task.batch * layout_.heads + task.head;
    set_result(alone ? own_result_ : parts_.at(unit, query_tile, task.key_part), lanes);
    const int64_t begin = layout_.query_tiles.begin(query_tile);
    simd_.load_columns(q_.at(task.batch, task.head, begin), q_.stride, count, layout_.dim, q_right_, lanes);
    std::fill_n(largest_, lanes, std::numeric_limits<float>::lowest());
    std::fill_n(sums_, lanes, 0.0f);
    for (int64_t t = task.first_key_tile; t < task.last_key_tile; ++t) {
      const int64_t tile = t - task.first_key_tile;
      attend_to(this->score_tile(query_tile, t), tile * layout_.key_tiles.size * layout_.row_size, tile == 0);
    }
    if (alone) write(task.batch, task.head, query_tile);
  }

  // Online softmax: one more tile of keys and values, packed from `at` on.
  void attend_to(const ScoreTile& tile, int64_t at, bool first) {
    const int64_t lanes = tile.lanes, dim = layout_.dim;
    tile_product(tile.keys, lanes, depth<Operand>(dim), k_rows_ + at, layout_.row_size, q_right_, lanes,
        scores_, lanes, false);
    std::copy_n(largest_, lanes, old_largest_);
    simd_.row_max(tile, scores_, largest_);
    if (!first) simd_.rescale(lanes, old_largest_, largest_, sums_, out_t_, dim);
    simd_.softmax(tile, scores_, largest_, sums_, p_);
    tile_product_columns(dim, lanes, depth<Operand>(tile.keys), v_columns_ + at, layout_.row_size, p_, lanes,
        out_t_, lanes, !first);
  }

  void write(int64_t batch, int64_t head, int64_t query_tile) {
    const int64_t count = layout_.query_tiles.length(query_tile), first = layout_.query_tiles.begin(query_tile);
    float* lse = lse_ + (batch * layout_.heads + head) * layout_.queries + first;
    simd_.finish(count, largest_, sums_, factors_, lse);
    simd_.write_columns(out_t_, round_up(count, kVector), layout_.dim, factors_, count,
        out_.at(batch, head, first), out_.stride);
  }

  const Cut& cut_;
  const Parts& parts_;
  const Rows<const Io> q_, k_, v_;
  const Rows<Io> out_;
  float* lse_;
  Operand *k_rows_, *v_columns_, *q_right_, *p_;
  float *scores_, *old_largest_, *factors_, *own_result_;
  float *out_t_, *largest_, *sums_; // of the query tile at hand
};

template <typename Io, typename Operand>
void forward(const Layout& layout, const Tensors& call) {
  // Several tasks only where there are few: each packs its keys again. A query's result does not depend on
  // the cut of the queries.
  const int64_t wanted = 4 * at::get_num_threads(), tasks = layout.units();
  const int64_t most = layout.key_parts > 1 ? 1 : layout.query_tiles.count;
  const Cut cut{layout, std::clamp<int64_t>((wanted + tasks - 1) / tasks, 1, most)};
  const Parts parts(layout, call.q.options().dtype(at::kFloat));
  const auto worker = [&] { return Forward<Io, Operand>(layout, cut, parts, call); };
  run_tasks(cut.tasks(), 1, worker);
  if (layout.key_parts == 1) return;
  run_tasks(layout.units() * layout.query_tiles.count, 1,
      [&] { return TasksOf<&Forward<Io, Operand>::merge>{worker()}; });
}

std::tuple<at::Tensor, at::Tensor> cross_attention_forward(const at::Tensor& q, const at::Tensor& k,
    const at::Tensor& v, const std::optional<at::Tensor>& mask, double scale, bool drop_first_key_value) {
  check_arguments(q, k, v, mask);
  const Tensors call{with_contiguous_rows(q), with_contiguous_rows(k), with_contiguous_rows(v),
      empty_tokens(q.size(0), q, q.size(2)),
      at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(at::kFloat))};
  if (q.numel() == 0) return {call.out, call.lse};
  const Layout layout(q, k, v, mask, scale, drop_first_key_value);
  if (layout.few_keys) {
    forward_of_few_keys(layout, call);
  } else if (layout.by_rows) {
    forward_by_rows(layout, mask, call);
  } else {
    with_operand_types(q.scalar_type(),
        [&](auto io, auto operand) { forward<decltype(io), decltype(operand)>(layout, call); });
  }
  return {call.out, call.lse};
}

} // namespace

TORCH_LIBRARY_IMPL(rskernels, CPU, m) {
  m.impl("cross_attention_forward", &cross_attention_forward);
}

} // namespace rskernels::cross
