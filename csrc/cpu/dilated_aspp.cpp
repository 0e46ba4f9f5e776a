// dilated_aspp on the CPU: the forward pass. Meaning and formulas: rskernels/ops/dilated_aspp.py.
//
// For each patch of pixels and each branch, nine taps add their products (pixels x C)(C x O) to a block of fp32
// sums, each clipped to the pixels whose input lies inside the map; then bias, scale, shift and activation on the
// way to the branch's slice of the concatenation. With a projection the slices of one patch stay in a thread's
// buffer and go straight into its product.
#include <ATen/ops/addcmul.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

#include "aten_products.h"
#include "dilated_aspp.h"

#define RSK_SIMD_FILE "dilated_aspp_simd.h"
#include "foreach_isa.h"

namespace rskernels {

template <typename Io, typename Operand>
const AsppKernels<Io, Operand>& aspp_kernels() {
  return RSK_AT_ISA_LEVEL(kAsppKernels<Io, Operand>);
}
template const AsppKernels<float, float>& aspp_kernels();
template const AsppKernels<at::BFloat16, float>& aspp_kernels();
template const AsppKernels<at::BFloat16, at::BFloat16>& aspp_kernels();

AsppShape::AsppShape(const std::vector<at::Tensor>& features, const std::vector<at::Tensor>& weights,
    at::IntArrayRef dilations, const std::optional<at::Tensor>& scale,
    const std::optional<at::Tensor>& projection_weight) {
  constexpr int64_t kLargestDilation = int64_t(1) << 30;
  const Check check{"dilated_aspp"};
  TORCH_CHECK_VALUE(!weights.empty() && dilations.size() == weights.size() &&
                        (features.size() == 1 || features.size() == weights.size()),
      check.op, ": got ", features.size(), " features, ", weights.size(), " weights, ", dilations.size(),
      " dilations; expected one of each per branch, or one feature map for all");
  const at::Tensor& first = features[0];
  check.served("features", first);
  const at::ScalarType dtype = first.scalar_type();
  check.rank("features", first, 4);
  batch = first.size(0);
  height = first.size(2);
  width = first.size(3);
  for (size_t branch = 0; branch < weights.size(); ++branch) {
    const at::Tensor &x = features[features.size() == 1 ? 0 : branch], &weight = weights[branch];
    check.rank("features", x, 4);
    check.same("features", x, {batch, x.size(1), height, width}, dtype);
    check.rank("weights", weight, 4);
    check.same("weights", weight, {weight.size(0), x.size(1), 3, 3}, dtype);
    TORCH_CHECK_VALUE(x.size(1) > 0 && height > 0 && width > 0 && weight.size(0) > 0, check.op,
        ": features has shape ", x.sizes(), ", weights ", weight.sizes(),
        "; expected nothing empty but the batch");
    TORCH_CHECK_VALUE(dilations[branch] >= 1 && dilations[branch] <= kLargestDilation, check.op,
        ": dilations has ", dilations[branch], "; expected 1 to 2^30");
    channels += weight.size(0);
  }
  if (scale.has_value()) check.same("scale", *scale, {channels}, dtype);
  outputs = channels;
  if (!projection_weight.has_value()) return;
  check.rank("projection_weight", *projection_weight, 2);
  outputs = projection_weight->size(0);
  check.same("projection_weight", *projection_weight, {outputs, channels}, dtype);
  TORCH_CHECK_VALUE(outputs > 0, check.op, ": projection_weight has shape ", projection_weight->sizes());
}

namespace {

Activation activation_named(std::string_view name) {
  check_activation({"dilated_aspp"}, name);
  return name == "gelu"        ? Activation::gelu
         : name == "gelu_tanh" ? Activation::gelu_tanh
         : name == "relu"      ? Activation::relu
                               : Activation::none;
}

using OptionalTensor = std::optional<at::Tensor>;

// Vectors may run over the end.
at::Tensor padded_floats(const at::Tensor& values) {
  at::Tensor padded = at::zeros({values.numel() + kVector}, values.options().dtype(at::kFloat));
  padded.narrow(0, 0, values.numel()).copy_(values);
  return padded;
}

struct Call {
  const std::vector<at::Tensor>&features, &weights;
  std::vector<int64_t> dilations;
  at::Tensor gain, offset; // of the concatenation; gain undefined without a scale
  Activation activation;
  OptionalTensor projection_weight;
  at::Tensor projection_offset;
  at::Tensor out, kept; // kept undefined where nobody wants it

  int64_t channels() const {
    int64_t sum = 0;
    for (const at::Tensor& weight : weights) sum += weight.size(0);
    return sum;
  }
};

// Operands of `count` branches from `first` on.
template <typename Io, typename Operand>
struct Prepared {
  const std::vector<OwnedMap<const Operand>>& maps;
  const size_t first;
  std::vector<PackedTaps<Operand>> weights;
  std::vector<int64_t> first_channel; // of a branch in the concatenation
  PackedTaps<Operand> projection;
  const int64_t channels; // of the concatenation

