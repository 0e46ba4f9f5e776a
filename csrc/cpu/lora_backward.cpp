// LoRA on the CPU: the backward pass. Meaning and formulas: rskernels/ops/lora.py.
//
// The large product, dy W, is rskernels::linear_backward. Around it one pass over the rows, a group at a time:
//   g = scale dy B,  dBᵀ += (x Aᵀ)ᵀ dy       dy is read once,
//   dA += gᵀ x,      dx += g A               x is read once, dx read and written.
// A merged weight would spare dx += g A, but cost as much as that (measured).
//
// Determinism: rows are cut into slices by the shape alone; sums run in order within a slice, and slices are
// added in order.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>
#include <string_view>
#include <tuple>

#include "lora.h"

namespace rskernels {
namespace {

using at::Tensor;
using LinearBackward = std::tuple<Tensor, Tensor, Tensor>(
    const Tensor&, const Tensor&, const Tensor&, const Tensor&, std::string_view, std::array<bool, 3>);

// dy W
Tensor input_gradient(const Tensor& grad, const Tensor& x, const Tensor& weight) {
  static const auto handle =
      c10::Dispatcher::singleton().findSchemaOrThrow("rskernels::linear_backward", "").typed<LinearBackward>();
  const Tensor nothing = at::empty({0}, grad.options());
  return std::get<0>(handle.call(grad, x, weight, nothing, "none", {true, false, false}));
}

struct Wanted {
  bool x, a, b;
};

// Partial sums: one row of memory per slice, holding dA (padded ranks x in) and each part's dBᵀ.
struct Sums {
  // Slices take memory and time to add up, but every thread should have some, even where there are few rows.
  static int64_t slices_of(int64_t rows) {
    return std::clamp<int64_t>(std::max(std::min<int64_t>(rows / 64, 8), rows / 256), 1, 32);
  }

  int64_t groups, slices, a_stride, size = 0;
  std::vector<int64_t> b_offset, b_stride;
  Tensor memory;

  Sums(const LoraLayout& layout, const Wanted& wanted)
      : groups((layout.rows + kRowGroup - 1) / kRowGroup),
        slices(slices_of(layout.rows)),
        a_stride(round_up(layout.in, kPadding)) {
    if (wanted.a) size = layout.padded * a_stride;
    for (const LoraPart& part : layout.parts) {
      b_stride.push_back(round_up(part.size, kPadding));
      b_offset.push_back(size);
      if (wanted.b) size += part.padded() * b_stride.back();
    }
    memory = at::empty({slices, size}, at::kFloat);
  }
  float* slice(int64_t index) const { return memory.data_ptr<float>() + index * size; }
  int64_t first_group(int64_t slice) const { return groups * slice / slices; }
};

template <typename Io, typename Operand>
class LoraBackward {
 public:
  LoraBackward(const LoraLayout& layout, const Wanted& wanted, const Sums& sums, const Tensor& grad,
      const Tensor& x, const Tensor& xa, const Tensor& dx, at::TensorList a, at::TensorList b, float scale)
      : layout_(layout),
        wanted_(wanted),
        sums_(sums),
        grad_(grad, layout.rows),
        x_(x, layout.rows),
        xa_(xa.contiguous()),
        dx_(dx.defined() ? dx.data_ptr<Io>() : nullptr),
        scale_(scale),
        simd_(lora_kernels<Io, Operand>()),
        a_(dx.defined() ? stack_a<Operand, Io>(layout, a, Factors<Operand>::paired)
                        : Factors<Operand>(0, 0, Factors<Operand>::paired)) {
    for (size_t p = 0; needs_g() && p < b.size(); ++p) {
      b_.push_back(transpose_b<Operand, Io>(layout.parts[p], b[p], Factors<Operand>::rows));
    }
  }

  void run_slice(int64_t slice) const {
    const int64_t values = kRowGroup * layout_.padded;
    Buffers buffers{std::vector<float>(values + kVector), std::vector<float>(values + kVector),
        std::vector<Operand>(values)};
    float* sums = sums_.slice(slice);
    std::fill_n(sums, sums_.size, 0.0f);
    for (int64_t group = sums_.first_group(slice); group < sums_.first_group(slice + 1); ++group) {
      run_group(group * kRowGroup, sums, buffers);
    }
  }

 private:
  // Of a row group: g, x Aᵀ, and g as the coefficients of dx.
  struct Buffers {
    std::vector<float> g, xa;
    std::vector<Operand> coefficients;
  };

  bool needs_g() const { return wanted_.a || dx_ != nullptr; }

