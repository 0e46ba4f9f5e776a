// cross_attention on the CPU: the forward pass. Meaning and formulas: rskernels/ops/cross_attention.py.
//
// As in rel_pos_attention, for each tile of queries and each tile of keys, everything keys x queries:
//   scores = K q^T                                                   [product]
//   maxima, then p = exp(scale * scores - max), 0 where masked       [two vector passes]
//   out^T += V^T p                                                   [product]
// with the usual online softmax over the key tiles; a tile of keys that its queries do not attend to is skipped.
// Where few queries meet many keys, the keys are cut into parts, whose results are merged in order.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cstring>
#include <limits>
#include <tuple>

#include "cross_attention.h"

#define RSK_SIMD_FILE "cross_attention_simd.h"
#include "foreach_isa.h"

namespace rskernels::cross {

template <typename Io, typename Tile>
const Kernels<Io, Tile>& kernels() {
  return RSK_AT_ISA_LEVEL(cross_simd::kKernels<Io, Tile>);
}
template const Kernels<float, float>& kernels();
template const Kernels<at::BFloat16, float>& kernels();
template const Kernels<at::BFloat16, at::BFloat16>& kernels();

namespace {

// Tiles of at most 64 queries x 256 keys; rows of large head dims would not fit the second-level cache.
constexpr int64_t kLargestQueryTile = 64, kLargestKeyTile = 256, kLargeDim = 256;
constexpr int64_t kEnoughTasks = 64;
constexpr int64_t kFewQueryTiles = 2, kLeastKeyTilesOfPart = 2;
// Up to here, measured, calls of tile_product and transposed copies of keys cost more than they gain.
constexpr int64_t kFewKeys = 64, kFewQueries = 16, kSmallDim = 64;

} // namespace

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
      few_queries(queries <= kFewQueries && keys > kLargestKeyTile && dim <= kSmallDim && !mask.has_value() &&
                  k.size(0) == batch && v.size(0) == batch),
      vector_products(dim <= kSmallDim && (keys <= kFewKeys || queries <= kFewQueries)),
      group(keys <= kFewKeys && dim <= kSmallDim ? heads : 1),
      key_parts(1) {
  if (query_tiles.count > kFewQueryTiles) return;
  const int64_t most = std::max<int64_t>(1, key_tiles.count / kLeastKeyTilesOfPart);
  key_parts = std::clamp<int64_t>(kEnoughTasks / (batch * groups()), 1, most);
}

at::Tensor empty_tokens(int64_t batch, const at::Tensor& like, int64_t tokens) {
  return at::empty({batch, tokens, like.size(1), like.size(3)}, like.options()).transpose(1, 2);
}

Mask::Mask(const Layout& layout, const std::optional<at::Tensor>& mask) {
  if (!mask.has_value()) return;
  blocks_ = round_up(layout.queries, kVector) / kVector;
  bits_.resize(layout.batch * blocks_ * layout.keys);
  const at::Tensor rows = mask->stride(2) == 1 ? *mask : mask->contiguous();
  const bool* data = rows.const_data_ptr<bool>();
  const auto pack = RSK_AT_ISA_LEVEL(cross_simd::pack_mask);
  const int64_t row_stride = rows.stride(1), batch_stride = rows.stride(0);
  at::parallel_for(0, layout.batch * blocks_, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % blocks_ * kVector;
      const int64_t count = std::min(kVector, layout.queries - first);
      const bool* from = data + i / blocks_ * batch_stride + first * row_stride;
      uint16_t everywhere = 0;
      for (int64_t q = 0; q < count; ++q) {
        const bool nowhere = std::memchr(from + q * row_stride, 1, layout.keys) == nullptr;
        everywhere |= static_cast<uint16_t>(nowhere << q);
      }
      pack(from, row_stride, count, everywhere, layout.keys, bits_.data() + i * layout.keys);
    }
  });
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

struct Call {
  at::Tensor q, k, v;  // in
  at::Tensor out, lse; // out: (B, heads, Q, dim), (B, heads, Q)
};

