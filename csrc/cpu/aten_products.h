// What linear and dilated_aspp share around products that PyTorch's own operators compute for them.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/threshold_backward.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <string_view>

#include "check.h"

namespace rskernels {

// Products run in the dtype of their operands, whatever autocast says where backward is called.
struct PlainDispatch {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

inline void check_activation(const Check& check, std::string_view name) {
  TORCH_CHECK_VALUE(name == "none" || name == "gelu" || name == "gelu_tanh" || name == "relu", check.op,
      ": activation is ", name, "; expected none, gelu, gelu_tanh or relu");
}

inline at::Tensor activate(const at::Tensor& pre, std::string_view activation) {
  if (activation == "gelu") return at::gelu(pre, "none");
  if (activation == "gelu_tanh") return at::gelu(pre, "tanh");
  return activation == "relu" ? at::relu(pre) : pre;
}

// The gradient of what entered the activation. `saved` is that for gelu, for relu the output will do.
inline at::Tensor through_activation(
    const at::Tensor& grad, const at::Tensor& saved, std::string_view activation) {
  if (activation == "gelu") return at::gelu_backward(grad, saved, "none");
  if (activation == "gelu_tanh") return at::gelu_backward(grad, saved, "tanh");
  return activation == "relu" ? at::threshold_backward(grad, saved, 0) : grad;
}

// (..., C) as a channels-last image of one row: what oneDNN's 1x1 convolution reads as it is. A 1x1 kernel has no
// dilation to speak of; saying kStatedDilation makes PyTorch take oneDNN with one thread, too, where it would
// otherwise fall back to MKL.
inline at::Tensor as_image(const at::Tensor& tensor) {
  const at::Tensor rows = tensor.contiguous();
  const int64_t channels = rows.size(-1), pixels = rows.numel() / channels;
  return rows.as_strided({1, channels, pixels, 1}, {pixels * channels, 1, channels, channels});
}
constexpr int64_t kStatedDilation = 2;

} // namespace rskernels
