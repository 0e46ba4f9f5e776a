// layer_norm on the CPU, forward and backward. Meaning: rskernels/ops/layer_norm.py.
//
// Every value is read from memory once per pass over a row (the row stays in the first-level cache between the
// looks at it) and written once, in the dtype its reader wants: no copies in fp32, whatever the dtypes.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "check.h"
#include "work.h"

namespace rskernels {
namespace {

template <typename X, typename Y>
struct NormKernels {
  void (*forward)(const X* x, const float* weight, const float* bias, Y* y, float* means, float* rstds,
      int64_t rows, int64_t dim, float eps);
  void (*backward)(const Y* grad, const X* x, const float* weight, const float* means, const float* rstds,
      X* dx, float* dweight, float* dbias, int64_t rows, int64_t dim);
};

} // namespace
} // namespace rskernels

#define RSK_SIMD_FILE "layer_norm_simd.h"
#include "foreach_isa.h"

namespace rskernels {
namespace {

using at::Tensor;

// Sums over rows: a partial sum per slice, slices added in order. Their number depends on the rows alone, so
// the bits do not depend on the threads.
constexpr int64_t kSlices = 32, kRowsOfSlice = 16;
constexpr int64_t kGrain = 1 << 14; // values below which a thread is not worth waking

// Calls work(X{}, Y{}) with the two element types.
template <typename Work>
void for_types(at::ScalarType x, at::ScalarType y, const Work& work) {
  const bool bf16_x = x == at::kBFloat16, bf16_y = y == at::kBFloat16;
  if (bf16_x && bf16_y) return work(at::BFloat16(), at::BFloat16());
  if (bf16_x) return work(at::BFloat16(), float());
  if (bf16_y) return work(float(), at::BFloat16());
  work(float(), float());
}

// The number of channels, of arguments that fit.
int64_t checked_dim(const Check& check, const Tensor& x, const Tensor& weight) {
  check.served("x", x);
  check.floating("weight", weight);
  check.rank("weight", weight, 1);
  TORCH_CHECK_VALUE(weight.size(0) > 0, check.op, ": weight has shape ", weight.sizes(), "; expected (D,)");
  check.rows("x", x, weight.size(0));
  return weight.size(0);
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_forward(
    const Tensor& x_, const Tensor& weight_, const Tensor& bias_, double eps, at::ScalarType dtype) {
  const Check check{"layer_norm"};
  const int64_t dim = checked_dim(check, x_, weight_);
  check.shape("bias", bias_, {dim});
  check.floating("bias", bias_);
  TORCH_CHECK_VALUE(eps >= 0, check.op, ": eps is ", eps, "; expected at least 0");
  check.served("dtype", dtype);
  const Tensor x = x_.contiguous();
  const Tensor weight = weight_.to(at::kFloat).contiguous(), bias = bias_.to(at::kFloat).contiguous();
  const int64_t rows = x.numel() / dim;
  const auto row_sizes = x.sizes().slice(0, x.dim() - 1);
  const Tensor y = at::empty(x.sizes(), x.options().dtype(dtype));
  const Tensor means = at::empty(row_sizes, x.options().dtype(at::kFloat)), rstds = at::empty_like(means);
  for_types(x.scalar_type(), dtype, [&](auto x_type, auto y_type) {
    using X = decltype(x_type);
    using Y = decltype(y_type);
    const auto forward = RSK_AT_ISA_LEVEL(kNormKernels<X, Y>).forward;
    at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / dim), [&](int64_t begin, int64_t end) {
      forward(x.const_data_ptr<X>() + begin * dim, weight.const_data_ptr<float>(), bias.const_data_ptr<float>(),
          y.mutable_data_ptr<Y>() + begin * dim, means.mutable_data_ptr<float>() + begin,
          rstds.mutable_data_ptr<float>() + begin, end - begin, dim, static_cast<float>(eps));
    });
  });
  return {y, means, rstds};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad_, const Tensor& x_,
    const Tensor& weight_, const Tensor& means_, const Tensor& rstds_, std::array<bool, 3> mask) {
  const Check check{"layer_norm"};
  const int64_t dim = checked_dim(check, x_, weight_);
  const auto row_sizes = x_.sizes().slice(0, x_.dim() - 1);
  check.shape("grad", grad_, x_.sizes());
  check.served("grad", grad_);
  check.same("mean", means_, row_sizes, at::kFloat);
  check.same("rstd", rstds_, row_sizes, at::kFloat);
  const Tensor grad = grad_.contiguous(), x = x_.contiguous(), weight = weight_.to(at::kFloat).contiguous();
  const Tensor means = means_.contiguous(), rstds = rstds_.contiguous();
  const int64_t rows = x.numel() / dim;
  const auto nothing = [&]() { return at::empty({0}, x.options()); }; // outputs must not share memory
  const Tensor dx = mask[0] ? at::empty(x.sizes(), x.options()) : nothing();
  const bool sums = mask[1] || mask[2];
  const int64_t slices = std::clamp<int64_t>(rows / kRowsOfSlice, 1, kSlices);
  const int64_t slice_rows = (rows + slices - 1) / slices;
  // (slices, 2, D): partial sums of the weight's and of the bias's gradient
  const Tensor partial = at::zeros({sums ? slices : 0, 2, dim}, x.options().dtype(at::kFloat));
  for_types(x.scalar_type(), grad.scalar_type(), [&](auto x_type, auto grad_type) {
    using X = decltype(x_type);
    using G = decltype(grad_type);
    const auto backward = RSK_AT_ISA_LEVEL(kNormKernels<X, G>).backward;
    const int64_t grain = std::max<int64_t>(1, kGrain / (slice_rows * dim + 1));
    at::parallel_for(0, slices, grain, [&](int64_t first, int64_t last) {
      for (int64_t slice = first; slice < last; ++slice) {
        const int64_t begin = slice * slice_rows, count = std::min(slice_rows, rows - begin);
        if (count <= 0) continue;
        float* total = sums ? partial.mutable_data_ptr<float>() + slice * 2 * dim : nullptr;
        backward(grad.const_data_ptr<G>() + begin * dim, x.const_data_ptr<X>() + begin * dim,
            weight.const_data_ptr<float>(), means.const_data_ptr<float>() + begin,
            rstds.const_data_ptr<float>() + begin, mask[0] ? dx.mutable_data_ptr<X>() + begin * dim : nullptr,
            total, sums ? total + dim : nullptr, count, dim);
      }
    });
  });
  if (!sums) return {dx, nothing(), nothing()};
  const Tensor total = at::empty({2, dim}, partial.options());
  const float* from = partial.const_data_ptr<float>();
  float* to = total.mutable_data_ptr<float>();
  at::parallel_for(0, 2 * dim, kGrain / kSlices,
      [&](int64_t begin, int64_t end) { add_slices(from + begin, slices, 2 * dim, end - begin, to + begin); });
  const auto gradient = [&](int64_t which) { return total.select(0, which).to(weight_.scalar_type()).clone(); };
  return {dx, mask[1] ? gradient(0) : nothing(), mask[2] ? gradient(1) : nothing()};
}

} // namespace

TORCH_LIBRARY_IMPL(rskernels, CPU, m) {
  m.impl("layer_norm_forward", &layer_norm_forward);
  m.impl("layer_norm_backward", &layer_norm_backward);
}

} // namespace rskernels
