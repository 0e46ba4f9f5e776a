// rel_pos_attention on the CPU: the backward pass. Meaning and formulas: rskernels/ops/rel_pos_attention.py.
//
// For each tile of queries and each tile of keys (everything keys x queries, as in the forward pass):
//   scores = K q^T,  dp = V do^T                                     [two tile products]
//   p = exp(logit - lse),  ds = p * (dp - delta),
//   rel_h and rel_w get the sums of ds over their keys               [one vector pass]
//   dV += p do,  dK += ds q,  dq += ds^T K                           [three tile products]
// where delta_i = do_i . out_i, or sum_j p_ij dp_ij where one tile holds all keys. A query tile's dq is complete
// when its last key tile is done.
//
// Determinism: sums over queries run in order within a *part* of a unit, parts are added in order, and so are
// the *slices* of tasks that share one sum of table gradients. How the work is cut into parts and slices
// depends on the shape of the call alone, so the bits do not depend on the number of threads.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "rel_pos_attention.h"

namespace rskernels {
namespace {

constexpr int64_t kEnoughTasks = 24; // fewer units than this are cut into parts
constexpr int64_t kMostSlices = 64;  // partial sums of the tables' gradients
// Padded tokens whose gradients are added up before they join a slice's sum: one by one, terms that are alike all
// round to one side.
constexpr int64_t kPadsTogether = 32;

struct Cut {
  int64_t parts, tasks, slices;

  // Slices exist for the sums that their tasks share; without any, every task is one of its own.
  Cut(const Layout& layout, bool shares_sums) {
    const int64_t units = std::max<int64_t>(1, layout.units());
    const int64_t most = std::max<int64_t>(1, layout.keys / (4 * kQueryTile));
    parts = std::clamp<int64_t>(kEnoughTasks / units, 1, most);
    tasks = units * parts;
    slices = shares_sums ? std::min(tasks, kMostSlices) : tasks;
  }
  int64_t first_task(int64_t slice) const { return tasks * slice / slices; }
};

struct Wanted {
  bool qkv, rel_h, rel_w, pad;
  bool tables() const { return rel_h || rel_w; }
  bool keys() const { return qkv || pad; }
};

// The tensors of a call. Partial sums have one row per slice or task.
struct Call {
  at::Tensor grad, qkv, out, lse, pad;   // in
  at::Tensor dqkv, table_sums, pad_sums; // out: (B, H, W, 3D), (slices, entries, dim), (slices, 3D)
  at::Tensor part_sums;                  // (tasks, 2, keys, row_size): dk and dv where units have parts
  Wanted wanted;
};

template <typename Io, typename Operand>
class Backward {
 public:
  Backward(const Layout& layout, const Cut& cut, const Tables& tables, const PackedTables<Io, Operand>& packed,
      const Call& call)
      : layout_(layout),
        cut_(cut),
        tables_(tables),
        packed_(packed),
        call_(call),
        key_tiles_(key_tiling(layout)),
        query_tile_(layout.query_tile(layout.units() >= kEnoughTasks)),
        qkv_(call.qkv),
        grad_(call.grad),
        out_(call.out),
        dqkv_(call.dqkv),
        pad_(call.pad.const_data_ptr<Io>()),
        lse_data_(call.lse.const_data_ptr<float>()),
        simd_(attention_kernels<Io, Operand>()),
        queries_(layout, query_tile_, tables, packed, scratch_) {
    const int64_t row = layout.row_size, unit = key_tiles_.count * key_tiles_.size * row;
    k_rows_ = scratch_.take<Operand>(unit);
    v_rows_ = scratch_.take<Operand>(unit);
    k_pairs_ = std::is_same_v<Operand, float> ? k_rows_ : scratch_.take<Operand>(unit);
    for (float** sums : {&dk_, &dv_}) *sums = scratch_.take<float>(layout.keys * row);
    for (Operand** rows : {&do_rows_, &do_right_, &do_pairs_, &q_pairs_})
      *rows = scratch_.take<Operand>(query_tile_ * row);
    const int64_t tile = key_tiles_.size * query_tile_;
    scores_ = scratch_.take<float>(tile);
    dp_ = scratch_.take<float>(tile);
    if constexpr (std::is_same_v<Operand, float>) {
      p_rows_ = scores_;
      ds_rows_ = ds_pairs_ = dp_;
    } else {
      for (Operand** rows : {&p_rows_, &ds_rows_, &ds_pairs_}) *rows = scratch_.take<Operand>(tile);
    }
    for (float** rows : {&lse_, &delta_}) *rows = scratch_.take<float>(query_tile_);
    dq_rows_ = scratch_.take<float>(query_tile_ * row);
    pads_ = scratch_.take<float>(2 * row);
    if (!tables.defined()) return;
    grad_h_ = scratch_.take<float>(query_tile_ * round_up(layout.window_h, kVector));
    grad_w_ = scratch_.take<float>(query_tile_ * round_up(layout.window_w, kVector));
    grad_products_ = scratch_.take<float>(query_tile_ * tables.stride);
    if constexpr (std::is_same_v<Operand, float>) {
      grad_rows_ = grad_products_;
    } else {
      grad_rows_ = scratch_.take<Operand>(query_tile_ * tables.stride);
      grad_pairs_ = scratch_.take<Operand>(query_tile_ * tables.stride);
    }
  }

