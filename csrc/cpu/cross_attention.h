// What the forward and the backward pass of cross_attention share: where things are in memory, how the work is
// cut, and the operands a thread packs.
//
// Names: a *unit* is one head of one batch entry. *Lanes* are the queries of a tile, rounded up to whole
// vectors. A *task* is a part of the query tiles against a part of the key tiles of one or all heads.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>

#include <array>
#include <optional>
#include <vector>

#include "work.h"

namespace rskernels::cross {

// One tile of scores, keys x lanes. `mask` is null or holds, key after key, one bit for each of 16 queries;
// the next 16 queries follow mask_stride further on.
struct ScoreTile {
  int64_t keys, lanes;
  float scale;
  const uint16_t* mask;
  int64_t mask_stride;

  bool attends_nowhere() const {
    if (mask == nullptr) return false;
    for (int64_t block = 0; block < lanes / kVector; ++block) {
      const uint16_t* words = mask + block * mask_stride;
      uint16_t any = 0;
      for (int64_t key = 0; key < keys; ++key) any |= words[key];
      if (any != 0) return false;
    }
    return true;
  }
};

struct GradientTile : ScoreTile {
  const float *scores, *dp; // Q K^T and dO V^T
  const float *lse, *delta; // per lane
};

// Vector passes, chosen by instruction set (cross_attention_simd.h).
template <typename Io, typename Tile>
struct Kernels {
  void (*pack_rows)(
      const Io* from, int64_t from_stride, int64_t rows, int64_t dim, Tile* to, int64_t to_stride);
  void (*write_rows)(const float* from, int64_t from_stride, int64_t rows, int64_t dim, float factor, Io* to,
      int64_t to_stride);
  void (*write_columns)(const float* from, int64_t lanes, int64_t dim, const float* factors, int64_t columns,
      Io* to, int64_t to_stride);
  void (*transpose_left)(
      const Tile* from, int64_t from_stride, int64_t rows, int64_t columns, Tile* to, int64_t to_stride);
  void (*load_rows)(
      const Io* from, int64_t from_stride, int64_t rows, int64_t dim, Tile* to, int64_t to_stride);
  void (*load_columns)(const Io* from, int64_t from_stride, int64_t rows, int64_t dim, Tile* to, int64_t lanes);
  void (*product)(int64_t m, int64_t n, int64_t k, const float* a, int64_t row_step, int64_t depth_step,
      const float* b, int64_t ldb, float* c, int64_t ldc, bool accumulate);
  void (*row_max)(const ScoreTile& tile, const float* scores, float* largest);
  void (*softmax)(const ScoreTile& tile, const float* scores, const float* largest, float* sums, Tile* out);
  void (*rescale)(
      int64_t lanes, const float* old_largest, const float* largest, float* sums, float* out, int64_t rows);
  void (*merge)(int64_t parts, int64_t part_size, int64_t lanes, int64_t dim, const float* from, float* out,
      float* largest, float* sums);
  void (*finish)(int64_t count, const float* largest, const float* sums, float* factors, float* lse);
  void (*dot_rows)(
      const Io* a, int64_t a_stride, const Io* b, int64_t b_stride, int64_t rows, int64_t dim, float* out);
  void (*row_delta)(const GradientTile& tile, float* delta);
  void (*score_gradient)(const GradientTile& tile, Tile* p_rows, Tile* ds_rows, Tile* ds_pairs);
  void (*softmax_rows)(
      int64_t rows, int64_t keys, int64_t lanes, float scale, float* scores, float* largest, float* sums);
  void (*gradient_rows)(int64_t rows, int64_t keys, int64_t lanes, float scale, const float* lse,
      const float* delta, float* scores, float* dp);
};

template <typename Io, typename Tile>
const Kernels<Io, Tile>& kernels();

// The shape of a call, and what follows from it alone.
struct Layout {
  int64_t batch, heads, queries, keys, dim;
  int64_t row_size; // of a packed row: dim, rounded up to whole vectors
  float scale;
  bool drop_first;
  Tiling query_tiles, key_tiles;
  bool few_queries;     // on many keys: scores lie queries x keys, see cross_attention_few_queries.cpp
  bool vector_products; // products of small sizes are done in place, by our own vector code
  int64_t group;        // heads of a task: all where keys are few, so that rows of tokens are read whole
  int64_t key_parts;    // few queries on many keys: the keys are cut, results are merged part after part

