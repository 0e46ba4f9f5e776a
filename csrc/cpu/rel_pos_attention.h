// What the forward and the backward pass of rel_pos_attention share: where things are in memory, how the work
// is cut, and the buffers of a thread.
//
// Names: a *unit* is one head of one window (of the whole grid where there are no windows). Its keys are all
// the window's tokens, those of the virtual padding included; its queries are the tokens inside the grid.
// *Lanes* are the queries of a tile, rounded up to whole vectors.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>

#include <optional>
#include <vector>

#include "check.h"
#include "work.h"

namespace rskernels {

// 128 x 256 scores and the operands of their products stay in the second-level cache; with 64 queries backward took
// 5 to 8 % longer. Where one key tile holds all keys, as with windows of 14 x 14 tokens, so do the scores of all
// their queries.
constexpr int64_t kQueryTile = 128;
constexpr int64_t kKeyTile = 256;

// One tile of scores, keys x lanes, and its biases: rel_h (grid rows x lanes), rel_w (grid columns x lanes);
// null without bias.
struct ScoreTile {
  int64_t keys, lanes, first_key, grid_width;
  float scale;
  const float *rel_h, *rel_w;
};

struct GradientTile : ScoreTile {
  float* scores;            // Q K^T; after row_delta, p
  const float* dp;          // dO V^T
  const float *lse, *delta; // per lane
  float *grad_h, *grad_w;   // sums of ds, laid out as rel_h and rel_w
};

// Vector passes, chosen by instruction set (rel_pos_attention_simd.h).
template <typename Io, typename Operand>
struct AttentionKernels {
  void (*pack_row)(const Io* from, Operand* to, int64_t n);
  void (*pack_two)(const Io* even, const Io* odd, Operand* to, int64_t stride, int64_t n);
  void (*write_row)(const float* from, float factor, Io* to, int64_t n);
  void (*scale_row)(const float* from, float factor, float* to, int64_t n);
  float (*dot)(const Io* a, const Io* b, int64_t n);
  void (*transpose_right)(
      const Operand* from, int64_t from_stride, int64_t rows, int64_t columns, Operand* to, int64_t to_stride);
  const Operand* (*pair_rows)(const Operand* from, int64_t stride, int64_t rows, Operand* to);
  const Operand* (*round_rows)(float* from, int64_t stride, int64_t rows, Operand* rounded, Operand* pairs);
  void (*transpose)(const float* from, int64_t from_stride, const int64_t* shift, int64_t rows, int64_t columns,
      float* to, int64_t to_stride);
  void (*transpose_into_shifted)(const float* from, int64_t from_stride, int64_t rows, int64_t columns,
      float* to, int64_t to_stride, const int64_t* shift);
  void (*row_max)(const ScoreTile& tile, const float* scores, float* largest);
  void (*softmax)(const ScoreTile& tile, const float* scores, const float* largest, float* sums, Operand* out);
  void (*rescale)(
      int64_t lanes, float* old_largest, const float* largest, float* sums, float* out, int64_t row);
  void (*row_delta)(const GradientTile& tile, float* delta);
  void (*score_gradient)(
      const GradientTile& tile, bool weighed, Operand* p_rows, Operand* ds_rows, Operand* ds_pairs);
};

template <typename Io, typename Operand>
const AttentionKernels<Io, Operand>& attention_kernels();

struct Unit {
  int64_t batch, head, top, left, rows, columns; // of the window: where it starts, how much is inside the grid
  int64_t queries() const { return rows * columns; }
};

// Larger windows hold more pairs of tokens than a processor gets through; their keys could not be counted.
constexpr int64_t kLargestWindow = 4096; // LARGEST_WINDOW in rskernels/ops/rel_pos_attention.py

using OptionalTensor = std::optional<at::Tensor>;

// The shape of a call, checked: what follows trusts it.
struct Layout {
  int64_t batch, height, width, heads, dim, embed;
  int64_t window_h, window_w, windows_down, windows_across;
  int64_t keys;     // of a unit
  int64_t row_size; // of a packed token: dim, rounded up to whole vectors
  float scale;

  Layout(const at::Tensor& qkv, const OptionalTensor& rel_pos_h, const OptionalTensor& rel_pos_w,
      const OptionalTensor& pad_qkv, int64_t num_heads, int64_t window_size, double scale);

