// dilated_aspp on the CPU: the backward pass. Meaning and formulas: rskernels/ops/dilated_aspp.py.
//
// The gradient goes back through the projection and the activation, and is summed for the biases, by products and
// passes of PyTorch's, whose bits repeat at a fixed number of threads. What is left is the gradient of the
// convolutions, (B, h, w, sum of O), and our own part, whose bits do not depend on the number of threads:
//   dx      the forward pass's sum over taps with the weights transposed and flipped; one map that every branch
//           read gets the sum of all branches before it is written;
//   dW      per tap, (O x pixels)(pixels x C) over the pixels whose input lies inside the map, gathered 128 at a
//           time. A task sums over all pixels in order.
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <tuple>

#include "aten_products.h"
#include "dilated_aspp.h"

namespace rskernels {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Weight gradients: pixels gathered for one product, and the block of sums, outputs x inputs.
constexpr int64_t kGatheredPixels = 128;
constexpr int64_t kGradientTile = 256;

struct Geometry {
  int64_t batch, height, width;
};

// The gradient of one feature map: (B, h, w, C), from the branches that read it.
template <typename Io, typename Operand>
struct InputGradient {
  std::vector<const AsppMap<const Operand>*> grads;
  std::vector<PackedTaps<Operand>> weights;
  std::vector<int64_t> dilations;
  Tensor out;
};

// Task: one patch and one tile of channels of one feature map.
template <typename Io, typename Operand>
class InputGradients {
 public:
  InputGradients(
      const std::vector<InputGradient<Io, Operand>>& maps, const Patches& patches, const float* zeros)
      : maps_(maps), patches_(patches), zeros_(zeros), simd_(aspp_kernels<Io, Operand>()) {
    sums_ = scratch_.take<float>(patches.largest() * kOutputTile);
  }

  void run(int64_t task) {
    const Patch patch = patches_.at(task % patches_.count);
    int64_t tile = task / patches_.count;
    size_t index = 0;
    for (; tile >= maps_[index].weights[0].outputs.count; ++index)
      tile -= maps_[index].weights[0].outputs.count;
    const InputGradient<Io, Operand>& map = maps_[index];
    const PackedTaps<Operand>& first = map.weights[0];
    for (size_t branch = 0; branch < map.grads.size(); ++branch) {
      add_taps(*map.grads[branch], map.weights[branch], tile, map.dilations[branch], patches_.height,
          patches_.width, patch, sums_, branch == 0);
    }
    const int64_t columns = first.columns(tile);
    const AsppMap<Io> out = dense_map<Io>(map.out);
    const Finish finish{patch.columns, first.outputs.length(tile), columns, out.pixel_stride, 0, nullptr,
        zeros_, Activation::none};
    for (int64_t y = 0; y < patch.rows; ++y) {
      simd_.finish_values(finish, sums_ + y * patch.columns * columns,
          out.at(patch.batch, patch.top + y, patch.left) + first.outputs.begin(tile), nullptr);
    }
  }

 private:
  const std::vector<InputGradient<Io, Operand>>& maps_;
  const Patches& patches_;
  const float* zeros_;
  const AsppKernels<Io, Operand>& simd_;
  Scratch scratch_;
  float* sums_;
};

// The gradient of one branch's weights, (9, O, C) in fp32.
template <typename Operand>
struct WeightGradient {
  const AsppMap<const Operand>*grad, *input;
  int64_t dilation;
  Tiling outputs, inputs;
  Tensor sums;

  int64_t tasks() const { return kTaps * outputs.count * inputs.count; }
};

// Task: one tap, one tile of outputs and one of inputs of one branch.
template <typename Io, typename Operand>
class WeightGradients {
 public:
  WeightGradients(const std::vector<WeightGradient<Operand>>& branches, const Geometry& geometry)
      : branches_(branches), geometry_(geometry), simd_(aspp_kernels<Io, Operand>()) {
    constexpr int64_t kLongestRow = kGradientTile + kVector;
    grad_rows_ = scratch_.take<Operand>(kGatheredPixels * kLongestRow);
    input_rows_ = scratch_.take<Operand>(kGatheredPixels * kGradientTile);
    if (!std::is_same_v<Operand, float>) {
      grad_pairs_ = scratch_.take<Operand>(kGatheredPixels * kLongestRow);
      input_pairs_ = scratch_.take<Operand>(kGatheredPixels * kGradientTile);
    }
    sums_ = scratch_.take<float>(kGradientTile * kGradientTile);
  }

