// What the forward and backward passes of LoRA on the CPU share.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>

#include <cstdint>
#include <vector>

#include "check.h"
#include "work.h"

namespace rskernels {

constexpr int64_t kRowGroup = 32;   // rows that are worked on while they are in the cache
constexpr int64_t kRankPadding = 4; // ranks of a factor, in memory
constexpr int64_t kPadding = 64;    // columns likewise: whole strips at every instruction set

// One instruction set's products (lora_simd.h). Io: tensors; Operand: factors.
template <typename Io, typename Operand>
struct LoraKernels {
  void (*project)(const Io* x, int64_t x_stride, int64_t count, int64_t n, const Operand* factors,
      int64_t factor_stride, int64_t ranks, float scale, float* out, int64_t out_stride);
  void (*write_row)(const float* from, float factor, Operand* to, int64_t n);
  void (*update)(const Io* from, int64_t from_stride, Io* to, int64_t to_stride, int64_t count, int64_t n,
      const Operand* coefficients, int64_t coefficient_stride, const Operand* factors, int64_t factor_stride,
      int64_t ranks);
  void (*gather)(const Io* x, int64_t x_stride, int64_t count, int64_t n, const float* coefficients,
      int64_t coefficient_stride, int64_t ranks, float* sums, int64_t sum_stride);
};

template <typename Io, typename Operand>
const LoraKernels<Io, Operand>& lora_kernels();

// One low-rank update: of `size` output columns from `column` on.
struct LoraPart {
  int64_t column, size, rank;
  int64_t first;        // of its columns in xa
  int64_t first_padded; // of its columns in a group's products, where ranks are padded
  int64_t padded() const { return round_up(rank, kRankPadding); }
};

// The shape of a call, checked: what follows trusts it.
struct LoraLayout {
  int64_t rows, in, out, ranks = 0, padded = 0, columns = 0;
  std::vector<LoraPart> parts;

  LoraLayout(const at::Tensor& x, const at::Tensor& weight, at::TensorList a, at::TensorList b,
      at::IntArrayRef first_columns);

  // Row groups that one thread should take at least: a parallel region costs some microseconds.
  int64_t grain() const;
};

// A tensor as (rows, n) with dense rows; a copy where no view does.
struct Rows {
  at::Tensor tensor;
  int64_t stride;

  Rows(const at::Tensor& t, int64_t rows);
  template <typename Io>
  const Io* data() const {
    return tensor.const_data_ptr<Io>();
  }
};

// A matrix of few ranks, padded with zeros as lora_simd.h wants it: rows of `stride` values. Paired (bf16
// only): ranks 2i and 2i + 1 side by side, column by column, in the memory of two rows.
template <typename T>
class Factors {
 public:
  enum Order { rows, paired };

  Factors(int64_t ranks, int64_t n, Order order)
      : stride(round_up(n, kPadding)),
        paired_(order == paired && !std::is_same_v<T, float>),
        values_(ranks * stride) {}

  // Row `rank` of a paired matrix is that of its pair: ask for even ones.
  const T* row(int64_t rank) const { return values_.data() + rank * stride; }

  // Ranks first .. first + ranks are from[r * rank_step + c * column_step].
  template <typename Io>
  void fill(int64_t first, int64_t ranks, const Io* from, int64_t rank_step, int64_t n, int64_t column_step) {
    const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, n));
    at::parallel_for(0, ranks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t rank = first + r;
        T* to = values_.data() + (paired_ ? rank / 2 * 2 * stride + rank % 2 : rank * stride);
        const int64_t step = paired_ ? 2 : 1;
        for (int64_t c = 0; c < n; ++c) to[c * step] = static_cast<T>(from[r * rank_step + c * column_step]);
      }
    });
  }

  const int64_t stride;

 private:
  const bool paired_;
  std::vector<T> values_;
};

// The A matrices below each other.
template <typename T, typename Io>
Factors<T> stack_a(const LoraLayout& layout, at::TensorList a, typename Factors<T>::Order order) {
  Factors<T> factors(layout.padded, layout.in, order);
  for (size_t p = 0; p < layout.parts.size(); ++p) {
    const LoraPart& part = layout.parts[p];
    factors.fill(
        part.first_padded, part.rank, a[p].const_data_ptr<Io>(), a[p].stride(0), layout.in, a[p].stride(1));
  }
  return factors;
}

// A part's Bᵀ.
template <typename T, typename Io>
Factors<T> transpose_b(const LoraPart& part, const at::Tensor& b, typename Factors<T>::Order order) {
  Factors<T> factors(part.padded(), part.size, order);
  factors.fill(0, part.rank, b.const_data_ptr<Io>(), b.stride(1), part.size, b.stride(0));
  return factors;
}

} // namespace rskernels