  int64_t units() const { return batch * windows_down * windows_across * heads; }
  Unit unit(int64_t index) const;
  // Queries of a tile: all of a unit's where one key tile holds its keys and there are units enough.
  int64_t query_tile(bool enough_units) const {
    return enough_units && keys <= kKeyTile ? round_up(keys, kVector) : kQueryTile;
  }
  // Where the log-sum-exp of the query at (y, x) of a unit's window lies in (B, heads, H, W).
  int64_t lse_index(const Unit& unit, int64_t y, int64_t x) const {
    return ((unit.batch * heads + unit.head) * height + unit.top + y) * width + unit.left + x;
  }
};

// visit(i, y, x) for queries begin .. begin + n of a unit, i counted from 0: divisions once, not for each.
template <typename Visit>
void for_queries(const Unit& unit, int64_t begin, int64_t n, const Visit& visit) {
  int64_t y = begin / unit.columns, x = begin % unit.columns;
  for (int64_t i = 0; i < n; ++i) {
    visit(i, y, x);
    if (++x == unit.columns) {
      x = 0;
      ++y;
    }
  }
}

// pad_qkv in the dtype of qkv; zeros where there is none.
at::Tensor padding(const Layout& layout, const at::Tensor& qkv, const OptionalTensor& pad_qkv);

// rel_pos_h and rel_pos_w one after the other, rows reversed: the biases of query i then are `window_h`
// neighbours from column window_h - 1 - i_h on, and `window_w` neighbours likewise.
struct Tables {
  at::Tensor rows; // (entries, dim) fp32, or undefined without bias
  int64_t entries_h = 0, entries = 0, stride = 0;

  // Rounded to `dtype`, that of qkv.
  Tables(const Layout& layout, at::ScalarType dtype, const OptionalTensor& h, const OptionalTensor& w);
  bool defined() const { return entries > 0; }
};

// A (B, H, W, channels) tensor whose channels are neighbours.
template <typename Io>
struct Tokens {
  Io* data;
  int64_t batch_stride, row_stride, column_stride;

  explicit Tokens(const at::Tensor& t)
      : data(data_of<Io>(t)), batch_stride(t.stride(0)), row_stride(t.stride(1)), column_stride(t.stride(2)) {}
  Io* at(int64_t batch, int64_t y, int64_t x) const {
    return data + batch * batch_stride + y * row_stride + x * column_stride;
  }
  // The token at (y, x) of a unit's window.
  Io* at(const Unit& unit, int64_t y, int64_t x) const { return at(unit.batch, unit.top + y, unit.left + x); }
};

// The tables as right operands: of q (dim x entries, `stride` apart), and of the biases' gradients (entries x
// dim, `row_size` apart).
template <typename Io, typename Operand>
struct PackedTables {
  std::vector<Operand> of_q, of_gradient;

  PackedTables(const Layout& layout, const Tables& tables) {
    if (!tables.defined()) return;
    const auto& simd = attention_kernels<Io, Operand>();
    const int64_t entries = round_up(tables.entries, kVector);
    std::vector<Operand> rows(
        entries * layout.row_size + 2 * kVector, Operand(0)); // transpositions run over the end
    const float* from = tables.rows.const_data_ptr<float>();
    for (int64_t i = 0; i < tables.entries; ++i) {
      std::copy_n(from + i * layout.dim, layout.dim, rows.data() + i * layout.row_size);
    }
    of_q.resize(layout.row_size * tables.stride);
    simd.transpose_right(rows.data(), layout.row_size, entries, layout.dim, of_q.data(), tables.stride);
    of_gradient.resize(rows.size());
    const Operand* pairs = simd.pair_rows(rows.data(), layout.row_size, entries, of_gradient.data());
    if (pairs != of_gradient.data()) of_gradient = std::move(rows); // fp32: as they are
  }
};

// A window's tokens lie far apart, but the next head, most likely the thread's next task, lies right behind
// this one's. With tasks taken a few heads at a time this took 12 % (fp32) and 20 % (bf16) off windowed forward
// passes.
template <typename Io>
void prefetch_next_head(const Io* head, int64_t dim) {
  const char* next = reinterpret_cast<const char*>(head + dim);
  for (int64_t line = 0; line < dim * static_cast<int64_t>(sizeof(Io)); line += 64)
    __builtin_prefetch(next + line);
}

// What a thread knows of the query tile at hand.
template <typename Io, typename Operand>
class QueryTile {
 public:
  QueryTile(const Layout& layout, int64_t largest, const Tables& tables,
      const PackedTables<Io, Operand>& packed, Scratch& scratch)
      : layout_(layout), tables_(tables), packed_(packed), simd_(attention_kernels<Io, Operand>()) {
    rows = scratch.take<Operand>(largest * layout.row_size);
    right = scratch.take<Operand>(largest * layout.row_size);
    if (!tables.defined()) return;
    shift_h = scratch.take<int64_t>(largest);
    shift_w = scratch.take<int64_t>(largest);
    products_ = scratch.take<float>(largest * tables.stride);
    rel_h_ = scratch.take<float>(largest * layout.window_h);
    rel_w_ = scratch.take<float>(largest * layout.window_w);
  }

