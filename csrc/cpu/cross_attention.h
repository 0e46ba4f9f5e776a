// What the forward and the backward pass of cross_attention share: where things are in memory, how the work is
// cut, and the operands a thread packs.
//
// Names: a *unit* is one head of one batch entry. *Lanes* are the queries of a tile, rounded up to whole
// vectors. A *task* is a part of the query tiles of a unit against a part of its key tiles.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>

#include <array>
#include <optional>
#include <vector>

#include "check.h"
#include "work.h"

namespace rskernels::cross {

// One tile of scores, keys x lanes.
struct ScoreTile {
  int64_t keys, lanes;
  float scale;
};

struct GradientTile : ScoreTile {
  const float *scores, *dp; // Q K^T and dO V^T
  const float *lse, *delta; // per lane
};

// Vector passes, chosen by instruction set (cross_attention_simd.h).
template <typename Io, typename Operand>
struct Kernels {
  void (*pack_rows)(
      const Io* from, int64_t from_stride, int64_t rows, int64_t dim, Operand* to, int64_t to_stride);
  void (*write_rows)(const float* from, int64_t from_stride, int64_t rows, int64_t dim, float factor, Io* to,
      int64_t to_stride);
  void (*write_columns)(const float* from, int64_t lanes, int64_t dim, const float* factors, int64_t columns,
      Io* to, int64_t to_stride);
  void (*load_rows)(
      const Io* from, int64_t from_stride, int64_t rows, int64_t dim, Operand* to, int64_t to_stride);
  void (*load_columns)(
      const Io* from, int64_t from_stride, int64_t rows, int64_t dim, Operand* to, int64_t lanes);
  void (*row_max)(const ScoreTile& tile, const float* scores, float* largest);
  void (*softmax)(const ScoreTile& tile, const float* scores, const float* largest, float* sums, Operand* out);
  void (*rescale)(
      int64_t lanes, const float* old_largest, const float* largest, float* sums, float* out, int64_t rows);
  void (*merge)(int64_t parts, int64_t part_size, int64_t lanes, int64_t dim, const float* from, float* out,
      float* largest, float* sums);
  void (*finish)(int64_t count, const float* largest, const float* sums, float* factors, float* lse);
  void (*dot_rows)(
      const Io* a, int64_t a_stride, const Io* b, int64_t b_stride, int64_t rows, int64_t dim, float* out);
  void (*row_delta)(const GradientTile& tile, float* delta);
  void (*score_gradient)(const GradientTile& tile, Operand* p_rows, Operand* ds_rows, Operand* ds_pairs);
};

template <typename Io, typename Operand>
const Kernels<Io, Operand>& kernels();

// What the Python function checks, too.
void check_arguments(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& mask);

// Of scores: half as many queries where rows of large head dims would not fit the second-level cache.
constexpr int64_t kLargestQueryTile = 64, kLargestKeyTile = 256;

// Head dim and keys up to which keys are few.
constexpr int64_t kMostFewKeys = 64, kMostFewDim = 64;

// The shape of a call, and what follows from it alone.
struct Layout {
  int64_t batch, heads, queries, keys, dim;
  int64_t row_size; // of a packed row: dim, rounded up to whole vectors
  float scale;
  bool drop_first;
  Tiling query_tiles, key_tiles;
  bool few_keys;     // of all heads: they stay on chip, see cross_attention_few_keys.cpp
  bool by_rows;      // scores lie queries x keys, see cross_attention_rows.cpp
  int64_t key_parts; // few queries on many keys: the keys are cut, results are merged part after part

  Layout(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& mask,
      double scale, bool drop_first);
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

  int64_t tasks() const { return layout.batch * layout.heads * query_parts * layout.key_parts; }
  // Heads are innermost: they lie side by side in memory.
  Task task(int64_t index) const {
    Task task;
    task.head = index % layout.heads;
    index /= layout.heads;
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
      : data(data_of<Io>(t)),
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

// The tensors of a call. k and v may have a batch of 1; dq, dk and dv are empty where they are not wanted.
struct Tensors {
  at::Tensor q, k, v;  // in
  at::Tensor out, lse; // out: (B, heads, Q, dim), (B, heads, Q); in, in the backward pass
};

struct Gradients : Tensors {
  at::Tensor grad;            // in
  at::Tensor dq, dk, dv;      // out
  std::array<bool, 3> wanted; // dq, dk, dv
};

void forward_of_few_keys(const Layout& layout, const Tensors& call);
void backward_of_few_keys(const Layout& layout, const Gradients& call);

// mask (B, Q, M) bool; a row that attends nowhere attends everywhere.
void forward_by_rows(const Layout& layout, const std::optional<at::Tensor>& mask, const Tensors& call);
void backward_by_rows(const Layout& layout, const std::optional<at::Tensor>& mask, const Gradients& call);

// What both passes do with a tile.
template <typename Io, typename Operand>
class Worker {
 protected:
  explicit Worker(const Layout& layout) : layout_(layout), simd_(kernels<Io, Operand>()) {}

  ScoreTile score_tile(int64_t query_tile, int64_t key_tile) const {
    const int64_t lanes = round_up(layout_.query_tiles.length(query_tile), kVector);
    return {layout_.key_tiles.length(key_tile), lanes, layout_.scale};
  }

  // Values of a task's packed keys.
  int64_t keys_size() const {
    const int64_t tiles = (layout_.key_tiles.count + layout_.key_parts - 1) / layout_.key_parts;
    return tiles * layout_.key_tiles.size * layout_.row_size;
  }

  int64_t keys_of(const Task& task) const {
    return layout_.key_tiles.begin(task.last_key_tile - 1) + layout_.key_tiles.length(task.last_key_tile - 1) -
           layout_.key_tiles.begin(task.first_key_tile);
  }

  // A task's keys or values as the left operand of a product with queries.
  void pack_keys(const Rows<const Io>& rows, const Task& task, Operand* to) const {
    const int64_t first = layout_.key_tiles.begin(task.first_key_tile);
    simd_.pack_rows(
        rows.at(task.batch, task.head, first), rows.stride, keys_of(task), layout_.dim, to, layout_.row_size);
  }

  // The same by columns, the left operand of a sum over keys: in fp32 the same rows, in bf16 pairs of them.
  void pack_key_columns(const Rows<const Io>& rows, const Task& task, Operand* to) const {
    const int64_t first = layout_.key_tiles.begin(task.first_key_tile);
    simd_.load_rows(
        rows.at(task.batch, task.head, first), rows.stride, keys_of(task), layout_.dim, to, layout_.row_size);
  }

  // The first key's value counts as zero where it is dropped: of rows every value, of pairs every second.
  void drop_first(const Task& task, Operand* values, int64_t step) const {
    if (!layout_.drop_first || task.first_key_tile > 0) return;
    for (int64_t c = 0; c < layout_.row_size; ++c) values[c * step] = Operand(0);
  }

  const Layout& layout_;
  const Kernels<Io, Operand>& simd_;
  Scratch scratch_;
};

} // namespace rskernels::cross
