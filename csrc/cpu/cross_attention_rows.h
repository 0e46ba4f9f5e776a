// What the two passes of cross_attention_rows*.cpp share: scores lie queries x keys.
#pragma once

#include <ATen/ops/empty.h>

#include <algorithm>

#include "constants.h"
#include "cross_attention.h"

namespace rskernels::cross {

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
  void (*gather)(const RowTile& tile, const float* from, int64_t row, float* to);
  void (*softmax)(const RowTile& tile, float* scores, float* largest, float* sums, float* factors);
  void (*add_rows)(const RowTile& tile, const float* from, const float* factors, int64_t row, float* to);
  void (*reduce_sums)(int64_t queries, const float* sums, float* to);
  void (*gradient)(const RowTile& tile, const float* lse, const float* delta, float* scores, float* dp);
};

template <typename Io>
const RowKernels<Io>& row_kernels();

namespace rows {

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
    const auto* data = reinterpret_cast<const uint8_t*>(rows.const_data_ptr<bool>());
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

  // Eight bools as bits; whatever is not 0 is true, as a mask may be a view of bytes. The product puts a copy of
  // each, at another place, into the highest byte.
  static uint32_t eight(const uint8_t* from) {
    uint64_t bytes = 0;
    for (int i = 0; i < 8; ++i) bytes |= static_cast<uint64_t>(from[i] != 0) << (8 * i);
    return static_cast<uint32_t>(bytes * 0x0102040810204080u >> 56);
  }

  // One query's row; one that attends nowhere attends everywhere.
  void pack(const Layout& layout, const uint8_t* from, uint32_t* to) const {
    uint32_t any = 0;
    for (int64_t w = 0; w < words_; ++w) {
      const int64_t count = std::min(kWordKeys, layout.keys - w * kWordKeys);
      uint32_t word = 0;
      int64_t i = 0;
      for (; i + 8 <= count; i += 8) word |= eight(from + w * kWordKeys + i) << i;
      for (; i < count; ++i) word |= static_cast<uint32_t>(from[w * kWordKeys + i] != 0) << i;
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
inline int64_t heads_at_once(const Layout& layout) {
  return std::max<int64_t>(1, layout.heads / 2);
}

// What both passes do.
template <typename Io>
class Worker {
 protected:
  Worker(const Layout& layout, const Bits& bits, const KeyCut& cut)
      : layout_(layout), bits_(bits), cut_(cut), simd_(row_kernels<Io>()) {
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

constexpr int64_t kQueriesOfMerge = 64; // that one thread takes, at least

} // namespace rows
} // namespace rskernels::cross