  // Queries begin .. begin + n of the unit: q as rows and as a right operand, and their biases.
  void load(const Tokens<const Io>& qkv, const Unit& unit, int64_t begin, int64_t n) {
    count = n;
    lanes = round_up(n, kVector);
    pack(qkv, unit, begin, unit.head * layout_.dim, rows);
    simd_.transpose_right(rows, layout_.row_size, lanes, layout_.dim, right, lanes);
    if (tables_.defined()) load_bias(unit, begin);
  }

  // Channels first .. first + dim of the tile's tokens in `tokens`, as rows; lanes beyond the last query are 0.
  void pack(const Tokens<const Io>& tokens, const Unit& unit, int64_t begin, int64_t first, Operand* to) const {
    for_queries(unit, begin, count, [&](int64_t i, int64_t y, int64_t x) {
      const Io* from = tokens.at(unit, y, x) + first;
      simd_.pack_row(from, to + i * layout_.row_size, layout_.dim);
      prefetch_next_head(from, layout_.dim);
    });
    std::fill(to + count * layout_.row_size, to + lanes * layout_.row_size, Operand(0));
  }

  ScoreTile scores(int64_t first_key, int64_t keys) const {
    return {keys, lanes, first_key, layout_.window_w, layout_.scale, rel_h_, rel_w_};
  }

  // Where a query's biases start in its row of products with the tables.
  int64_t *shift_h = nullptr, *shift_w = nullptr;
  int64_t count = 0, lanes = 0;
  Operand *rows, *right;

 private:
  void load_bias(const Unit& unit, int64_t begin) {
    for_queries(unit, begin, count, [&](int64_t i, int64_t y, int64_t x) {
      shift_h[i] = layout_.window_h - 1 - y;
      shift_w[i] = tables_.entries_h + layout_.window_w - 1 - x;
    });
    for (int64_t i = count; i < lanes; ++i) shift_h[i] = shift_w[i] = 0;
    tile_product(lanes, round_up(tables_.entries, kVector), depth<Operand>(layout_.dim), rows, layout_.row_size,
        packed_.of_q.data(), tables_.stride, products_, tables_.stride, false);
    simd_.transpose(products_, tables_.stride, shift_h, lanes, layout_.window_h, rel_h_, lanes);
    simd_.transpose(products_, tables_.stride, shift_w, lanes, layout_.window_w, rel_w_, lanes);
  }

  const Layout& layout_;
  const Tables& tables_;
  const PackedTables<Io, Operand>& packed_;
  const AttentionKernels<Io, Operand>& simd_;
  float *products_ = nullptr, *rel_h_ = nullptr, *rel_w_ = nullptr;
};

// visit(key, token) for every key of a unit; tokens of the padding come from `pad`.
template <typename Io, typename Visit>
void for_keys(
    const Layout& layout, const Tokens<const Io>& qkv, const Io* pad, const Unit& unit, const Visit& visit) {
  int64_t key = 0;
  for (int64_t y = 0; y < layout.window_h; ++y) {
    for (int64_t x = 0; x < layout.window_w; ++x, ++key) {
      visit(key, y < unit.rows && x < unit.columns ? qkv.at(unit, y, x) : pad);
    }
  }
}

// Keys (which = 1) or values (which = 2) of a unit as rows, the left operand.
template <typename Io, typename Operand>
void pack_window(const Layout& layout, const Tokens<const Io>& qkv, const Io* pad, const Unit& unit,
    int64_t which, Operand* to) {
  const auto& simd = attention_kernels<Io, Operand>();
  const int64_t first = which * layout.embed + unit.head * layout.dim;
  for_keys(layout, qkv, pad, unit, [&](int64_t key, const Io* token) {
    simd.pack_row(token + first, to + key * layout.row_size, layout.dim);
    prefetch_next_head(token + first, layout.dim);
  });
}

// The same as a right operand; `zeros` is paired with an odd last key.
template <typename Io, typename Operand>
void pack_window_right(const Layout& layout, const Tokens<const Io>& qkv, const Io* pad, const Unit& unit,
    int64_t which, const Io* zeros, Operand* to) {
  const auto& simd = attention_kernels<Io, Operand>();
  const int64_t first = which * layout.embed + unit.head * layout.dim, row = layout.row_size;
  const Io* even = nullptr;
  for_keys(layout, qkv, pad, unit, [&](int64_t key, const Io* token) {
    prefetch_next_head(token + first, layout.dim);
    if (key % 2 == 0) {
      even = token + first;
    } else {
      simd.pack_two(even, token + first, to + (key - 1) * row, row, layout.dim);
    }
  });
  if (layout.keys % 2 == 1) simd.pack_two(even, zeros, to + (layout.keys - 1) * row, row, layout.dim);
}

inline Tiling key_tiling(const Layout& layout) {
  return Tiling(layout.keys, kKeyTile);
}

} // namespace rskernels
