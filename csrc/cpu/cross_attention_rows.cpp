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
#include "cross_attention.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace rskernels::cross {
namespace {

// A tile of scores: `queries` says which rows of the unit its rows are. Query q attends to key `lane` of the tile
// if bit lane % 32 of words[lane / 32 * word_stride + q * query_stride] is set.
struct RowTile {
  int64_t rows, lanes;
  const int32_t* queries;
  const uint32_t* words;
  int64_t word_stride, query_stride;
};

template <typename Io>
struct RowKernels {
  void (*pack_rows)(
      const Io* from, int64_t from_stride, int64_t rows, int64_t dim, float* to, int64_t to_stride);
  void (*load_columns)(
      const Io* from, int64_t from_stride, int64_t rows, int64_t dim, float* to, int64_t lanes);
  void (*write_rows)(const float* from, int64_t from_stride, int64_t rows, int64_t dim, float factor, Io* to,
      int64_t to_stride);
  void (*dot_rows)(
      const Io* a, int64_t a_stride, const Io* b, int64_t b_stride, int64_t rows, int64_t dim, float* out);
  void (*gather)(const RowTile& tile, const float* from, int64_t row, float* to);
  void (*softmax)(const RowTile& tile, float* scores, float* largest, float* sums, float* factors);
  void (*add_rows)(const RowTile& tile, const float* from, const float* factors, int64_t row, float* to);
  void (*reduce_sums)(int64_t queries, const float* sums, float* to);
  void (*gradient)(const RowTile& tile, const float* lse, const float* delta, float* scores, float* dp);
};

} // namespace
} // namespace rskernels::cross

#define RSK_SIMD_FILE "cross_attention_rows_simd.h"
#include "foreach_isa.h"

namespace rskernels::cross {
namespace {

constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;
constexpr int64_t kWordKeys = 32;
constexpr int64_t kMaskedTile = 32, kWholeTile = 256; // keys of a tile, with and without a mask
constexpr int64_t kRows = 128;                        // queries of a tile, at most
constexpr int64_t kEnoughTasks = 64, kLeastKeysOfPart = 512;
constexpr int64_t kSumLanes = 16; // of every query's sum of probabilities, at most

// The mask as bits (B, words of 32 keys, Q). Keys that do not exist are attended to by nobody.
class Bits {
 public:
  Bits(const Layout& layout, const std::optional<at::Tensor>& mask)
      : words_((layout.keys + kWordKeys - 1) / kWordKeys),
        queries_(mask.has_value() ? layout.queries : 1),
        batch_stride_(mask.has_value() ? words_ * queries_ : 0),
        data_((mask.has_value() ? layout.batch : 1) * words_ * queries_) {
    if (!mask.has_value()) {
      for (int64_t w = 0; w < words_; ++w) data_[w] = existing(layout, w);
      return;
    }
    const at::Tensor rows = mask->stride(2) == 1 ? *mask : mask->contiguous();
    const bool* data = rows.const_data_ptr<bool>();
    const int64_t row_stride = rows.stride(1), batch_stride = rows.stride(0);
    at::parallel_for(0, layout.batch * queries_, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t batch = i / queries_, query = i % queries_;
        pack(layout, data + batch * batch_stride + query * row_stride,
            data_.data() + batch * batch_stride_ + query);
      }
    });
  }

  // Of word `first` on, in the order a RowTile wants them.
  const uint32_t* at(int64_t batch, int64_t first) const {
    return data_.data() + batch * batch_stride_ + first * queries_;
  }
  int64_t word_stride() const { return queries_; }
  int64_t query_stride() const { return queries_ > 1 ? 1 : 0; }

 private:
  static uint32_t existing(const Layout& layout, int64_t word) {
    const int64_t rest = layout.keys - word * kWordKeys;
    return rest >= kWordKeys ? ~0u : (1u << rest) - 1;
  }

  // Eight bools as bits. The product puts a copy of each, at another place, into the highest byte.
  static uint32_t eight(const bool* from) {
    uint64_t bytes = 0;
    for (int i = 0; i < 8; ++i) bytes |= static_cast<uint64_t>(from[i]) << (8 * i);
    return static_cast<uint32_t>(bytes * 0x0102040810204080u >> 56);
  }