  Layout(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& mask,
      double scale, bool drop_first);
  int64_t groups() const { return heads / group; }
  int64_t units() const { return batch * heads; }
};

struct Task {
  int64_t batch, head, query_part, key_part;
  int64_t first_query_tile, last_query_tile, first_key_tile, last_key_tile;
};

// How the work is cut. Only one of the two numbers of parts is more than 1.
struct Cut {
  const Layout& layout;
  int64_t query_parts;

  int64_t tasks() const { return layout.batch * layout.groups() * query_parts * layout.key_parts; }
  // Heads are innermost: they lie side by side in memory.
  Task task(int64_t index) const {
    Task task;
    task.head = index % layout.groups() * layout.group;
    index /= layout.groups();
    task.query_part = index % query_parts;
    index /= query_parts;
    task.key_part = index % layout.key_parts;
    task.batch = index / layout.key_parts;
    task.first_query_tile = layout.query_tiles.count * task.query_part / query_parts;
    task.last_query_tile = layout.query_tiles.count * (task.query_part + 1) / query_parts;
    task.first_key_tile = layout.key_tiles.count * task.key_part / layout.key_parts;
    task.last_key_tile = layout.key_tiles.count * (task.key_part + 1) / layout.key_parts;
    return task;
  }
};

// A (B, heads, tokens, dim) tensor whose last dimension is contiguous; B = 1 may stand for the whole batch.
template <typename Io>
struct Rows {
  Io* data;
  int64_t batch_stride, head_stride, stride;

  explicit Rows(const at::Tensor& t)
      : data(static_cast<Io*>(t.data_ptr())),
        batch_stride(t.size(0) == 1 ? 0 : t.stride(0)),
        head_stride(t.stride(1)),
        stride(t.stride(2)) {}
  Io* at(int64_t batch, int64_t head, int64_t token) const {
    return data + batch * batch_stride + head * head_stride + token * stride;
  }
};

inline at::Tensor with_contiguous_rows(const at::Tensor& t) {
  return t.stride(3) == 1 ? t : t.contiguous();
}

// (B, heads, tokens, dim) whose memory is (B, tokens, heads, dim), as projections before and after want it.
at::Tensor empty_tokens(int64_t batch, const at::Tensor& like, int64_t tokens);

// The passes of few queries on many keys.
void forward_of_few_queries(const Layout& layout, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const at::Tensor& out, const at::Tensor& lse);
void backward_of_few_queries(const Layout& layout, const at::Tensor& grad, const at::Tensor& q,
    const at::Tensor& k, const at::Tensor& v, const at::Tensor& out, const at::Tensor& lse,
    const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& dv, const std::array<bool, 3>& wanted);

// mask (B, Q, M) as bits along the queries; a row that attends nowhere attends everywhere.
class Mask {
 public:
  Mask(const Layout& layout, const std::optional<at::Tensor>& mask);

  ScoreTile tile(const Layout& layout, int64_t batch, int64_t query_tile, int64_t key_tile) const {
    const int64_t first = layout.query_tiles.begin(query_tile);
    const int64_t lanes = round_up(layout.query_tiles.length(query_tile), kVector);
    const uint16_t* words = bits_.empty() ? nullptr
                                          : bits_.data() + (batch * blocks_ + first / kVector) * layout.keys +
                                                layout.key_tiles.begin(key_tile);
    return {layout.key_tiles.length(key_tile), lanes, layout.scale, words, layout.keys};
  }