  Prepared(const Call& call, const std::vector<OwnedMap<const Operand>>& maps_, size_t first_, size_t count)
      : maps(maps_), first(first_), channels(call.channels()) {
    int64_t channel = 0;
    for (size_t branch = 0; branch < first + count; ++branch) {
      if (branch >= first) {
        weights.push_back(pack_convolution<Io, Operand>(call.weights[branch], false));
        first_channel.push_back(channel);
      }
      channel += call.weights[branch].size(0);
    }
    if (call.projection_weight.has_value()) {
      const at::Tensor weight = call.projection_weight->contiguous();
      projection = pack<Io, Operand>(
          weight, weight.const_data_ptr<Io>(), {channels, weight.size(0), 1, channels, 1, 1, false});
    }
  }
  const AsppMap<const Operand>& map(size_t branch) const { return maps[maps.size() == 1 ? 0 : first + branch]; }
};

// Task: one patch and one tile of one branch's outputs, or with a projection a patch with all of its branches.
template <typename Io, typename Operand>
class Forward {
 public:
  Forward(const Call& call, const Prepared<Io, Operand>& prepared, const Patches& patches)
      : call_(call),
        prepared_(prepared),
        patches_(patches),
        out_(dense_map<Io>(call.out)),
        kept_(dense_map<Io>(call.kept)),
        simd_(aspp_kernels<Io, Operand>()) {
    sums_ = scratch_.take<float>(patches.largest() * kOutputTile);
    if (call.projection_weight.has_value()) {
      concatenated_ = scratch_.take<Operand>(patches.largest() * depth<Operand>(prepared.channels));
    }
  }

  static int64_t tasks_per_patch(const Call& call, const Prepared<Io, Operand>& prepared) {
    if (call.projection_weight.has_value()) return 1;
    int64_t tiles = 0;
    for (const auto& weights : prepared.weights) tiles += weights.outputs.count;
    return tiles;
  }

  void run(int64_t task) {
    const Patch patch = patches_.at(task % patches_.count);
    int64_t tile = task / patches_.count;
    if (!call_.projection_weight.has_value()) {
      size_t branch = 0;
      for (; tile >= prepared_.weights[branch].outputs.count; ++branch) {
        tile -= prepared_.weights[branch].outputs.count;
      }
      return convolve(patch, branch, tile);
    }
    for (size_t branch = 0; branch < prepared_.weights.size(); ++branch) {
      for (tile = 0; tile < prepared_.weights[branch].outputs.count; ++tile) convolve(patch, branch, tile);
    }
    project(patch);
  }

 private:
  void convolve(const Patch& patch, size_t branch, int64_t tile) {
    const auto& weights = prepared_.weights[branch];
    add_taps(prepared_.map(branch), weights, tile, call_.dilations[prepared_.first + branch], patches_.height,
        patches_.width, patch, sums_, true);
    const int64_t channel = prepared_.first_channel[branch] + weights.outputs.begin(tile);
    Finish finish{patch.pixels(), weights.outputs.length(tile), weights.columns(tile), prepared_.channels,
        prepared_.channels, call_.gain.defined() ? call_.gain.const_data_ptr<float>() + channel : nullptr,
        call_.offset.const_data_ptr<float>() + channel, call_.activation};
    if (concatenated_ == nullptr) return write(patch, finish, channel, kept_.data != nullptr);
    finish.out_stride = depth<Operand>(prepared_.channels);
    finish.pixels = patch.columns;
    for (int64_t y = 0; y < patch.rows; ++y) {
      const int64_t pixel = y * patch.columns;
      simd_.finish_operand(finish, sums_ + pixel * finish.sums_stride,
          concatenated_ + pixel * finish.out_stride + channel, row_of(kept_, patch, y, channel));
    }
  }

  void project(const Patch& patch) {
    const auto& weights = prepared_.projection;
    const int64_t stride = depth<Operand>(prepared_.channels);
    const Tiling inputs(weights.inputs, kInputTile);
    for (int64_t tile = 0; tile < weights.outputs.count; ++tile) {
      const int64_t columns = weights.columns(tile), channel = weights.outputs.begin(tile);
      for (int64_t k = 0; k < inputs.count; ++k) {
        tile_product(patch.pixels(), columns, inputs.length(k), concatenated_ + inputs.begin(k), stride,
            weights.at(tile, 0, inputs.begin(k)), columns, sums_, columns, k > 0);
      }
      const Finish finish{patch.pixels(), weights.outputs.length(tile), columns, call_.out.size(3), 0, nullptr,
          call_.projection_offset.const_data_ptr<float>() + channel, Activation::none};
      write(patch, finish, channel, false);
    }
  }