  // One query's row; one that attends nowhere attends everywhere.
  void pack(const Layout& layout, const bool* from, uint32_t* to) const {
    uint32_t any = 0;
    for (int64_t w = 0; w < words_; ++w) {
      const int64_t count = std::min(kWordKeys, layout.keys - w * kWordKeys);
      uint32_t word = 0;
      int64_t i = 0;
      for (; i + 8 <= count; i += 8) word |= eight(from + w * kWordKeys + i) << i;
      for (; i < count; ++i) word |= static_cast<uint32_t>(from[w * kWordKeys + i]) << i;
      to[w * queries_] = word;
      any |= word;
    }
    if (any != 0) return;
    for (int64_t w = 0; w < words_; ++w) to[w * queries_] = existing(layout, w);
  }

  int64_t words_, queries_, batch_stride_;
  std::vector<uint32_t> data_;
};

// How the keys are cut.
struct KeyCut {
  int64_t tile, tiles, parts; // keys of a tile, tiles, parts of whole tiles

  KeyCut(const Layout& layout, bool masked)
      : tile(std::min(round_up(layout.keys, kWordKeys), masked ? kMaskedTile : kWholeTile)),
        tiles((layout.keys + tile - 1) / tile),
        parts(std::clamp<int64_t>(
            kEnoughTasks / layout.units(), 1, std::max<int64_t>(1, layout.keys / kLeastKeysOfPart))) {}
  int64_t first_tile(int64_t part) const { return tiles * part / parts; }
};

// What the parts of the keys add to a unit's queries: (units, parts, width, Q) with `width` values a query.
struct Parts {
  at::Tensor values;
  int64_t parts, size;

  Parts(const Layout& layout, const KeyCut& cut, const at::Tensor& like, int64_t width)
      : values(
            at::empty({layout.units(), cut.parts, width * layout.queries}, like.options().dtype(at::kFloat))),
        parts(cut.parts),
        size(width * layout.queries) {}
  float* at(int64_t unit, int64_t part) const {
    return values.data_ptr<float>() + (unit * parts + part) * size;
  }
};

// Neighbouring heads share cache lines and pages: a thread takes several at once.
int64_t heads_at_once(const Layout& layout) {
  return std::max<int64_t>(1, layout.heads / 2);
}

// What both passes do.
template <typename Io>
class Worker {
 protected:
  Worker(const Layout& layout, const Bits& bits, const KeyCut& cut)
      : layout_(layout), bits_(bits), cut_(cut), simd_(RSK_AT_ISA_LEVEL(cross_simd::kRowKernels<Io>)) {
    list_ = scratch_.take<int32_t>(layout.queries);
    tile_rows_ = scratch_.take<float>(most_rows() * layout.row_size);
    no_factors_ = scratch_.take<float>(most_rows());
    std::fill_n(no_factors_, most_rows(), 1.0f);
  }

  int64_t most_rows() const { return std::min(kRows, layout_.queries); }
  int64_t keys_of(int64_t tile) const { return std::min(cut_.tile, layout_.keys - tile * cut_.tile); }

  // Calls visit(tile) with the queries that attend to a tile of keys, kRows of them at a time.
  template <typename Visit>
  void for_attending(int64_t batch, int64_t tile, const Visit& visit) {
    RowTile rows{0, cut_.tile, list_, bits_.at(batch, tile * cut_.tile / kWordKeys), bits_.word_stride(),
        bits_.query_stride()};
    const int64_t words = (keys_of(tile) + kWordKeys - 1) / kWordKeys;
    rows.lanes = words * kWordKeys;
    int64_t count = 0;
    for (int64_t q = 0; q < layout_.queries; ++q) {
      uint32_t any = 0;
      for (int64_t w = 0; w < words; ++w) any |= rows.words[w * rows.word_stride + q * rows.query_stride];
      list_[count] = static_cast<int32_t>(q);
      count += any != 0;
    }
    for (int64_t first = 0; first < count; first += kRows) {
      rows.rows = std::min(kRows, count - first);
      rows.queries = list_ + first;
      visit(rows);
    }
  }

  // The tile's rows of all the queries' rows.
  const float* rows_of(const RowTile& tile, const float* all, float* to) const {
    if (tile.rows == layout_.queries) return all;
    simd_.gather(tile, all, layout_.row_size, to);
    return to;
  }

