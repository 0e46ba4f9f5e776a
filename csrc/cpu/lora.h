// What the forward and backward passes of LoRA on the CPU share.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>

#include <cstdint>
#include <vector>

#include "work.h"

namespace rskernels {

constexpr int64_t kRowGroup = 16;   // rows that are worked on while they are in the cache
constexpr int64_t kRankPadding = 4; // ranks of a factor, in memory
constexpr int64_t kPadding = 64;    // columns likewise: whole strips at every instruction set

// One instruction set's products (lora_simd.h). Io: tensors; Tile: factors of `project`.
template <typename Io, typename Tile>
struct LoraKernels {
  void (*project)(const Io* x, int64_t x_stride, int64_t count, int64_t n, const Tile* factors,
      int64_t factor_stride, int64_t ranks, float scale, float* out, int64_t out_stride);
  void (*update)(const Io* from, int64_t from_stride, Io* to, int64_t to_stride, int64_t count, int64_t n,
      const float* coefficients, int64_t coefficient_stride, const float* factors, int64_t factor_stride,
      int64_t ranks);
  void (*gather)(const Io* x, int64_t x_stride, int64_t count, int64_t n, const float* coefficients,
      int64_t coefficient_stride, int64_t ranks, float* sums, int64_t sum_stride);
};

template <typename Io, typename Tile>
const LoraKernels<Io, Tile>& lora_kernels();

// One low-rank update: of `size` output columns from `column` on.
struct LoraPart {
  int64_t column, size, rank;
  int64_t first;        // of its columns in xa
  int64_t first_padded; // of its columns in a group's products, where ranks are padded
  int64_t padded() const { return round_up(rank, kRankPadding); }
};

// The shape of a call, from the tensors.
struct LoraLayout {
  int64_t rows, in, out, ranks = 0, padded = 0, columns = 0;
  std::vector<LoraPart> parts;

  LoraLayout(const at::Tensor& x, const at::Tensor& weight, at::TensorList b, at::IntArrayRef first_columns);

  // In fp32 and with enough rows it is cheaper to add scale·BA to the weight than its product to the output:
  // both are read and written once. In bf16 a merged weight would round the update away.
  bool merges(at::ScalarType dtype) const { return dtype == at::kFloat && rows * columns > 2 * out * in; }

  // Row groups that one thread should take at least: a parallel region costs some microseconds.
  int64_t grain() const;
};

// A (rows, n) view of a tensor whose rows are dense; a copy where there is none.
struct Rows {
  at::Tensor tensor;
  int64_t stride;

  explicit Rows(const at::Tensor& t);
  template <typename Io>
  Io* data() const {
    return static_cast<Io*>(tensor.data_ptr());
  }
};

// A matrix of few rows, padded with zeros as lora_simd.h wants it.
template <typename T>
struct Factors {
  int64_t stride;
  std::vector<T> values;

  Factors(int64_t ranks, int64_t n) : stride(round_up(n, kPadding)), values(ranks * stride) {}
  T* row(int64_t rank) { return values.data() + rank * stride; }
  const T* row(int64_t rank) const { return values.data() + rank * stride; }
};

// The A matrices below each other, times scale.
template <typename T, typename Io>
Factors<T> stack_a(const LoraLayout& layout, at::TensorList a, float scale) {
  Factors<T> factors(layout.padded, layout.in);
  for (size_t p = 0; p < layout.parts.size(); ++p) {
    const at::Tensor dense = a[p].contiguous();
    const Io* from = dense.const_data_ptr<Io>();
    for (int64_t r = 0; r < layout.parts[p].rank; ++r) {
      T* to = factors.row(layout.parts[p].first_padded + r);
      for (int64_t c = 0; c < layout.in; ++c) {
        to[c] = static_cast<T>(scale * static_cast<float>(from[r * layout.in + c]));
      }
    }
  }
  return factors;
}

// A part's Bᵀ, times scale.
template <typename T, typename Io>
Factors<T> transpose_b(const LoraPart& part, const at::Tensor& b, float scale) {
  Factors<T> factors(part.padded(), part.size);
  const at::Tensor dense = b.contiguous();
  const Io* from = dense.const_data_ptr<Io>();
  for (int64_t c = 0; c < part.size; ++c) {
    for (int64_t r = 0; r < part.rank; ++r) {
      factors.row(r)[c] = static_cast<T>(scale * static_cast<float>(from[c * part.rank + r]));
    }
  }
  return factors;
}

// W + scale·BA: in fp32.
at::Tensor merged_weight(const LoraLayout& layout, const at::Tensor& weight, at::TensorList a,
    at::TensorList b, float scale);

// Calls serve(Io, Tile) with values of the types that serve this dtype on this processor.
template <typename Serve>
void with_lora_types(at::ScalarType dtype, const Serve& serve) {
  if (dtype == at::kFloat) return serve(float(), float());
  TORCH_CHECK_TYPE(dtype == at::kBFloat16, "lora: expected float32 or bfloat16, got ", dtype);
  if (isa_level() == Isa::avx512_bf16) return serve(at::BFloat16(), at::BFloat16());
  serve(at::BFloat16(), float());
}

} // namespace rskernels
