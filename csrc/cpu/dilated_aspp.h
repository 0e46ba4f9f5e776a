// What the forward and the backward pass of dilated_aspp share: channels-last operands, packed weights, and the
// sum over taps that is both a dilated convolution and its input gradient.
//
// Names: a *tap* is one of the nine positions of the 3x3 kernel, a *patch* a rectangle of output pixels. A patch
// times a tile of output channels is one block of fp32 sums, which stays in the second-level cache; the part of a
// tap that falls into the zero padding is never computed.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/BFloat16.h>

#include <array>
#include <optional>
#include <vector>

#include "check.h"
#include "work.h"

namespace rskernels {

// Narrow tiles of outputs with many inputs: a panel of weights (256 KiB in fp32) and the sums of a patch (128 KiB)
// share the second-level cache.
constexpr int64_t kPatchPixels = 512;
constexpr int64_t kOutputTile = 64;
constexpr int64_t kInputTile = 1024;
constexpr int64_t kTaps = 9;
// The tap in the middle comes first: no pixel misses it, so it starts the sums.
constexpr std::array<int64_t, kTaps> kTapOrder = {4, 0, 1, 2, 3, 5, 6, 7, 8};

enum class Activation : int { none, gelu, gelu_tanh, relu };

// What forward and backward are given alike, checked: what follows trusts it. One feature map serves all branches, or
// there is one per branch.
struct AsppShape {
  int64_t batch, height, width;
  int64_t channels = 0; // of the concatenation
  int64_t outputs;      // of the projection, or of the concatenation where there is none

  AsppShape(const std::vector<at::Tensor>& features, const std::vector<at::Tensor>& weights,
      at::IntArrayRef dilations, const std::optional<at::Tensor>& scale,
      const std::optional<at::Tensor>& projection_weight);
};

// Vector passes, chosen by instruction set (dilated_aspp_simd.h).
template <typename Io, typename Operand>
struct AsppKernels {
  void (*image_to_rows)(
      const Io* from, int64_t channels, int64_t plane, int64_t pixels, Operand* to, int64_t stride);
  void (*copy_row)(const Io* from, Operand* to, int64_t n);
  void (*pack_taps)(
      const struct TapSource& source, const Io* from, const Io* end, Operand* to, int64_t to_k, int64_t to_tap);
  void (*finish_values)(const struct Finish& finish, const float* sums, Io* out, Io* kept);
  void (*finish_operand)(const struct Finish& finish, const float* sums, Operand* out, Io* kept);
  const Operand* (*pair_rows)(const Operand* from, int64_t stride, int64_t rows, Operand* to);
  void (*interleave_taps)(const float* from, int64_t tap_stride, int64_t channels, Io* to);
};

template <typename Io, typename Operand>
const AsppKernels<Io, Operand>& aspp_kernels();

// Where pack_taps finds weight (k, n, tap): at from[k * k_stride + n * n_stride + tap * tap_stride]. One of the
// three strides is 1.
struct TapSource {
  int64_t inputs, outputs, k_stride, n_stride, tap_stride, taps;
  bool flip; // the taps come out in reverse: a convolution's input gradient
};

// The last step of a block of sums: activation(gain * sum + offset), written to rows of a map; what entered the
// activation goes to `kept`, too, where that is not null.
struct Finish {
  int64_t pixels, channels, sums_stride, out_stride, kept_stride;
  const float *gain, *offset; // gain may be null: 1
  Activation activation;
};

// A (B, h, w, C) map whose channels are neighbours.
template <typename T>
struct AsppMap {
  T* data = nullptr;
  int64_t batch_stride = 0, row_stride = 0, pixel_stride = 0;