  // Keys or values as rows and, transposed, as columns; keys that are missing from the lanes are zero.
  void load_rows(
      const Rows<const Io>& from, int64_t batch, int64_t head, int64_t tile, int64_t lanes, float* to) {
    const int64_t keys = keys_of(tile), row = layout_.row_size;
    simd_.pack_rows(from.at(batch, head, tile * cut_.tile), from.stride, keys, layout_.dim, to, row);
    std::fill(to + keys * row, to + lanes * row, 0.0f);
  }
  void load_columns(
      const Rows<const Io>& from, int64_t batch, int64_t head, int64_t tile, int64_t lanes, float* to) {
    simd_.load_columns(
        from.at(batch, head, tile * cut_.tile), from.stride, keys_of(tile), layout_.dim, to, lanes);
  }

  // Fetches a tile's rows ahead: those of one head are far apart in memory.
  template <typename T>
  void prefetch(const Rows<T>& rows, int64_t batch, int64_t head, int64_t tile) const {
    const T* row = rows.at(batch, head, tile * cut_.tile);
    for (int64_t i = 0; i < keys_of(tile); ++i, row += rows.stride) {
      for (int64_t c = 0; c < layout_.dim; c += 64 / sizeof(T))
        __builtin_prefetch(row + c, !std::is_const_v<T>);
    }
  }

  // All queries of a unit, times `factor`.
  void load_queries(const Rows<const Io>& from, int64_t batch, int64_t head, float factor, float* to) {
    simd_.pack_rows(from.at(batch, head, 0), from.stride, layout_.queries, layout_.dim, to, layout_.row_size);
    if (factor == 1.0f) return;
    for (int64_t i = 0; i < layout_.queries * layout_.row_size; ++i) to[i] *= factor;
  }

  const Layout& layout_;
  const Bits& bits_;
  const KeyCut& cut_;
  const RowKernels<Io>& simd_;
  Scratch scratch_;
  int32_t* list_;
  float *no_factors_, *tile_rows_;
};

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
    RSK_AT_ISA_LEVEL(cross_simd::kRowKernels<Io>)
        .write_rows(sums_, row, 1, layout_.dim, 1.0f / total,
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
  float* take(int64_t n) { return this->scratch_.template take<float>(n); }
  void clear(float* sums) { std::fill_n(sums, this->cut_.tile * this->layout_.row_size, 0.0f); }

  // What the unit's queries bring, entry b of those of a task.
  void load_unit(int64_t batch, int64_t head, int64_t part, int64_t b) {
    const Layout& layout = this->layout_;
    const int64_t queries = layout.queries, unit = batch * layout.heads + head, rows = b * queries;
    this->load_queries(q_, batch, head, layout.scale * kLog2e, q_rows_ + rows * layout.row_size);
    this->load_queries(grad_, batch, head, 1.0f, do_rows_ + rows * layout.row_size);
    this->simd_.dot_rows(grad_.at(batch, head, 0), grad_.stride, out_.at(batch, head, 0), out_.stride, queries,
        layout.dim, delta_ + rows);
    for (int64_t q = 0; q < queries; ++q) lse_[rows + q] = lse_data_[unit * queries + q] * kLog2e;
    if (call_.wanted[0]) std::fill_n(parts_.at(unit, part), queries * layout.row_size, 0.0f);
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
    this->simd_.gradient(tile, lse_ + all, delta_ + all, scores_, dp_);
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
  float *q_rows_, *do_rows_, *lse_, *delta_, *q_gathered_, *do_gathered_, *scores_, *dp_;
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
    for (int64_t p = 1; p < parts.parts; ++p) {
      const float* part = parts.at(unit, p) + q * row;
      for (int64_t c = 0; c < row; ++c) sum[c] += part[c];
    }
    RSK_AT_ISA_LEVEL(cross_simd::kRowKernels<Io>)
        .write_rows(sum, row, 1, layout.dim, layout.scale, dq.at(unit / layout.heads, unit % layout.heads, q),
            dq.stride);
  }
};

constexpr int64_t kQueriesOfMerge = 64; // that one thread takes, at least

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

void forward_by_rows(const Layout& layout, const std::optional<at::Tensor>& mask, const Tensors& call) {
  const Bits bits(layout, mask);
  const KeyCut cut(layout, mask.has_value());
  call.q.scalar_type() == at::kFloat ? forward<float>(layout, bits, cut, call)
                                     : forward<at::BFloat16>(layout, bits, cut, call);
}

void backward_by_rows(const Layout& layout, const std::optional<at::Tensor>& mask, const Gradients& call) {
  const Bits bits(layout, mask);
  const KeyCut cut(layout, mask.has_value());
  call.q.scalar_type() == at::kFloat ? backward<float>(layout, bits, cut, call)
                                     : backward<at::BFloat16>(layout, bits, cut, call);
}

} // namespace rskernels::cross
