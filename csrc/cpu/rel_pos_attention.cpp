// rel_pos_attention on the CPU: the forward pass. Meaning and formulas: rskernels/ops/rel_pos_attention.py.
//
// A unit's keys and values are packed once; then, for each tile of queries and each tile of keys,
//   scores (keys x queries) = K q^T                                  [tile product]
//   maxima, then p = exp(scale * scores + rel_h + rel_w - max)       [two vector passes]
//   out (queries x dim) += p^T V                                     [tile product, p by columns]
// with the usual online softmax over the key tiles. Scores never leave the cache, and the bias exists only as
// the two small tables rel_h and rel_w of the query tile.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <tuple>

#include "rel_pos_attention.h"

#define RSK_SIMD_FILE "rel_pos_attention_simd.h"
#include "foreach_isa.h"

namespace rskernels {

template <typename Io, typename Operand>
const AttentionKernels<Io, Operand>& attention_kernels() {
  return RSK_AT_ISA_LEVEL(kAttentionKernels<Io, Operand>);
}
template const AttentionKernels<float, float>& attention_kernels();
template const AttentionKernels<at::BFloat16, float>& attention_kernels();
template const AttentionKernels<at::BFloat16, at::BFloat16>& attention_kernels();

Layout::Layout(const at::Tensor& qkv, const OptionalTensor& rel_pos_h, const OptionalTensor& rel_pos_w,
    const OptionalTensor& pad_qkv, int64_t num_heads, int64_t window_size, double scale_)
    : heads(num_heads), scale(static_cast<float>(scale_)) {
  const Check check{"rel_pos_attention"};
  check.served("qkv", qkv);
  check.rank("qkv", qkv, 4);
  batch = qkv.size(0);
  height = qkv.size(1);
  width = qkv.size(2);
  embed = qkv.size(3) / 3;
  TORCH_CHECK_VALUE(
      num_heads >= 1 && height > 0 && width > 0 && embed > 0 && qkv.size(3) % 3 == 0 && embed % num_heads == 0,
      check.op, ": qkv has shape ", qkv.sizes(), " for num_heads ", num_heads);
  TORCH_CHECK_VALUE(window_size >= 0 && window_size <= kLargestWindow, check.op, ": window_size is ",
      window_size, "; expected 0 to ", kLargestWindow);
  dim = embed / num_heads;
  row_size = round_up(dim, kVector);
  window_h = window_size > 0 ? window_size : height;
  window_w = window_size > 0 ? window_size : width;
  windows_down = (height + window_h - 1) / window_h;
  windows_across = (width + window_w - 1) / window_w;
  keys = window_h * window_w;
  TORCH_CHECK_VALUE(rel_pos_h.has_value() == rel_pos_w.has_value(), check.op,
      ": one of rel_pos_h and rel_pos_w is None; expected both or neither");
  if (rel_pos_h.has_value()) {
    check.shape("rel_pos_h", *rel_pos_h, {2 * window_h - 1, dim});
    check.shape("rel_pos_w", *rel_pos_w, {2 * window_w - 1, dim});
    check.floating("rel_pos_h", *rel_pos_h);
    check.floating("rel_pos_w", *rel_pos_w);
  }
  if (pad_qkv.has_value()) {
    check.shape("pad_qkv", *pad_qkv, {3 * embed});
    check.floating("pad_qkv", *pad_qkv);
  }
}

// Heads are innermost: the heads of a window lie side by side in memory.
Unit Layout::unit(int64_t index) const {
  Unit unit;
  unit.head = index % heads;
  index /= heads;
  unit.left = index % windows_across * window_w;
  index /= windows_across;
  unit.top = index % windows_down * window_h;
  unit.batch = index / windows_down;
  unit.rows = std::min(window_h, height - unit.top);
  unit.columns = std::min(window_w, width - unit.left);
  return unit;
}

Tables::Tables(const Layout& layout, at::ScalarType dtype, const OptionalTensor& h, const OptionalTensor& w) {
  if (!h.has_value()) return;
  entries_h = h->size(0);
  entries = entries_h + w->size(0);
  stride = round_up(entries + kVector, kVector); // room for a vector that starts at the last entry
  rows = at::zeros({entries, layout.dim}, h->options().dtype(at::kFloat));
  rows.narrow(0, 0, entries_h).copy_(h->flip(0).to(dtype)); // as q meets them at every instruction set
  rows.narrow(0, entries_h, entries - entries_h).copy_(w->flip(0).to(dtype));
}

at::Tensor padding(const Layout& layout, const at::Tensor& qkv, const OptionalTensor& pad_qkv) {
  return pad_qkv.has_value() ? pad_qkv->to(qkv.scalar_type()).contiguous()
                             : at::zeros({3 * layout.embed}, qkv.options());
}

namespace {

template <typename Io, typename Operand>
class Forward {
 public:
  Forward(const Layout& layout, const Tables& tables, const PackedTables<Io, Operand>& packed,
      const at::Tensor& qkv, const at::Tensor& pad, const at::Tensor& out, const at::Tensor& lse, int64_t parts)
      : layout_(layout),
        query_tile_(layout.query_tile(parts == 1)),
        key_tiles_(key_tiling(layout)),
        qkv_(qkv),
        pad_(pad.const_data_ptr<Io>()),
        out_(out),
        lse_(lse.data_ptr<float>()),
        parts_(parts),
        simd_(attention_kernels<Io, Operand>()),
        queries_(layout, query_tile_, tables, packed, scratch_) {
    const int64_t tokens = key_tiles_.count * key_tiles_.size;
    k_rows_ = scratch_.take<Operand>(tokens * layout.row_size);
    v_right_ = scratch_.take<Operand>(tokens * layout.row_size);
    zeros_ = scratch_.take<Io>(layout.row_size);
    scores_ = scratch_.take<float>(key_tiles_.size * query_tile_);
    if constexpr (std::is_same_v<Operand, float>) {
      p_ = scores_;
    } else {
      p_ = scratch_.take<Operand>(key_tiles_.size * query_tile_);
    }
    largest_ = scratch_.take<float>(query_tile_);
    old_largest_ = scratch_.take<float>(query_tile_);
    sums_ = scratch_.take<float>(query_tile_);
    out_rows_ = scratch_.take<float>(query_tile_ * layout.row_size);
  }