  // All tasks of a slice, in order. Task t is part t % parts of the query tiles of unit t / parts.
  void run(int64_t slice) {
    slice_ = slice;
    for (int64_t task = cut_.first_task(slice); task < cut_.first_task(slice + 1); ++task) run_task(task);
  }

  // Adds up the parts of a unit, and writes its dk and dv.
  void merge_parts(int64_t index) {
    slice_ = index; // there are at least as many slices as units here
    const int64_t n = 2 * layout_.keys * layout_.row_size;
    const float* parts = call_.part_sums.const_data_ptr<float>() + index * cut_.parts * n;
    add_slices(parts, cut_.parts, n, n / 2, dk_);
    add_slices(parts + n / 2, cut_.parts, n, n / 2, dv_);
    write_key_gradients(layout_.unit(index));
  }

 private:
  void run_task(int64_t task) {
    const Unit unit = layout_.unit(task / cut_.parts);
    const Tiling tiles(unit.queries(), query_tile_);
    const int64_t part = task % cut_.parts;
    const int64_t first = tiles.count * part / cut_.parts, last = tiles.count * (part + 1) / cut_.parts;
    load_keys(unit);
    const int64_t n = layout_.keys * layout_.row_size;
    if (first == last) {
      std::fill_n(dk_, n, 0.0f);
      std::fill_n(dv_, n, 0.0f);
    }
    for (int64_t t = first; t < last; ++t) add_queries(unit, tiles.begin(t), tiles.length(t), t > first);
    if (!call_.wanted.keys()) return;
    if (cut_.parts == 1) return write_key_gradients(unit);
    float* sums = call_.part_sums.template data_ptr<float>() + task * 2 * n;
    std::copy_n(dk_, n, sums);
    std::copy_n(dv_, n, sums + n);
  }

  void load_keys(const Unit& unit) {
    pack_window<Io, Operand>(layout_, qkv_, pad_, unit, 1, k_rows_);
    pack_window<Io, Operand>(layout_, qkv_, pad_, unit, 2, v_rows_);
    if (call_.wanted.qkv) simd_.pair_rows(k_rows_, layout_.row_size, layout_.keys, k_pairs_);
  }

  // dk and dv are sums over query tiles: `more` after the first.
  void add_queries(const Unit& unit, int64_t begin, int64_t n, bool more) {
    load_queries(unit, begin, n);
    for (int64_t t = 0; t < key_tiles_.count; ++t) add_pair(t, more);
    if (tables_.defined()) load_bias_gradients();
    if (call_.wanted.tables()) add_table_gradients();
    if (call_.wanted.qkv) write_query_gradients(unit, begin);
  }

  void write_query_gradients(const Unit& unit, int64_t begin) {
    const int64_t dim = layout_.dim, row = layout_.row_size;
    simd_.scale_row(dq_rows_, layout_.scale, dq_rows_, queries_.count * row);
    if (tables_.defined()) {
      tile_product(queries_.count, row, depth<Operand>(tables_.entries), grad_rows_, tables_.stride,
          packed_.of_gradient.data(), row, dq_rows_, row, true);
    }
    for_queries(unit, begin, queries_.count, [&](int64_t i, int64_t y, int64_t x) {
      Io* to = dqkv_.at(unit, y, x) + unit.head * dim;
      simd_.write_row(dq_rows_ + i * row, 1.0f, to, dim);
      prefetch_next_head(to, dim);
    });
  }