  void run_group(int64_t row, float* sums, Buffers& buffers) const {
    float *g = buffers.g.data(), *xa = buffers.xa.data();
    const int64_t count = std::min(kRowGroup, layout_.rows - row), padded = layout_.padded;
    for (size_t p = 0; p < layout_.parts.size(); ++p) {
      const LoraPart& part = layout_.parts[p];
      const Io* grad = grad_.data<Io>() + row * grad_.stride + part.column;
      if (needs_g()) {
        simd_.project(grad, grad_.stride, count, part.size, b_[p].row(0), b_[p].stride, part.padded(), scale_,
            g + part.first_padded, padded);
      }
      if (!wanted_.b) continue;
      const float* from = xa_.const_data_ptr<float>() + row * layout_.ranks + part.first;
      for (int64_t i = 0; i < count; ++i) {
        std::copy_n(from + i * layout_.ranks, part.rank, xa + i * padded + part.first_padded);
      }
      simd_.gather(grad, grad_.stride, count, part.size, xa + part.first_padded, padded, part.padded(),
          sums + sums_.b_offset[p], sums_.b_stride[p]);
    }
    if (wanted_.a) {
      simd_.gather(x_.data<Io>() + row * x_.stride, x_.stride, count, layout_.in, g, padded, padded, sums,
          sums_.a_stride);
    }
    if (dx_ == nullptr) return;
    simd_.write_row(g, 1.0f, buffers.coefficients.data(), count * padded);
    Io* dx = dx_ + row * layout_.in;
    simd_.update(dx, layout_.in, dx, layout_.in, count, layout_.in, buffers.coefficients.data(), padded,
        a_.row(0), a_.stride, padded);
  }

  const LoraLayout& layout_;
  const Wanted wanted_;
  const Sums& sums_;
  const Rows grad_, x_;
  const Tensor xa_;
  Io* dx_;
  const float scale_;
  const LoraKernels<Io, Operand>& simd_;
  const Factors<Operand> a_;
  std::vector<Factors<Operand>> b_;
};

// The total of all slices at `offset`, times scale, to every `step`-th value of `to`.
template <typename Io>
void write_total(const Sums& sums, int64_t offset, int64_t n, float scale, Io* to, int64_t step) {
  std::vector<float> total(n);
  add_slices(sums.slice(0) + offset, sums.slices, sums.size, n, total.data());
  for (int64_t c = 0; c < n; ++c) to[c * step] = static_cast<Io>(scale * total[c]);
}

template <typename Io>
void write_gradients(const LoraLayout& layout, const Wanted& wanted, const Sums& sums, float scale,
    const std::vector<Tensor>& da, const std::vector<Tensor>& db) {
  for (size_t p = 0; p < layout.parts.size(); ++p) {
    const LoraPart& part = layout.parts[p];
    const int64_t grain = std::max<int64_t>(1, 32768 / (sums.slices * (layout.in + part.size)));
    at::parallel_for(0, part.rank, grain, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        if (wanted.a) {
          write_total(sums, (part.first_padded + r) * sums.a_stride, layout.in, 1.0f,
              da[p].data_ptr<Io>() + r * layout.in, 1);
        }
        if (wanted.b) {
          write_total(sums, sums.b_offset[p] + r * sums.b_stride[p], part.size, scale, db[p].data_ptr<Io>() + r,
              part.rank);
        }
      }
    });
  }
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> lora_backward(const Tensor& grad, const Tensor& x,
    const Tensor& weight, at::TensorList a, at::TensorList b, const Tensor& xa, at::IntArrayRef first_columns,
    double scale_, std::array<bool, 3> mask) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const LoraLayout layout(x, weight, a, b, first_columns);
  const Check check{"lora"};
  check.rows_like("grad", grad, x, layout.out);
  check.dtype("grad", grad, x.scalar_type());
  if (mask[2]) {
    check.rows_like("xa", xa, x, layout.ranks);
    check.dtype("xa", xa, at::kFloat);
  }
  const Wanted wanted{mask[0], mask[1], mask[2]};
  const float scale = static_cast<float>(scale_);
  const auto like = [&](const Tensor& t, bool want) {
    if (!want) return at::empty({0}, grad.options());
    return layout.rows > 0 ? at::empty(t.sizes(), grad.options()) : at::zeros(t.sizes(), grad.options());
  };
  Tensor dx = like(x, wanted.x && layout.rows == 0);
  std::vector<Tensor> da, db;
  for (const Tensor& t : a) da.push_back(like(t, wanted.a));
  for (const Tensor& t : b) db.push_back(like(t, wanted.b));
  if (layout.rows == 0) return {dx, da, db};
  if (wanted.x) dx = input_gradient(grad, x, weight);
  with_operand_types(grad.scalar_type(), [&](auto io, auto operand) {
    using Io = decltype(io);
    const Sums sums(layout, wanted);
    const LoraBackward<Io, decltype(operand)> pass(
        layout, wanted, sums, grad, x, xa, wanted.x ? dx : Tensor(), a, b, scale);
    at::parallel_for(0, sums.slices, 1, [&](int64_t begin, int64_t end) {
      for (int64_t slice = begin; slice < end; ++slice) pass.run_slice(slice);
    });
    write_gradients<Io>(layout, wanted, sums, scale, da, db);
  });
  return {dx, da, db};
}

} // namespace

TORCH_LIBRARY_IMPL(rskernels, CPU, m) {
  m.impl("lora_backward", &lora_backward);
}

} // namespace rskernels
