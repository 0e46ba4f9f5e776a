// linear on the CPU: y = activation(x Wᵀ + b), its gradients, and which library computes each product.
//
// PyTorch ships two matrix libraries. Its own operators send fp32 products to MKL and bf16 products to
// oneDNN; oneDNN's fp32 product is reachable through two operators that were made for something else:
//   mkldnn::_linear_pointwise    x Wᵀ + b with a fused activation (made for the compiler), and, with the
//                                weight as a transposed view, dx = g W;
//   aten::convolution_backward   dW = gᵀ x, as the weight gradient of a 1x1 convolution over a channels-last
//                                image of N pixels: no operand is copied or transposed.
#include <exception>
#include <string_view>
#include <tuple>

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <c10/util/accumulate.h>
#include <torch/library.h>

#include "aten_products.h"
#include "check.h"
#include "linear.h"

namespace rskernels {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

using Pointwise = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, std::string_view,
    c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>);

// Absent from builds of torch without oneDNN.
const std::optional<c10::TypedOperatorHandle<Pointwise>>& pointwise() {
  static const auto handle = []() -> std::optional<c10::TypedOperatorHandle<Pointwise>> {
    const auto found = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
    if (!found.has_value() || !found->hasKernelForDispatchKey(c10::DispatchKey::CPU)) return std::nullopt;
    return found->typed<Pointwise>();
  }();
  return handle;
}

Tensor onednn_product(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, std::string_view activation) {
  const bool gelu = activation == "gelu" || activation == "gelu_tanh";
  // oneDNN reads the bias as dense, whatever its strides.
  const OptionalTensor dense = bias.has_value() ? OptionalTensor(bias->contiguous()) : std::nullopt;
  const std::string_view algorithm = activation == "gelu_tanh" ? "tanh" : gelu ? "none" : "";
  return pointwise()->call(
      x, weight, dense, gelu ? "gelu" : activation, c10::List<std::optional<at::Scalar>>(), algorithm);
}

// Without AVX-512, or with ONEDNN_MAX_CPU_ISA set, this oneDNN may have no bf16 product.
bool has_bf16_product() {
  static const bool works = []() {
    try {
      const Tensor ones = at::ones({16, 16}, at::kBFloat16);
      return onednn_product(ones, ones, std::nullopt, "gelu").numel() > 0;
    } catch (const std::exception&) { // oneDNN throws its own
      return false;
    }
  }();
  return works;
}

bool use_onednn(Pass pass, const Tensor& operand, int64_t rows, int64_t in, int64_t out) {
  if (in == 0 || !at::globalContext().userEnabledMkldnn() || !pointwise().has_value()) return false;
  const bool bf16 = operand.scalar_type() == at::kBFloat16;
  if (!bf16 && operand.scalar_type() != at::kFloat) return false;
  const int index = table_index(bf16, pass, shape_class(rows, in, out));
  const Product product = product_table()[index].load(std::memory_order_relaxed);
  return product == Product::onednn && (!bf16 || has_bf16_product());
}

// Rows of the last dimension, densely packed.
Tensor as_rows(const Tensor& tensor) {
  const int64_t rows = c10::multiply_integers(tensor.sizes().slice(0, tensor.dim() - 1));
  return tensor.reshape({rows, tensor.size(-1)}).contiguous();
}

void activate_(Tensor& pre, std::string_view activation) {
  if (activation == "gelu") at::gelu_(pre, "none");
  if (activation == "gelu_tanh") at::gelu_(pre, "tanh");
  if (activation == "relu") at::relu_(pre);
}

constexpr Check kCheck{"linear"};

void check_operands(const Tensor& x, const Tensor& weight, std::string_view activation) {
  kCheck.floating("x", x);
  kCheck.rank("weight", weight, 2);
  kCheck.dtype("weight", weight, x.scalar_type());
  kCheck.rows("x", x, weight.size(1));
  check_activation(kCheck, activation);
}

std::tuple<Tensor, Tensor> linear_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
    std::string_view activation, bool keep_pre) {
  const PlainDispatch guard;
  check_operands(x, weight, activation);
  const int64_t in = weight.size(1), out = weight.size(0), rows = in > 0 ? x.numel() / in : 0;
  if (bias.has_value()) kCheck.same("bias", *bias, {out}, x.scalar_type());
  auto sizes = x.sizes().vec();
  sizes.back() = out;
  const Tensor nothing = at::empty({0}, x.options());
  const bool plain = activation == "none";
  const bool keep = keep_pre && !plain && activation != "relu";
  if (use_onednn(Pass::forward, x, rows, in, out)) {
    const Tensor first = onednn_product(as_rows(x), weight.contiguous(), bias, keep ? "none" : activation);
    const Tensor y = keep ? activate(first, activation) : first;
    return {y.view(sizes), keep ? first.view(sizes) : nothing};
  }
  Tensor pre = at::linear(x, weight, bias).contiguous();
  if (keep) return {activate(pre, activation), pre};
  activate_(pre, activation);
  return {pre, nothing};
}

// g W
Tensor input_gradient(const Tensor& grad, const Tensor& weight) {
  if (use_onednn(Pass::grad_input, grad, grad.size(0), weight.size(1), weight.size(0))) {
    return onednn_product(grad, weight.contiguous().t(), std::nullopt, "none");
  }
  return at::mm(grad, weight);
}

// gᵀ x
Tensor weight_gradient(const Tensor& grad, const Tensor& x) {
  const int64_t rows = grad.size(0), in = x.size(1), out = grad.size(1);
  if (!use_onednn(Pass::grad_weight, grad, rows, in, out)) return at::mm(grad.t(), x);
  // Only the weight's sizes are read.
  const Tensor weight = at::empty({1}, x.options()).expand({out, in, 1, 1});
  const auto gradients =
      at::convolution_backward(as_image(grad), as_image(x), weight, at::OptionalIntArrayRef(), {1, 1}, {0, 0},
          {kStatedDilation, kStatedDilation}, false, {0, 0}, 1, {false, true, false});
  return std::get<1>(gradients).view({out, in});
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& grad_output, const Tensor& x,
    const Tensor& weight, const Tensor& saved, std::string_view activation, std::array<bool, 3> mask) {
  const PlainDispatch guard;
  check_operands(x, weight, activation);
  const int64_t in = weight.size(1), out = weight.size(0);
  kCheck.rows_like("grad", grad_output, x, out);
  kCheck.dtype("grad", grad_output, x.scalar_type());
  if (activation != "none") kCheck.same("saved", saved, grad_output.sizes(), x.scalar_type());
  auto sizes = grad_output.sizes().vec();
  sizes.back() = in;
  Tensor dx = at::empty({0}, grad_output.options()), dw = at::empty_like(dx), db = at::empty_like(dx);
  if (grad_output.numel() == 0) {
    if (mask[0]) dx = at::zeros(sizes, grad_output.options());
    if (mask[1]) dw = at::zeros({out, in}, grad_output.options());
    if (mask[2]) db = at::zeros({out}, grad_output.options());
    return {dx, dw, db};
  }
  const Tensor grad = as_rows(through_activation(grad_output, saved, activation));
  if (mask[0]) dx = input_gradient(grad, weight).view(sizes);
  if (mask[1]) dw = weight_gradient(grad, as_rows(x)).contiguous();
  if (mask[2]) db = at::sum(grad, 0);
  return {dx, dw, db};
}

} // namespace

TORCH_LIBRARY_IMPL(rskernels, CPU, m) {
  m.impl("linear_forward", &linear_forward);
  m.impl("linear_backward", &linear_backward);
}

} // namespace rskernels