  void load_queries(const Unit& unit, int64_t begin, int64_t n) {
    const int64_t first = unit.head * layout_.dim;
    queries_.load(qkv_, unit, begin, n);
    queries_.pack(grad_, unit, begin, first, do_rows_);
    simd_.transpose_right(do_rows_, layout_.row_size, queries_.lanes, layout_.dim, do_right_, queries_.lanes);
    do_by_query_ = simd_.pair_rows(do_rows_, layout_.row_size, queries_.lanes, do_pairs_);
    q_by_query_ = simd_.pair_rows(queries_.rows, layout_.row_size, queries_.lanes, q_pairs_);
    // Lanes without a query add nothing: their q and do are zero.
    std::fill_n(lse_, queries_.lanes, 0.0f);
    std::fill_n(delta_, queries_.lanes, 0.0f);
    for_queries(unit, begin, n, [&](int64_t i, int64_t y, int64_t x) {
      lse_[i] = lse_data_[layout_.lse_index(unit, y, x)];
      if (key_tiles_.count == 1) return; // row_delta finds it
      delta_[i] = simd_.dot(grad_.at(unit, y, x) + first, out_.at(unit, y, x) + first, layout_.dim);
    });
    if (!tables_.defined()) return;
    std::fill_n(grad_h_, queries_.lanes * layout_.window_h, 0.0f);
    std::fill_n(grad_w_, queries_.lanes * layout_.window_w, 0.0f);
  }

  // One tile of keys against the tile of queries.
  void add_pair(int64_t t, bool more) {
    const int64_t lanes = queries_.lanes, row = layout_.row_size;
    const int64_t keys = key_tiles_.length(t), first = key_tiles_.begin(t);
    const int64_t dim_depth = depth<Operand>(layout_.dim);
    tile_product(
        keys, lanes, dim_depth, k_rows_ + first * row, row, queries_.right, lanes, scores_, lanes, false);
    tile_product(keys, lanes, dim_depth, v_rows_ + first * row, row, do_right_, lanes, dp_, lanes, false);
    GradientTile tile{queries_.scores(first, keys), scores_, dp_, lse_, delta_, grad_h_, grad_w_};
    const bool weighed = key_tiles_.count == 1;
    if (weighed) simd_.row_delta(tile, delta_);
    simd_.score_gradient(tile, weighed, p_rows_, ds_rows_, ds_pairs_);
    if (call_.wanted.keys()) {
      const int64_t depth_of_queries = depth<Operand>(queries_.count);
      tile_product(
          keys, row, depth_of_queries, p_rows_, lanes, do_by_query_, row, dv_ + first * row, row, more);
      tile_product(
          keys, row, depth_of_queries, ds_rows_, lanes, q_by_query_, row, dk_ + first * row, row, more);
    }
    if (call_.wanted.qkv) {
      tile_product_columns(queries_.count, row, depth<Operand>(keys), ds_pairs_, lanes, k_pairs_ + first * row,
          row, dq_rows_, row, t > 0);
    }
  }

  // The gradient of the products q . table: the biases' gradients, back where the biases were taken from.
  void load_bias_gradients() {
    const int64_t lanes = queries_.lanes, stride = tables_.stride;
    std::fill_n(grad_products_, lanes * stride, 0.0f);
    simd_.transpose_into_shifted(
        grad_h_, lanes, layout_.window_h, queries_.count, grad_products_, stride, queries_.shift_h);
    simd_.transpose_into_shifted(
        grad_w_, lanes, layout_.window_w, queries_.count, grad_products_, stride, queries_.shift_w);
    grad_by_query_ = simd_.round_rows(grad_products_, stride, lanes, grad_rows_, grad_pairs_);
  }

  void add_table_gradients() {
    const int64_t dim = layout_.dim;
    float* sums = call_.table_sums.template data_ptr<float>() + slice_ * tables_.entries * dim;
    tile_product_columns(tables_.entries, dim, depth<Operand>(queries_.count), grad_by_query_, tables_.stride,
        q_by_query_, layout_.row_size, sums, dim, true);
  }