  T* at(int64_t batch, int64_t y, int64_t x) const {
    return data + batch * batch_stride + y * row_stride + x * pixel_stride;
  }
};

// A dense (B, h, w, C) tensor, or none.
template <typename T>
AsppMap<T> dense_map(const at::Tensor& t) {
  if (!t.defined()) return {};
  return {data_of<T>(t), t.stride(0), t.stride(1), t.stride(2)};
}

template <typename T>
struct OwnedMap : AsppMap<T> {
  at::Tensor owner;
};

template <typename T>
at::TensorOptions options_of(const at::Tensor& like) {
  return like.options().dtype(std::is_same_v<T, float> ? at::kFloat : at::kBFloat16);
}

// A (B, C, h, w) tensor as operand of tile products: in place where its channels are neighbours (and, in bf16,
// come in pairs), else converted once. An odd last channel is paired with zero.
template <typename Io, typename Operand>
OwnedMap<const Operand> operand_map(const at::Tensor& x) {
  const int64_t batch = x.size(0), channels = x.size(1), height = x.size(2), width = x.size(3);
  const int64_t row = depth<Operand>(channels);
  const bool dense = (channels == 1 || x.stride(1) == 1) && (width == 1 || x.stride(3) >= channels);
  OwnedMap<const Operand> map;
  if (std::is_same_v<Io, Operand> && dense && row == channels) {
    map.owner = x;
    map.data = x.const_data_ptr<Operand>();
    map.batch_stride = x.stride(0);
    map.row_stride = x.stride(2);
    map.pixel_stride = width == 1 ? channels : x.stride(3);
    return map;
  }
  const at::Tensor from = dense ? x : x.contiguous();
  map.owner = at::empty({batch, height, width, row}, options_of<Operand>(x));
  map.batch_stride = height * width * row;
  map.row_stride = width * row;
  map.pixel_stride = row;
  Operand* to = data_of<Operand>(map.owner);
  map.data = to;
  const Io* values = from.const_data_ptr<Io>();
  const auto& simd = aspp_kernels<Io, Operand>();
  at::parallel_for(0, batch * height, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / height, y = i % height;
      Operand* rows = to + b * map.batch_stride + y * map.row_stride;
      const Io* line = values + b * from.stride(0) + y * from.stride(2);
      if (row > channels) {
        for (int64_t p = 0; p < width; ++p) rows[p * row + channels] = Operand(0.0f);
      }
      if (dense) {
        for (int64_t p = 0; p < width; ++p) simd.copy_row(line + p * from.stride(3), rows + p * row, channels);
      } else {
        simd.image_to_rows(line, channels, from.stride(1), width, rows, row);
      }
    }
  });
  return map;
}

// Weights as right operands: [tile of outputs][tap][input][output], bf16 in pairs of inputs, zeros where outputs
// are rounded up to whole vectors.
template <typename Operand>
struct PackedTaps {
  at::Tensor owner;
  Operand* data = nullptr;
  int64_t inputs = 0, taps = 0; // inputs: rounded up to pairs in bf16
  Tiling outputs{1, kOutputTile};

  int64_t columns(int64_t tile) const { return round_up(outputs.length(tile), kVector); }
  Operand* at(int64_t tile, int64_t tap, int64_t input) const {
    return data + taps * inputs * outputs.begin(tile) + (tap * inputs + input) * columns(tile);
  }
};

template <typename Io, typename Operand>
PackedTaps<Operand> pack(const at::Tensor& like, const Io* from, const TapSource& source) {
  PackedTaps<Operand> packed;
  packed.inputs = depth<Operand>(source.inputs);
  packed.taps = source.taps;
  packed.outputs = Tiling(source.outputs, kOutputTile);
  const int64_t groups = round_up(source.outputs, kVector) / kVector;
  packed.owner = at::empty({source.taps * packed.inputs * groups * kVector}, options_of<Operand>(like));
  packed.data = data_of<Operand>(packed.owner);
  const Io* end = from + source.inputs * source.outputs * source.taps;
  const auto& simd = aspp_kernels<Io, Operand>();
  constexpr int64_t kPair = std::is_same_v<Operand, float> ? 1 : 2;
  at::parallel_for(0, groups, 1, [&](int64_t first, int64_t last) {
    for (int64_t group = first; group < last; ++group) {
      const int64_t n = group * kVector, tile = n / packed.outputs.size, columns = packed.columns(tile);
      TapSource part = source;
      part.outputs = std::min(kVector, source.outputs - n);
      Operand* to = packed.at(tile, 0, 0) + kPair * (n - packed.outputs.begin(tile));
      simd.pack_taps(part, from + n * source.n_stride, end, to, columns, packed.inputs * columns);
    }
  });
  return packed;
}

