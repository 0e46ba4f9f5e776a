// LoRA on the CPU: the forward pass. Meaning and formulas: rskernels/ops/lora.py.
//
// The large product is rskernels::linear_forward, so it is whatever serves `linear`. Around it, either
//   y += scale (x Aᵀ) Bᵀ       one pass over x and over the columns of y that get an update, or
//   y = x (W + scale B A)ᵀ     in fp32 with many rows, where the weight is smaller than those columns.
// With B = 0 both leave linear's result as it is, to the last bit.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "lora.h"

#define RSK_SIMD_FILE "lora_simd.h"
#include "foreach_isa.h"

namespace rskernels {

template <typename Io, typename Operand>
const LoraKernels<Io, Operand>& lora_kernels() {
  return RSK_AT_ISA_LEVEL(kLoraKernels<Io, Operand>);
}
template const LoraKernels<float, float>& lora_kernels();
template const LoraKernels<at::BFloat16, float>& lora_kernels();
template const LoraKernels<at::BFloat16, at::BFloat16>& lora_kernels();

LoraLayout::LoraLayout(const at::Tensor& x, const at::Tensor& weight, at::TensorList a, at::TensorList b,
    at::IntArrayRef first_columns) {
  const Check check{"lora"};
  check.served("x", x);
  check.rank("weight", weight, 2);
  check.dtype("weight", weight, x.scalar_type());
  out = weight.size(0);
  in = weight.size(1);
  check.rows("x", x, in);
  rows = in > 0 ? x.numel() / in : 0;
  TORCH_CHECK_VALUE(a.size() == b.size() && b.size() == first_columns.size(), check.op, ": ", a.size(),
      " of a, ", b.size(), " of b, ", first_columns.size(), " columns; expected one of each per update");
  int64_t free_column = 0;
  for (size_t p = 0; p < b.size(); ++p) {
    check.rank("b", b[p], 2);
    check.dtype("b", b[p], x.scalar_type());
    const LoraPart part{first_columns[p], b[p].size(0), b[p].size(1), ranks, padded};
    TORCH_CHECK_VALUE(
        part.rank > 0, check.op, ": b has shape ", b[p].sizes(), "; expected a rank of at least 1");
    check.same("a", a[p], {part.rank, in}, x.scalar_type());
    TORCH_CHECK_VALUE(part.column >= free_column && part.column <= out - part.size, check.op, ": columns ",
        first_columns, " with b of shape ", b[p].sizes(), "; expected updates in order, inside the ", out,
        " outputs");
    free_column = part.column + part.size;
    ranks += part.rank;
    padded += part.padded();
    columns += part.size;
    parts.push_back(part);
  }
}

int64_t LoraLayout::grain() const {
  constexpr int64_t kEnoughWork = int64_t(1) << 19; // multiply-adds
  return std::max<int64_t>(1, kEnoughWork / std::max<int64_t>(1, kRowGroup * padded * (in + columns)));
}

Rows::Rows(const at::Tensor& t, int64_t rows) : tensor(t.reshape({rows, t.size(-1)})) {
  if (tensor.size(1) > 1 && tensor.stride(1) != 1) tensor = tensor.contiguous();
  stride = tensor.stride(0);
}

namespace {

using at::Tensor;
using LinearForward = std::tuple<Tensor, Tensor>(
    const Tensor&, const Tensor&, const std::optional<Tensor>&, std::string_view, bool);

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  static const auto handle =
      c10::Dispatcher::singleton().findSchemaOrThrow("rskernels::linear_forward", "").typed<LinearForward>();
  return std::get<0>(handle.call(x, weight, bias, "none", false));
}

// In fp32 and with enough rows it is cheaper to add scale BA to the weight than its product to the output: both
// are read and written once. In bf16 a merged weight would round the update away.
bool merges(const LoraLayout& layout, const Tensor& x) {
  return x.scalar_type() == at::kFloat && layout.rows * layout.columns > 2 * layout.out * layout.in;
}

// W + scale B A
Tensor merged_weight(
    const LoraLayout& layout, const Tensor& weight_, at::TensorList a, at::TensorList b, float scale) {
  const Tensor weight = weight_.contiguous();
  Tensor merged = at::empty_like(weight);
  const auto& simd = lora_kernels<float, float>();
  const auto factors = stack_a<float, float>(layout, a, Factors<float>::rows);
  const float* from = weight.const_data_ptr<float>();
  float* to = merged.data_ptr<float>();
  const int64_t in = layout.in;
  const auto copy = [&](int64_t begin, int64_t end) {
    at::parallel_for(begin, end, kRowGroup,
        [&](int64_t first, int64_t last) { std::copy(from + first * in, from + last * in, to + first * in); });
  };
  int64_t done = 0;
  for (size_t p = 0; p < layout.parts.size(); ++p) {
    const LoraPart& part = layout.parts[p];
    copy(done, part.column);
    done = part.column + part.size;
    const Tensor dense = b[p].contiguous();
    at::parallel_for(0, part.size, kRowGroup, [&](int64_t first, int64_t last) {
      const int64_t offset = (part.column + first) * in, values = (last - first) * part.rank;
      std::vector<float> coefficients(values);
      simd.write_row(dense.const_data_ptr<float>() + first * part.rank, scale, coefficients.data(), values);
      simd.update(from + offset, in, to + offset, in, last - first, in, coefficients.data(), part.rank,
          factors.row(part.first_padded), factors.stride, part.rank);
    });
  }
  copy(done, layout.out);
  return merged;
}

// x Aᵀ into xa, unless that is undefined, and its product with Bᵀ onto y, unless that is undefined.
template <typename Io, typename Operand>
void project_and_update(const LoraLayout& layout, const Tensor& x_, at::TensorList a, at::TensorList b,
    float scale, const Tensor& xa, const Tensor& y) {
  const auto& simd = lora_kernels<Io, Operand>();
  const Rows x(x_, layout.rows);
  const auto stacked = stack_a<Operand, Io>(layout, a, Factors<Operand>::rows);
  std::vector<Factors<Operand>> factors;
  for (size_t p = 0; y.defined() && p < b.size(); ++p) {
    factors.push_back(transpose_b<Operand, Io>(layout.parts[p], b[p], Factors<Operand>::paired));
  }
  const Io* from = x.data<Io>();
  Io* to = y.defined() ? y.data_ptr<Io>() : nullptr;
  float* kept = xa.defined() ? xa.data_ptr<float>() : nullptr;
  const int64_t groups = (layout.rows + kRowGroup - 1) / kRowGroup;
  at::parallel_for(0, groups, layout.grain(), [&](int64_t begin, int64_t end) {
    const int64_t values = kRowGroup * layout.padded;
    std::vector<float> products(values);
    std::vector<Operand> coefficients(values);
    for (int64_t group = begin; group < end; ++group) {
      const int64_t row = group * kRowGroup, count = std::min(kRowGroup, layout.rows - row);
      simd.project(from + row * x.stride, x.stride, count, layout.in, stacked.row(0), stacked.stride,
          layout.padded, 1.0f, products.data(), layout.padded);
      simd.write_row(products.data(), scale, coefficients.data(), values);
      for (size_t p = 0; p < layout.parts.size(); ++p) {
        const LoraPart& part = layout.parts[p];
        for (int64_t i = 0; kept != nullptr && i < count; ++i) {
          std::copy_n(products.data() + i * layout.padded + part.first_padded, part.rank,
              kept + (row + i) * layout.ranks + part.first);
        }
        if (to == nullptr) continue;
        Io* columns = to + row * layout.out + part.column;
        simd.update(columns, layout.out, columns, layout.out, count, part.size,
            coefficients.data() + part.first_padded, layout.padded, factors[p].row(0), factors[p].stride,
            part.rank);
      }
    }
  });
}

std::tuple<Tensor, Tensor> lora_forward(const Tensor& x, const Tensor& weight,
    const std::optional<Tensor>& bias, at::TensorList a, at::TensorList b, at::IntArrayRef first_columns,
    double scale_, bool keep_xa) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const LoraLayout layout(x, weight, a, b, first_columns); // bias: linear_forward checks it
  const float scale = static_cast<float>(scale_);
  auto sizes = x.sizes().vec();
  sizes.back() = layout.ranks;
  const auto fp32 = x.options().dtype(at::kFloat);
  Tensor xa = at::empty({0}, fp32);
  if (keep_xa) xa = layout.rows > 0 ? at::empty(sizes, fp32) : at::zeros(sizes, fp32);
  const bool merge = merges(layout, x);
  const Tensor y = linear(x, merge ? merged_weight(layout, weight, a, b, scale) : weight, bias);
  if (layout.rows > 0 && (keep_xa || !merge)) {
    with_operand_types(x.scalar_type(), [&](auto io, auto operand) {
      project_and_update<decltype(io), decltype(operand)>(
          layout, x, a, b, scale, keep_xa ? xa : Tensor(), merge ? Tensor() : y);
    });
  }
  return {y, xa};
}

} // namespace

TORCH_LIBRARY_IMPL(rskernels, CPU, m) {
  m.impl("lora_forward", &lora_forward);
}

} // namespace rskernels