  void write_key_gradients(const Unit& unit) {
    const int64_t dim = layout_.dim, row = layout_.row_size, embed = layout_.embed;
    const int64_t first = embed + unit.head * dim;
    const float *dk = dk_, *dv = dv_;
    for (int64_t y = 0; y < layout_.window_h; ++y) {
      for (int64_t x = 0; x < layout_.window_w; ++x, dk += row, dv += row) {
        if (y < unit.rows && x < unit.columns) {
          if (!call_.wanted.qkv) continue;
          Io* to = dqkv_.at(unit, y, x) + first;
          simd_.write_row(dk, layout_.scale, to, dim);
          simd_.write_row(dv, 1.0f, to + embed, dim);
          prefetch_next_head(to, dim);
          prefetch_next_head(to + embed, dim);
        } else if (call_.wanted.pad) {
          for (int64_t c = 0; c < row; ++c) {
            pads_[c] += dk[c];
            pads_[row + c] += dv[c];
          }
          if (++pad_count_ == kPadsTogether) add_pads(first);
        }
      }
    }
    if (pad_count_ > 0) add_pads(first);
  }

  // Moves what pads_ holds to the slice's sums, k from channel `first` on.
  void add_pads(int64_t first) {
    const int64_t row = layout_.row_size, embed = layout_.embed;
    float* sums = call_.pad_sums.template data_ptr<float>() + slice_ * 3 * embed + first;
    for (int64_t c = 0; c < layout_.dim; ++c) {
      sums[c] += pads_[c] * layout_.scale;
      sums[embed + c] += pads_[row + c];
    }
    std::fill_n(pads_, 2 * row, 0.0f);
    pad_count_ = 0;
  }

  const Layout& layout_;
  const Cut& cut_;
  const Tables& tables_;
  const PackedTables<Io, Operand>& packed_;
  const Call& call_;
  const Tiling key_tiles_;
  const int64_t query_tile_;
  const Tokens<const Io> qkv_, grad_, out_;
  const Tokens<Io> dqkv_;
  const Io* pad_;
  const float* lse_data_;
  const AttentionKernels<Io, Operand>& simd_;
  Scratch scratch_;
  QueryTile<Io, Operand> queries_;