  // Task t is part t % parts of the query tiles of unit t / parts.
  void run(int64_t task) {
    const Unit unit = layout_.unit(task / parts_);
    const Tiling tiles(unit.queries(), query_tile_);
    const int64_t part = task % parts_;
    const int64_t first = tiles.count * part / parts_, last = tiles.count * (part + 1) / parts_;
    if (first == last) return;
    pack_window<Io, Operand>(layout_, qkv_, pad_, unit, 1, k_rows_);
    pack_window_right<Io, Operand>(layout_, qkv_, pad_, unit, 2, zeros_, v_right_);
    for (int64_t t = first; t < last; ++t) attend(unit, tiles.begin(t), tiles.length(t));
  }

 private:
  void attend(const Unit& unit, int64_t begin, int64_t n) {
    queries_.load(qkv_, unit, begin, n);
    std::fill_n(largest_, queries_.lanes, -std::numeric_limits<float>::infinity());
    std::fill_n(sums_, queries_.lanes, 0.0f);
    for (int64_t t = 0; t < key_tiles_.count; ++t) attend_to(t);
    write(unit, begin);
  }

  // Online softmax: one more tile of keys and values.
  void attend_to(int64_t t) {
    const int64_t lanes = queries_.lanes, keys = key_tiles_.length(t), first = key_tiles_.begin(t);
    const ScoreTile tile = queries_.scores(first, keys);
    tile_product(keys, lanes, depth<Operand>(layout_.dim), k_rows_ + first * layout_.row_size, layout_.row_size,
        queries_.right, lanes, scores_, lanes, false);
    std::copy_n(largest_, lanes, old_largest_);
    simd_.row_max(tile, scores_, largest_);
    if (t > 0) simd_.rescale(lanes, old_largest_, largest_, sums_, out_rows_, layout_.row_size);
    simd_.softmax(tile, scores_, largest_, sums_, p_);
    tile_product_columns(queries_.count, layout_.row_size, depth<Operand>(keys), p_, lanes,
        v_right_ + first * layout_.row_size, layout_.row_size, out_rows_, layout_.row_size, t > 0);
  }