  void run(int64_t task) {
    size_t index = 0;
    for (; task >= branches_[index].tasks(); ++index) task -= branches_[index].tasks();
    const WeightGradient<Operand>& branch = branches_[index];
    const int64_t tap = task % kTaps, tile = task / kTaps;
    const int64_t o = tile % branch.outputs.count, c = tile / branch.outputs.count;
    const int64_t first_output = branch.outputs.begin(o), first_input = branch.inputs.begin(c);
    outputs_ = branch.outputs.length(o);
    inputs_ = branch.inputs.length(c);
    columns_ = round_up(inputs_, kVector);
    // Read by columns: rows a power of two apart would share a few sets of the cache.
    grad_row_ = round_up(outputs_, kVector) | kVector;
    std::fill_n(sums_, outputs_ * columns_, 0.0f);
    const int64_t dy = (tap / 3 - 1) * branch.dilation, dx = (tap % 3 - 1) * branch.dilation;
    const int64_t top = std::max<int64_t>(0, -dy), bottom = std::min(geometry_.height, geometry_.height - dy);
    const int64_t left = std::max<int64_t>(0, -dx), right = std::min(geometry_.width, geometry_.width - dx);
    int64_t gathered = 0;
    for (int64_t b = 0; b < geometry_.batch; ++b) {
      for (int64_t y = top; y < bottom; ++y) {
        for (int64_t x = left; x < right; ++x) {
          std::copy_n(branch.grad->at(b, y, x) + first_output, outputs_, grad_rows_ + gathered * grad_row_);
          std::copy_n(
              branch.input->at(b, y + dy, x + dx) + first_input, inputs_, input_rows_ + gathered * columns_);
          if (++gathered == kGatheredPixels) {
            add(gathered);
            gathered = 0;
          }
        }
      }
    }
    if (gathered > 0) add(gathered);
    float* to = branch.sums.template data_ptr<float>() +
                (tap * branch.outputs.total + first_output) * branch.inputs.total + first_input;
    for (int64_t i = 0; i < outputs_; ++i) {
      std::copy_n(sums_ + i * columns_, inputs_, to + i * branch.inputs.total);
    }
  }

 private:
  void add(int64_t pixels) {
    const int64_t pixel_depth = depth<Operand>(pixels);
    if (pixel_depth > pixels) {
      std::fill_n(grad_rows_ + pixels * grad_row_, grad_row_, Operand(0.0f));
      std::fill_n(input_rows_ + pixels * columns_, columns_, Operand(0.0f));
    }
    const Operand* left = simd_.pair_rows(grad_rows_, grad_row_, pixel_depth, grad_pairs_);
    const Operand* right = simd_.pair_rows(input_rows_, columns_, pixel_depth, input_pairs_);
    tile_product_columns(
        outputs_, columns_, pixel_depth, left, grad_row_, right, columns_, sums_, columns_, true);
  }

  const std::vector<WeightGradient<Operand>>& branches_;
  const Geometry& geometry_;
  const AsppKernels<Io, Operand>& simd_;
  Scratch scratch_;
  Operand *grad_rows_, *input_rows_, *grad_pairs_ = nullptr, *input_pairs_ = nullptr;
  float* sums_;
  int64_t outputs_ = 0, inputs_ = 0, columns_ = 0, grad_row_ = 0;
};

struct Gradients {
  std::vector<Tensor> features, weights;
};

// Which gradients somebody asked for.
struct Wanted {
  std::vector<bool> features, weights;
  bool bias, projection_weight, projection_bias;

