// What the forward and the backward pass of deformable_attention share: shapes, the head-by-head copy of value,
// and the samples of a few queries.
//
// Names: a *unit* is one head of one image. A *sample* is one point of one level of one query and head; its
// four *corners* are pixels: upper left, upper right, lower left, lower right. *Rows* are the d channels of one
// pixel and head, padded with zeros to whole vectors.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <vector>

#include "check.h"
#include "work.h"

namespace rskernels {

// Samples prepared at a time: their corners (32 bytes each) stay in the first-level cache.
constexpr int64_t kSampleTile = 256;

// The samples of a few queries of one unit, query by query. Arrays are as long as whole vectors need.
struct Samples {
  const float *width, *height;  // of the sample's level
  const int32_t *first, *query; // the level's first pixel; which of the queries at hand
  float *locations, *weights;   // (x, y) pairs, and attention weights
  float *across, *down;         // where between its corners a sample lies, 0 to 1; NaN where it lies nowhere
  int32_t* corner[4];           // pixels; `outside` where a corner is outside its map
  float* share[4];              // weight times bilinear coefficient
  int32_t outside;
};

// Vector passes, chosen by instruction set (deformable_attention_simd.h).
template <typename Io>
struct DeformableKernels {
  void (*pack_rows)(const Io* from, int64_t stride, int64_t rows, int64_t dim, Io* to, int64_t row);
  void (*widen_rows)(const Io* from, int64_t stride, int64_t rows, int64_t dim, float* to, int64_t row);
  void (*narrow_rows)(const float* from, int64_t row, int64_t rows, int64_t dim, Io* to, int64_t stride);
  void (*copy_few)(const float* from, float* to, int64_t n);
  void (*place)(const Samples& samples, int64_t count);
  void (*gather)(const Io* maps, int64_t row, const Samples& samples, int64_t begin, int64_t end, float* out);
  void (*scatter)(
      const float* grad, const Samples& samples, int64_t begin, int64_t end, float* maps, int64_t row);
  void (*differentiate)(const Io* maps, const float* grads, int64_t row, const Samples& samples, int64_t count,
      float* grad_locations, float* grad_weights);
  void (*add)(const float* from, float* to, int64_t n);
};

template <typename Io>
const DeformableKernels<Io>& deformable_kernels();

struct Level {
  int64_t height, width, first;
  int64_t pixels() const { return height * width; }
};

// The shape of a call, checked: what follows trusts it.
struct DeformableLayout {
  int64_t batch, pixels, heads, dim, queries, points;
  int64_t row; // dim, rounded up to whole vectors
  std::vector<Level> levels;

  DeformableLayout(
      const at::Tensor& value, at::IntArrayRef shapes, const at::Tensor& locations, const at::Tensor& weights);

  int64_t units() const { return batch * heads; }
  int64_t samples() const { return static_cast<int64_t>(levels.size()) * points; } // of a query and head
  int64_t embed() const { return heads * dim; }
  // Queries at a time where each has `samples` samples.
  static int64_t query_tile(int64_t samples) {
    return std::max<int64_t>(1, kSampleTile / std::max<int64_t>(1, samples));
  }
};

// value unit by unit, (B, h, S + 1, row), the last row zero: there lie all corners outside the maps. In place a
// head's rows are heads · d values apart, which leaves most sets of a cache unused.
template <typename Io>
at::Tensor pack_value(const DeformableLayout& layout, const at::Tensor& value);

// A thread's samples of levels [first_level, last_level).
class SampleTile {
 public:
  SampleTile(const DeformableLayout& layout, const float* locations, const float* weights, Scratch& scratch)
      : layout_(layout), locations_(locations), weights_(weights) {
    const int64_t n = round_up(std::max(layout.samples(), kSampleTile), kVector);
    for (float** array : {&width_, &height_, &samples.weights, &samples.across, &samples.down}) {
      *array = scratch.take<float>(n);
    }
    samples.locations = scratch.take<float>(2 * n);
    first_ = scratch.take<int32_t>(n);
    query_ = scratch.take<int32_t>(n);
    for (int k = 0; k < 4; ++k) {
      samples.corner[k] = scratch.take<int32_t>(n);
      samples.share[k] = scratch.take<float>(n);
    }
    samples.width = width_;
    samples.height = height_;
    samples.first = first_;
    samples.query = query_;
  }

  // Pixels count from the first level's first; `outside` is the number of the row for corners outside.
  void use_levels(int64_t first_level, int64_t last_level, int64_t outside) {
    first_sample_ = first_level * layout_.points;
    per_query = (last_level - first_level) * layout_.points;
    queries = DeformableLayout::query_tile(per_query);
    samples.outside = static_cast<int32_t>(outside);
    for (int64_t i = 0; i < queries * per_query; ++i) {
      const Level& level = layout_.levels[first_level + i % per_query / layout_.points];
      width_[i] = static_cast<float>(level.width);
      height_[i] = static_cast<float>(level.height);
      first_[i] = static_cast<int32_t>(level.first - layout_.levels[first_level].first);
      query_[i] = static_cast<int32_t>(i / per_query);
    }
  }

  // Where the samples of a query and head begin in (B, Q, h, L, P).
  int64_t sample_index(int64_t unit, int64_t query) const {
    const int64_t head = unit % layout_.heads, batch = unit / layout_.heads;
    return ((batch * layout_.queries + query) * layout_.heads + head) * layout_.samples() + first_sample_;
  }

  // Queries begin ... begin + n of a unit.
  template <typename Io>
  void load(const DeformableKernels<Io>& simd, int64_t unit, int64_t begin, int64_t n) {
    const int64_t stride = layout_.heads * layout_.samples(), ahead = 8 * stride;
    const float* from = locations_ + 2 * sample_index(unit, begin);
    const float* weight = weights_ + sample_index(unit, begin);
    for (int64_t q = 0; q < n; ++q, from += 2 * stride, weight += stride) {
      __builtin_prefetch(
          from + 2 * ahead); // another head's samples lie between: nothing fetches ahead by itself
      __builtin_prefetch(from + 2 * ahead + 2 * per_query - 1);
      __builtin_prefetch(weight + ahead);
      simd.copy_few(from, samples.locations + 2 * q * per_query, 2 * per_query);
      simd.copy_few(weight, samples.weights + q * per_query, per_query);
    }
    simd.place(samples, n * per_query);
  }

  Samples samples;
  int64_t queries = 0, per_query = 0;

 private:
  const DeformableLayout& layout_;
  const float *locations_, *weights_;
  float *width_, *height_;
  int32_t *first_, *query_;
  int64_t first_sample_ = 0;
};

} // namespace rskernels