template <typename Io, typename Tile>
class Forward : Worker<Io, Tile> {
 public:
  Forward(const Layout& layout, const Cut& cut, const Mask& mask, const Parts& parts, const Call& call)
      : Worker<Io, Tile>(layout),
        cut_(cut),
        mask_(mask),
        parts_(parts),
        q_(call.q),
        k_(call.k),
        v_(call.v),
        out_(call.out),
        lse_(call.lse.data_ptr<float>()) {
    const int64_t queries = layout.query_tiles.size, row = layout.row_size;
    for (Tile** rows : {&k_rows_, &v_rows_})
      *rows = scratch_.template take<Tile>(this->keys_size() * layout.group);
    if (!layout.vector_products) v_left_ = scratch_.template take<Tile>(this->keys_size() * layout.group);
    q_right_ = scratch_.template take<Tile>(queries * row);
    scores_ = scratch_.template take<float>(layout.key_tiles.size * queries);
    if constexpr (std::is_same_v<Tile, float>) {
      p_ = scores_;
    } else {
      p_ = scratch_.template take<Tile>(layout.key_tiles.size * queries);
    }
    for (float** lanes : {&old_largest_, &factors_}) *lanes = scratch_.template take<float>(queries);
    own_result_ = scratch_.template take<float>(queries * (row + 2));
  }