  // Buffers, and the product each is an operand of. In fp32 rows serve where bf16 wants pairs of rows, and p and ds
  // take the place of scores and dp; `*_by_query_` is whichever memory holds what it names.
  //
  //   of a unit      k_rows_, v_rows_     keys x row              scores = K q^T, dp = V do^T: left
  //                  k_pairs_             keys x row              dq += ds^T K: right
  //                  dk_, dv_             keys x row              sums over the query tiles
  //                  pads_                2 x row                 dk and dv of some padded tokens
  //   of the query   queries_.rows, do_rows_                      queries x row, what follows is made of
  //   tile           queries_.right, do_right_   row x lanes      scores, dp: right
  //                  q_pairs_, do_pairs_  queries x row           dK += ds q, dV += p do: right
  //                  lse_, delta_         lanes
  //                  dq_rows_             queries x row           sums over the key tiles
  //                  grad_h_, grad_w_     window rows, columns x lanes   sums of ds
  //                  grad_products_       lanes x table entries   the same, where the biases were taken from
  //                  grad_rows_           as fp32 or bf16         dq += grad tables: left
  //                  grad_pairs_          by columns              d tables += grad^T q: left
  //   of both tiles  scores_, dp_         keys x lanes
  //                  p_rows_, ds_rows_    keys x lanes            dV, dK: left
  //                  ds_pairs_            by columns              dq: left
  Operand *k_rows_, *k_pairs_, *v_rows_;
  Operand *do_rows_, *do_right_, *do_pairs_, *q_pairs_, *p_rows_, *ds_rows_, *ds_pairs_;
  const Operand *do_by_query_, *q_by_query_, *grad_by_query_ = nullptr;
  float *dk_, *dv_, *scores_, *dp_, *lse_, *delta_, *dq_rows_, *pads_;
  float *grad_h_ = nullptr, *grad_w_ = nullptr, *grad_products_ = nullptr;
  Operand *grad_rows_ = nullptr, *grad_pairs_ = nullptr;
  int64_t slice_ = 0, pad_count_ = 0;
};

// The sum of the rows of `parts`, first to last.
at::Tensor sum_rows(const at::Tensor& parts) {
  at::Tensor total = at::zeros(parts.sizes().slice(1), parts.options());
  const float* from = parts.const_data_ptr<float>();
  float* to = total.data_ptr<float>();
  const int64_t n = total.numel();
  if (parts.size(0) == 0) return total;
  at::parallel_for(0, n, 1024,
      [&](int64_t begin, int64_t end) { add_slices(from + begin, parts.size(0), n, end - begin, to + begin); });
  return total;
}

template <typename Io, typename Operand>
void backward(const Layout& layout, const Cut& cut, const Tables& tables, const Call& call) {
  const PackedTables<Io, Operand> packed(layout, tables);
  const auto worker = [&] { return Backward<Io, Operand>(layout, cut, tables, packed, call); };
  run_tasks(cut.slices, 1, worker);
  if (cut.parts == 1 || !call.wanted.keys()) return;
  run_tasks(layout.units(), 1, [&] { return TasksOf<&Backward<Io, Operand>::merge_parts>{worker()}; });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> rel_pos_attention_backward(const at::Tensor& grad,
    const at::Tensor& qkv_, const at::Tensor& out, const at::Tensor& lse, const OptionalTensor& rel_pos_h,
    const OptionalTensor& rel_pos_w, const OptionalTensor& pad_qkv, int64_t num_heads, int64_t window_size,
    double scale, std::array<bool, 4> mask) {
  const Layout layout(qkv_, rel_pos_h, rel_pos_w, pad_qkv, num_heads, window_size, scale);
  const Check check{"rel_pos_attention"};
  const std::array<int64_t, 4> sizes{layout.batch, layout.height, layout.width, layout.embed};
  check.same("grad", grad, sizes, qkv_.scalar_type());
  check.same("out", out, sizes, qkv_.scalar_type());
  check.same("lse", lse, {layout.batch, layout.heads, layout.height, layout.width}, at::kFloat);
  const at::Tensor qkv = qkv_.stride(3) == 1 ? qkv_ : qkv_.contiguous();
  const Tables tables(layout, qkv.scalar_type(), rel_pos_h, rel_pos_w);
  const auto floats = qkv.options().dtype(at::kFloat);

  Call call;
  call.wanted = {
      mask[0], mask[1] && tables.defined(), mask[2] && tables.defined(), mask[3] && pad_qkv.has_value()};
  const Cut cut(layout, call.wanted.tables() || call.wanted.pad);
  call.grad = grad.contiguous();
  call.qkv = qkv;
  call.out = out.contiguous();
  call.lse = lse.contiguous();
  call.pad = padding(layout, qkv, pad_qkv);
  call.dqkv = mask[0] ? at::empty(qkv.sizes(), qkv.options()) : at::empty({0, 0, 0, 0}, qkv.options());
  call.table_sums = at::zeros({call.wanted.tables() ? cut.slices : 0, tables.entries, layout.dim}, floats);
  call.pad_sums = at::zeros({call.wanted.pad ? cut.slices : 0, 3 * layout.embed}, floats);
  const bool parts = cut.parts > 1 && call.wanted.keys();
  call.part_sums = at::empty({parts ? cut.tasks : 0, 2, layout.keys, layout.row_size}, floats);
  if (qkv.numel() > 0) {
    with_operand_types(qkv.scalar_type(),
        [&](auto io, auto operand) { backward<decltype(io), decltype(operand)>(layout, cut, tables, call); });
  }

  const at::Tensor nothing = at::empty({0}, grad.options());
  const at::Tensor table = sum_rows(call.table_sums);
  const auto table_gradient = [&](bool wanted, int64_t begin, int64_t end, const OptionalTensor& like) {
    return wanted ? table.slice(0, begin, end).flip(0).to(like->scalar_type()) : nothing;
  };
  return {
      mask[0] ? call.dqkv : nothing,
      table_gradient(call.wanted.rel_h, 0, tables.entries_h, rel_pos_h),
      table_gradient(call.wanted.rel_w, tables.entries_h, tables.entries, rel_pos_w),
      call.wanted.pad ? sum_rows(call.pad_sums).to(pad_qkv->scalar_type()) : nothing,
  };
}

} // namespace

TORCH_LIBRARY_IMPL(rskernels, CPU, m) {
  m.impl("rel_pos_attention_backward", &rel_pos_attention_backward);
}

} // namespace rskernels