 private:
  int64_t blocks_ = 0;
  std::vector<uint16_t> bits_; // (B, blocks of 16 queries, M)
};

// The left operand of a product: element (row, depth) is data[row * row_step + depth * depth_step].
template <typename Tile>
struct Left {
  const Tile* data;
  int64_t row_step, depth_step;
};

// What both passes do with a tile.
template <typename Io, typename Tile>
class Worker {
 protected:
  explicit Worker(const Layout& layout) : layout_(layout), simd_(kernels<Io, Tile>()) {}

  void product(int64_t m, int64_t n, int64_t k, const Left<Tile>& a, const Tile* b, int64_t ldb, float* c,
      int64_t ldc, bool accumulate) const {
    if constexpr (std::is_same_v<Tile, float>) {
      if (layout_.vector_products) {
        return simd_.product(m, n, k, a.data, a.row_step, a.depth_step, b, ldb, c, ldc, accumulate);
      }
    }
    tile_product(m, n, k, a.data, a.row_step, b, ldb, c, ldc, accumulate);
  }

  // Values of a task's packed keys, for each head of the task.
  int64_t keys_size() const {
    const int64_t tiles = (layout_.key_tiles.count + layout_.key_parts - 1) / layout_.key_parts;
    return tiles * layout_.key_tiles.size * layout_.row_size;
  }

  // Packs a task's keys or values of one head, as rows.
  void pack_keys(const Rows<const Io>& rows, const Task& task, int64_t head, Tile* to) const {
    const int64_t first = layout_.key_tiles.begin(task.first_key_tile);
    const int64_t last =
        layout_.key_tiles.begin(task.last_key_tile - 1) + layout_.key_tiles.length(task.last_key_tile - 1);
    simd_.pack_rows(
        rows.at(task.batch, head, first), rows.stride, last - first, layout_.dim, to, layout_.row_size);
  }

  // The first key's value counts as zero where it is dropped.
  void pack_values(const Rows<const Io>& rows, const Task& task, int64_t head, Tile* to) const {
    pack_keys(rows, task, head, to);
    if (layout_.drop_first && task.first_key_tile == 0) std::fill_n(to, layout_.row_size, Tile(0));
  }

  // Packed rows as left operands (dim x keys), tile by tile; vector products read the rows themselves.
  void transpose_keys(const Task& task, const Tile* rows, Tile* to) const {
    if (layout_.vector_products) return;
    for (int64_t t = task.first_key_tile; t < task.last_key_tile; ++t) {
      const int64_t at = (t - task.first_key_tile) * layout_.key_tiles.size * layout_.row_size;
      simd_.transpose_left(rows + at, layout_.row_size, layout_.key_tiles.length(t), layout_.dim, to + at,
          layout_.key_tiles.size);
    }
  }

  // Keys or values of a tile as (keys x dim) and as (dim x keys); `at` is where the tile starts in its buffers.
  Left<Tile> by_key(const Tile* rows, int64_t at) const { return {rows + at, layout_.row_size, 1}; }
  Left<Tile> by_channel(const Tile* rows, const Tile* transposed, int64_t at) const {
    if (layout_.vector_products) return {rows + at, 1, layout_.row_size};
    return {transposed + at, layout_.key_tiles.size, 1};
  }

  // Fetches the head's rows of the next tile of queries ahead: the rows of one head are far apart in memory, and
  // with few keys there is next to no arithmetic to wait behind.
  template <typename T>
  void prefetch_next_queries(const Rows<T>& rows, int64_t batch, int64_t head, int64_t query_tile) const {
    if (layout_.group == 1 || query_tile + 1 >= layout_.query_tiles.count) return;
    const int64_t count = layout_.query_tiles.length(query_tile + 1);
    const T* row = rows.at(batch, head, layout_.query_tiles.begin(query_tile + 1));
    for (int64_t i = 0; i < count; ++i, row += rows.stride) {
      for (int64_t c = 0; c < layout_.dim; c += 64 / sizeof(T))
        __builtin_prefetch(row + c, !std::is_const_v<T>);
    }
  }

  const Layout& layout_;
  const Kernels<Io, Tile>& simd_;
  Scratch scratch_;
};

} // namespace rskernels::cross