  Wanted(const c10::List<bool>& mask, size_t feature_count, size_t branches) {
    for (size_t i = 0; i < feature_count; ++i) features.push_back(mask[i]);
    for (size_t i = 0; i < branches; ++i) weights.push_back(mask[feature_count + i]);
    bias = mask[feature_count + branches];
    projection_weight = mask[feature_count + branches + 1];
    projection_bias = mask[feature_count + branches + 2];
  }
  static bool any(const std::vector<bool>& list) {
    return std::find(list.begin(), list.end(), true) != list.end();
  }
  bool convolution() const { return bias || any(features) || any(weights); }
};

template <typename Io, typename Operand>
void input_gradients(const std::vector<OwnedMap<const Operand>>& grads, const std::vector<Tensor>& weights,
    at::IntArrayRef dilations, const Geometry& geometry, const Wanted& wanted, std::vector<Tensor>& results) {
  std::vector<InputGradient<Io, Operand>> maps;
  int64_t tiles = 0;
  const bool shared = wanted.features.size() == 1;
  for (size_t f = 0; f < wanted.features.size(); ++f) {
    if (!wanted.features[f]) continue;
    InputGradient<Io, Operand> map;
    for (size_t branch = shared ? 0 : f; branch < (shared ? weights.size() : f + 1); ++branch) {
      map.grads.push_back(&grads[branch]);
      map.dilations.push_back(dilations[branch]);
      map.weights.push_back(pack_convolution<Io, Operand>(weights[branch], true));
    }
    map.out = at::empty(
        {geometry.batch, geometry.height, geometry.width, weights[f].size(1)}, options_of<Io>(weights[f]));
    results[f] = map.out.permute({0, 3, 1, 2});
    tiles += map.weights[0].outputs.count;
    maps.push_back(std::move(map));
  }
  const Patches patches = patches_for(geometry.batch, geometry.height, geometry.width, tiles);
  const std::vector<float> zeros(kOutputTile + kVector);
  run_tasks(patches.count * tiles, 1, [&] { return InputGradients<Io, Operand>(maps, patches, zeros.data()); });
}

template <typename Io, typename Operand>
void weight_gradients(const std::vector<OwnedMap<const Operand>>& grads, const std::vector<Tensor>& features,
    const std::vector<Tensor>& weights, at::IntArrayRef dilations, const Geometry& geometry,
    const Wanted& wanted, std::vector<Tensor>& results) {
  std::vector<OwnedMap<const Operand>> inputs(features.size());
  const bool shared = features.size() == 1;
  for (size_t f = 0; f < features.size(); ++f) {
    if (shared || wanted.weights[f]) inputs[f] = operand_map<Io, Operand>(features[f]);
  }
  std::vector<WeightGradient<Operand>> branches;
  std::vector<size_t> branch_of;
  int64_t tasks = 0;
  for (size_t branch = 0; branch < weights.size(); ++branch) {
    if (!wanted.weights[branch]) continue;
    const int64_t outputs = weights[branch].size(0), channels = weights[branch].size(1);
    branches.push_back({&grads[branch], &inputs[shared ? 0 : branch], dilations[branch],
        Tiling(outputs, kGradientTile), Tiling(channels, kGradientTile),
        at::empty({kTaps, outputs, channels}, options_of<float>(weights[branch]))});
    tasks += branches.back().tasks();
    branch_of.push_back(branch);
  }
  run_tasks(tasks, 1, [&] { return WeightGradients<Io, Operand>(branches, geometry); });
  const auto& simd = aspp_kernels<Io, Operand>();
  for (size_t i = 0; i < branches.size(); ++i) {
    const int64_t outputs = branches[i].outputs.total, channels = branches[i].inputs.total;
    const Tensor result = at::empty({outputs, channels, 3, 3}, options_of<Io>(weights[branch_of[i]]));
    const float* sums = branches[i].sums.template const_data_ptr<float>();
    Io* to = data_of<Io>(result);
    at::parallel_for(0, outputs, 1, [&](int64_t begin, int64_t end) {
      for (int64_t o = begin; o < end; ++o) {
        simd.interleave_taps(sums + o * channels, outputs * channels, channels, to + o * channels * kTaps);
      }
    });
    results[branch_of[i]] = result;
  }
}

// dconv: (B, h, w, sum of O).
template <typename Io, typename Operand>
void convolution_gradients(const Tensor& dconv, const std::vector<Tensor>& features,
    const std::vector<Tensor>& weights, at::IntArrayRef dilations, const Wanted& wanted, Gradients& results) {
  const Geometry geometry{dconv.size(0), dconv.size(1), dconv.size(2)};
  std::vector<OwnedMap<const Operand>> grads;
  int64_t channel = 0;
  for (const Tensor& weight : weights) {
    grads.push_back(operand_map<Io, Operand>(dconv.narrow(3, channel, weight.size(0)).permute({0, 3, 1, 2})));
    channel += weight.size(0);
  }
  if (Wanted::any(wanted.features)) {
    input_gradients<Io, Operand>(grads, weights, dilations, geometry, wanted, results.features);
  }
  if (Wanted::any(wanted.weights)) {
    weight_gradients<Io, Operand>(grads, features, weights, dilations, geometry, wanted, results.weights);
  }
}

// (B, C, h, w) of any strides as a dense (B, h, w, C).
template <typename Io>
Tensor dense_rows(const Tensor& grad) {
  const int64_t channels = grad.size(1);
  const bool converts = channels > 1 && grad.stride(1) != 1 && depth<Io>(channels) == channels;
  return converts ? operand_map<Io, Io>(grad).owner : grad.permute({0, 2, 3, 1}).contiguous();
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor, Tensor, Tensor> dilated_aspp_backward(
    const Tensor& grad, const std::vector<Tensor>& features, const std::vector<Tensor>& weights,
    const Tensor& kept, const OptionalTensor& scale, const OptionalTensor& projection_weight,
    at::IntArrayRef dilations, std::string_view activation, const c10::List<bool>& mask) {
  const PlainDispatch guard;
  const AsppShape shape(features, weights, dilations, scale, projection_weight);
  const int64_t channels = shape.channels;
  const Check check{"dilated_aspp"};
  TORCH_CHECK_VALUE(mask.size() == features.size() + weights.size() + 3, check.op, ": mask has ", mask.size(),
      " values; expected one per feature map and weight, and 3");
  const Wanted wanted(mask, features.size(), weights.size());
  check_activation(check, activation);
  check.same("grad", grad, {shape.batch, shape.outputs, shape.height, shape.width}, features[0].scalar_type());
  TORCH_CHECK_VALUE(projection_weight.has_value() || !(wanted.projection_weight || wanted.projection_bias),
      check.op, ": mask asks for the gradient of a projection that is None");
  if (wanted.projection_weight || (wanted.convolution() && activation != "none")) {
    check.same("kept", kept, {shape.batch, shape.height, shape.width, channels}, grad.scalar_type());
  }
  const auto nothing = [&] { return at::empty({0}, grad.options()); }; // outputs must not share memory
  Gradients results;
  for (size_t i = 0; i < features.size(); ++i) results.features.push_back(nothing());
  for (size_t i = 0; i < weights.size(); ++i) results.weights.push_back(nothing());
  Tensor bias = nothing(), projection = nothing(), projection_bias = nothing();
  if (grad.numel() == 0) {
    for (size_t i = 0; i < features.size(); ++i) {
      if (wanted.features[i]) results.features[i] = at::zeros_like(features[i], at::MemoryFormat::ChannelsLast);
    }
    for (size_t i = 0; i < weights.size(); ++i) {
      if (wanted.weights[i]) results.weights[i] = at::zeros_like(weights[i], at::MemoryFormat::Contiguous);
    }
    if (wanted.bias) bias = at::zeros({channels}, grad.options());
    if (wanted.projection_weight) projection = at::zeros_like(*projection_weight);
    if (wanted.projection_bias) projection_bias = at::zeros({grad.size(1)}, grad.options());
    return {results.features, results.weights, bias, projection, projection_bias};
  }
  Tensor rows = grad.scalar_type() == at::kFloat ? dense_rows<float>(grad) : dense_rows<at::BFloat16>(grad);
  if (projection_weight.has_value()) {
    const Tensor& weight = *projection_weight;
    // Only sizes of `activated` are read where no weight gradient is wanted.
    const Tensor activated =
        wanted.projection_weight
            ? activate(kept, activation)
            : at::empty({grad.size(0), grad.size(2), grad.size(3), channels}, grad.options());
    const auto gradients = at::convolution_backward(as_image(rows), as_image(activated),
        weight.contiguous().view({weight.size(0), channels, 1, 1}), at::OptionalIntArrayRef(), {1, 1}, {0, 0},
        {kStatedDilation, kStatedDilation}, false, {0, 0}, 1,
        {wanted.convolution(), wanted.projection_weight, false});
    if (wanted.projection_bias) projection_bias = at::sum(rows, at::IntArrayRef({0, 1, 2}));
    if (wanted.projection_weight)
      projection = std::get<1>(gradients).reshape({weight.size(0), channels}).contiguous();
    if (wanted.convolution()) {
      rows = std::get<0>(gradients)
                 .permute({0, 2, 3, 1})
                 .contiguous()
                 .view({grad.size(0), grad.size(2), grad.size(3), channels});
    }
  }
  if (wanted.convolution()) {
    rows = through_activation(rows, kept, activation);
    if (scale.has_value()) rows = at::mul(rows, *scale);
    if (wanted.bias) bias = at::sum(rows, at::IntArrayRef({0, 1, 2}));
    with_operand_types(grad.scalar_type(), [&](auto io, auto operand) {
      convolution_gradients<decltype(io), decltype(operand)>(
          rows, features, weights, dilations, wanted, results);
    });
  }
  return {results.features, results.weights, bias, projection, projection_bias};
}

} // namespace

TORCH_LIBRARY_IMPL(rskernels, CPU, m) {
  m.impl("dilated_aspp_backward", &dilated_aspp_backward);
}

} // namespace rskernels