  void run(int64_t index) {
    const Task task = cut_.task(index);
    if (task.first_query_tile == task.last_query_tile) return;
    for (int64_t h = 0; h < layout_.group; ++h) {
      Tile* values = v_rows_ + h * this->keys_size();
      this->pack_keys(k_, task, task.head + h, k_rows_ + h * this->keys_size());
      this->pack_values(v_, task, task.head + h, values);
      this->transpose_keys(task, values, v_left_ + h * this->keys_size());
    }
    for (int64_t tile = task.first_query_tile; tile < task.last_query_tile; ++tile) {
      for (int64_t h = 0; h < layout_.group; ++h) attend(task, tile, h);
    }
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
  using Worker<Io, Tile>::layout_;
  using Worker<Io, Tile>::simd_;
  using Worker<Io, Tile>::scratch_;

  void set_result(float* to, int64_t lanes) {
    out_t_ = to;
    largest_ = to + layout_.dim * lanes;
    sums_ = largest_ + lanes;
  }

  void attend(const Task& task, int64_t query_tile, int64_t h) {
    const int64_t count = layout_.query_tiles.length(query_tile), lanes = round_up(count, kVector);
    const int64_t head = task.head + h;
    const bool alone = layout_.key_parts == 1;
    set_result(
        alone ? own_result_ : parts_.at(task.batch * layout_.heads + head, query_tile, task.key_part), lanes);
    const int64_t begin = layout_.query_tiles.begin(query_tile);
    simd_.load_columns(q_.at(task.batch, head, begin), q_.stride, count, layout_.dim, q_right_, lanes);
    this->prefetch_next_queries(q_, task.batch, head, query_tile);
    this->prefetch_next_queries(out_, task.batch, head, query_tile);
    std::fill_n(largest_, lanes, std::numeric_limits<float>::lowest());
    std::fill_n(sums_, lanes, 0.0f);
    bool first = true;
    for (int64_t t = task.first_key_tile; t < task.last_key_tile; ++t) {
      const ScoreTile tile = mask_.tile(layout_, task.batch, query_tile, t);
      if (tile.attends_nowhere()) continue;
      attend_to(tile,
          h * this->keys_size() + (t - task.first_key_tile) * layout_.key_tiles.size * layout_.row_size, first);
      first = false;
    }
    if (first) std::fill_n(out_t_, layout_.dim * lanes, 0.0f);
    if (alone) write(task.batch, head, query_tile);
  }

  // Online softmax: one more tile of keys and values, packed from `at` on.
  void attend_to(const ScoreTile& tile, int64_t at, bool first) {
    const int64_t lanes = tile.lanes, dim = layout_.dim;
    this->product(
        tile.keys, lanes, depth<Tile>(dim), this->by_key(k_rows_, at), q_right_, lanes, scores_, lanes, false);
    std::copy_n(largest_, lanes, old_largest_);
    simd_.row_max(tile, scores_, largest_);
    if (!first) simd_.rescale(lanes, old_largest_, largest_, sums_, out_t_, dim);
    simd_.softmax(tile, scores_, largest_, sums_, p_);
    this->product(dim, lanes, depth<Tile>(tile.keys), this->by_channel(v_rows_, v_left_, at), p_, lanes, out_t_,
        lanes, !first);
  }

  void write(int64_t batch, int64_t head, int64_t query_tile) {
    const int64_t count = layout_.query_tiles.length(query_tile), first = layout_.query_tiles.begin(query_tile);
    float* lse = lse_ + (batch * layout_.heads + head) * layout_.queries + first;
    simd_.finish(count, largest_, sums_, factors_, lse);
    simd_.write_columns(out_t_, round_up(count, kVector), layout_.dim, factors_, count,
        out_.at(batch, head, first), out_.stride);
  }

  const Cut& cut_;
  const Mask& mask_;
  const Parts& parts_;
  const Rows<const Io> q_, k_, v_;
  const Rows<Io> out_;
  float* lse_;
  Tile *k_rows_, *v_rows_, *v_left_ = nullptr, *q_right_, *p_;
  float *scores_, *old_largest_, *factors_, *own_result_;
  float *out_t_, *largest_, *sums_; // of the query tile at hand
};

template <typename Forward>
struct Merge {
  Forward forward;
  void run(int64_t index) { forward.merge(index); }
};

template <typename Io, typename Tile>
void forward(const Layout& layout, const Mask& mask, const Call& call) {
  // Several tasks only where there are few: each packs its keys again. A query's result does not depend on
  // the cut of the queries.
  const int64_t wanted = 4 * at::get_num_threads(), tasks = layout.batch * layout.groups();
  const int64_t most = layout.key_parts > 1 ? 1 : layout.query_tiles.count;
  const Cut cut{layout, std::clamp<int64_t>((wanted + tasks - 1) / tasks, 1, most)};
  const Parts parts(layout, call.q.options().dtype(at::kFloat));
  const auto worker = [&] { return Forward<Io, Tile>(layout, cut, mask, parts, call); };
  run_tasks(cut.tasks(), 1, worker);
  if (layout.key_parts == 1) return;
  run_tasks(layout.units() * layout.query_tiles.count, 1, [&] { return Merge<Forward<Io, Tile>>{worker()}; });
}

std::tuple<at::Tensor, at::Tensor> cross_attention_forward(const at::Tensor& q, const at::Tensor& k,
    const at::Tensor& v, const std::optional<at::Tensor>& mask, double scale, bool drop_first_key_value) {
  const Call call{with_contiguous_rows(q), with_contiguous_rows(k), with_contiguous_rows(v),
      empty_tokens(q.size(0), q, q.size(2)),
      at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(at::kFloat))};
  if (q.numel() == 0) return {call.out, call.lse};
  const Layout layout(q, k, v, mask, scale, drop_first_key_value);
  if (layout.few_queries) {
    forward_of_few_queries(layout, call.q, call.k, call.v, call.out, call.lse);
    return {call.out, call.lse};
  }
  const Mask bits(layout, mask);
  if (q.scalar_type() == at::kFloat) {
    forward<float, float>(layout, bits, call);
  } else if (has_bf16_tiles() && !layout.vector_products) {
    forward<at::BFloat16, at::BFloat16>(layout, bits, call);
  } else {
    forward<at::BFloat16, float>(layout, bits, call);
  }
  return {call.out, call.lse};
}

} // namespace

TORCH_LIBRARY_IMPL(rskernels, CPU, m) {
  m.impl("cross_attention_forward", &cross_attention_forward);
}

} // namespace rskernels::cross