  // Row by row: patches may be narrower than the map.
  void write(const Patch& patch, Finish finish, int64_t channel, bool keep) {
    finish.pixels = patch.columns;
    for (int64_t y = 0; y < patch.rows; ++y) {
      simd_.finish_values(finish, sums_ + y * patch.columns * finish.sums_stride,
          row_of(out_, patch, y, channel), keep ? row_of(kept_, patch, y, channel) : nullptr);
    }
  }

  static Io* row_of(const AsppMap<Io>& map, const Patch& patch, int64_t y, int64_t channel) {
    return map.data == nullptr ? nullptr : map.at(patch.batch, patch.top + y, patch.left) + channel;
  }

  const Call& call_;
  const Prepared<Io, Operand>& prepared_;
  const Patches& patches_;
  const AsppMap<Io> out_, kept_;
  const AsppKernels<Io, Operand>& simd_;
  Scratch scratch_;
  float* sums_ = nullptr;
  Operand* concatenated_ = nullptr;
};

template <typename Io, typename Operand>
void forward(const Call& call) {
  std::vector<OwnedMap<const Operand>> maps;
  for (const at::Tensor& x : call.features) maps.push_back(operand_map<Io, Operand>(x));
  // A projection wants all branches of a patch. Otherwise one after the other: only one has packed weights.
  const size_t branches = call.weights.size(), together = call.projection_weight.has_value() ? branches : 1;
  for (size_t first = 0; first < branches; first += together) {
    const Prepared<Io, Operand> prepared(call, maps, first, together);
    const int64_t tiles = Forward<Io, Operand>::tasks_per_patch(call, prepared);
    const at::Tensor& out = call.out;
    const Patches patches = patches_for(out.size(0), out.size(1), out.size(2), tiles);
    run_tasks(patches.count * tiles, 1, [&] { return Forward<Io, Operand>(call, prepared, patches); });
  }
}

std::tuple<at::Tensor, at::Tensor> dilated_aspp_forward(const std::vector<at::Tensor>& features,
    const std::vector<at::Tensor>& weights, const OptionalTensor& bias, at::IntArrayRef dilations,
    const OptionalTensor& scale, const OptionalTensor& shift, std::string_view activation,
    const OptionalTensor& projection_weight, const OptionalTensor& projection_bias, bool keep) {
  const AsppShape shape(features, weights, dilations, scale, projection_weight);
  const at::Tensor& x = features[0];
  const int64_t channels = shape.channels, outputs = shape.outputs;
  const Check check{"dilated_aspp"};
  if (bias.has_value()) check.same("bias", *bias, {channels}, x.scalar_type());
  TORCH_CHECK_VALUE(scale.has_value() == shift.has_value(), check.op,
      ": one of scale and shift is None; expected both or neither");
  if (shift.has_value()) check.same("shift", *shift, {channels}, x.scalar_type());
  TORCH_CHECK_VALUE(projection_weight.has_value() || !projection_bias.has_value(), check.op,
      ": projection_bias without projection_weight");
  if (projection_bias.has_value()) check.same("projection_bias", *projection_bias, {outputs}, x.scalar_type());
  const auto floats = x.options().dtype(at::kFloat);
  at::Tensor gain, offset = bias.has_value() ? bias->to(at::kFloat) : at::zeros({channels}, floats);
  if (scale.has_value()) {
    gain = padded_floats(*scale);
    offset = at::addcmul(shift->to(at::kFloat), offset, scale->to(at::kFloat));
  }
  // Channels-last, and not a permuted view: autograd would refuse to change that in place.
  const int64_t height = x.size(2), width = x.size(3);
  const at::Tensor out = at::empty_strided({x.size(0), outputs, height, width},
      {height * width * outputs, 1, width * outputs, outputs}, x.options());
  Call call{features, weights, dilations.vec(), gain, padded_floats(offset), activation_named(activation),
      projection_weight,
      padded_floats(projection_bias.has_value() ? *projection_bias : at::zeros({outputs}, floats)),
      out.permute({0, 2, 3, 1}), at::Tensor()};
  if (keep) call.kept = at::empty({x.size(0), height, width, channels}, x.options());
  if (x.numel() > 0) {
    with_operand_types(
        x.scalar_type(), [&](auto io, auto operand) { forward<decltype(io), decltype(operand)>(call); });
  }
  return {out, keep ? call.kept : at::empty({0}, x.options())};
}

} // namespace

TORCH_LIBRARY_IMPL(rskernels, CPU, m) {
  m.impl("dilated_aspp_forward", &dilated_aspp_forward);
}

} // namespace rskernels