// A convolution's weight (O, C, 3, 3), read in place where it is contiguous or channels-last. `transposed`: the
// operand of its input gradient, which takes O in and gives C.
template <typename Io, typename Operand>
PackedTaps<Operand> pack_convolution(const at::Tensor& weight_, bool transposed) {
  const bool last = !weight_.is_contiguous() && weight_.is_contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor weight = last ? weight_ : weight_.contiguous();
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  const int64_t row = kTaps * inputs, channel = last ? 1 : kTaps, tap = last ? inputs : 1;
  const Io* from = weight.const_data_ptr<Io>();
  if (transposed) return pack<Io, Operand>(weight, from, {outputs, inputs, row, channel, tap, kTaps, true});
  return pack<Io, Operand>(weight, from, {inputs, outputs, channel, row, tap, kTaps, false});
}

// A rectangle of output pixels.
struct Patch {
  int64_t batch, top, left, rows, columns;
  int64_t pixels() const { return rows * columns; }
};

// The map cut into patches of at most `pixels`. A pixel's sum does not depend on the cut.
struct Patches {
  int64_t height, width, columns, rows, across, down, count;

  Patches(int64_t batch, int64_t height_, int64_t width_, int64_t pixels) : height(height_), width(width_) {
    const int64_t pieces = (width + pixels - 1) / pixels;
    columns = (width + pieces - 1) / pieces;
    across = (width + columns - 1) / columns;
    const int64_t tallest = std::clamp<int64_t>(pixels / columns, 1, height);
    down = (height + tallest - 1) / tallest;
    rows = (height + down - 1) / down;
    down = (height + rows - 1) / rows;
    count = batch * down * across;
  }
  int64_t largest() const { return rows * columns; }
  Patch at(int64_t index) const {
    const int64_t left = index % across * columns, top = index / across % down * rows;
    return {index / across / down, top, left, std::min(rows, height - top), std::min(columns, width - left)};
  }
};

// Patches of kPatchPixels, smaller ones where there would be too few tasks for the threads.
inline Patches patches_for(int64_t batch, int64_t height, int64_t width, int64_t tasks_per_patch) {
  int64_t pixels = kPatchPixels;
  while (pixels > 64 &&
         Patches(batch, height, width, pixels).count * tasks_per_patch < 4 * at::get_num_threads()) {
    pixels /= 2;
  }
  return Patches(batch, height, width, pixels);
}

// Adds (or, with `start`, writes) one 3x3 convolution of a map to the sums of a patch and a tile of outputs.
template <typename Operand>
void add_taps(const AsppMap<const Operand>& map, const PackedTaps<Operand>& weights, int64_t tile,
    int64_t dilation, int64_t height, int64_t width, const Patch& patch, float* sums, bool start) {
  const int64_t columns = weights.columns(tile);
  const Tiling inputs(weights.inputs, kInputTile);
  for (const int64_t tap : kTapOrder) {
    const int64_t dy = (tap / 3 - 1) * dilation, dx = (tap % 3 - 1) * dilation;
    const int64_t top = std::max(patch.top, -dy), bottom = std::min(patch.top + patch.rows, height - dy);
    const int64_t left = std::max(patch.left, -dx), right = std::min(patch.left + patch.columns, width - dx);
    if (top >= bottom || left >= right) continue;
    // Whole patches at once where their pixels are equally far apart; else row by row: few distinct sizes.
    const bool whole = bottom - top == patch.rows && right - left == width &&
                       (patch.rows == 1 || map.row_stride == width * map.pixel_stride);
    const int64_t steps = whole ? 1 : bottom - top;
    const int64_t pixels = whole ? patch.pixels() : right - left;
    for (int64_t k = 0; k < inputs.count; ++k) {
      const Operand* right_operand = weights.at(tile, tap, inputs.begin(k));
      const bool accumulate = !(start && tap == kTapOrder[0] && k == 0);
      for (int64_t step = 0; step < steps; ++step) {
        const int64_t y = top + step;
        tile_product(pixels, columns, inputs.length(k),
            map.at(patch.batch, y + dy, left + dx) + inputs.begin(k), map.pixel_stride, right_operand, columns,
            sums + ((y - patch.top) * patch.columns + left - patch.left) * columns, columns, accumulate);
      }
    }
  }
}

} // namespace rskernels