  void write(const Unit& unit, int64_t begin) {
    for_queries(unit, begin, queries_.count, [&](int64_t i, int64_t y, int64_t x) {
      Io* to = out_.at(unit, y, x) + unit.head * layout_.dim;
      simd_.write_row(out_rows_ + i * layout_.row_size, 1.0f / sums_[i], to, layout_.dim);
      prefetch_next_head(to, layout_.dim);
      lse_[layout_.lse_index(unit, y, x)] = largest_[i] + std::log(sums_[i]);
    });
  }

  const Layout& layout_;
  const int64_t query_tile_;
  const Tiling key_tiles_;
  const Tokens<const Io> qkv_;
  const Io* pad_;
  const Tokens<Io> out_;
  float* lse_;
  const int64_t parts_;
  const AttentionKernels<Io, Operand>& simd_;
  Scratch scratch_;
  QueryTile<Io, Operand> queries_;
  Operand *k_rows_, *v_right_, *p_;
  Io* zeros_;
  float *scores_, *largest_, *old_largest_, *sums_, *out_rows_;
};

template <typename Io, typename Operand>
void forward(const Layout& layout, const Tables& tables, const at::Tensor& qkv, const at::Tensor& pad,
    const at::Tensor& out, const at::Tensor& lse) {
  const PackedTables<Io, Operand> packed(layout, tables);
  // Several tasks a unit only where there are few units: each packs the unit's keys again. A query's result
  // does not depend on the cut.
  const int64_t units = layout.units();
  const int64_t most = Tiling(layout.keys, kQueryTile).count;
  const int64_t parts = std::clamp<int64_t>((4 * at::get_num_threads() + units - 1) / units, 1, most);
  const int64_t heads_at_once = std::clamp<int64_t>(units / (8 * at::get_num_threads()), 1, layout.heads);
  run_tasks(units * parts, heads_at_once,
      [&] { return Forward<Io, Operand>(layout, tables, packed, qkv, pad, out, lse, parts); });
}

std::tuple<at::Tensor, at::Tensor> rel_pos_attention_forward(const at::Tensor& qkv_,
    const OptionalTensor& rel_pos_h, const OptionalTensor& rel_pos_w, const OptionalTensor& pad_qkv,
    int64_t num_heads, int64_t window_size, double scale) {
  const Layout layout(qkv_, rel_pos_h, rel_pos_w, pad_qkv, num_heads, window_size, scale);
  const at::Tensor qkv = qkv_.stride(3) == 1 ? qkv_ : qkv_.contiguous();
  const Tables tables(layout, qkv.scalar_type(), rel_pos_h, rel_pos_w);
  const at::Tensor pad = padding(layout, qkv, pad_qkv);
  at::Tensor out = at::empty({layout.batch, layout.height, layout.width, layout.embed}, qkv.options());
  at::Tensor lse =
      at::empty({layout.batch, layout.heads, layout.height, layout.width}, qkv.options().dtype(at::kFloat));
  if (qkv.numel() == 0) return {out, lse};
  with_operand_types(qkv.scalar_type(), [&](auto io, auto operand) {
    forward<decltype(io), decltype(operand)>(layout, tables, qkv, pad, out, lse);
  });
  return {out, lse};
}

} // namespace

TORCH_LIBRARY_IMPL(rskernels, CPU, m) {
  m.impl("rel_pos_attention_forward", &rel_pos_attention_forward);
}

} // namespace rskernels
