// What a registered operator checks before it trusts its arguments: exported graphs, too, call it, with the sizes
// that come at run time. A few comparisons each; errors name the operator and the argument.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <type_traits>

namespace rskernels {

struct Check {
  const char* op;

  void rank(const char* name, const at::Tensor& t, int64_t dims) const {
    TORCH_CHECK_VALUE(
        t.dim() == dims, op, ": ", name, " has shape ", t.sizes(), "; expected ", dims, " dimensions");
  }
  void shape(const char* name, const at::Tensor& t, at::IntArrayRef expected) const {
    TORCH_CHECK_VALUE(t.sizes() == expected, op, ": ", name, " has shape ", t.sizes(), "; expected ", expected);
  }
  // (..., last)
  void rows(const char* name, const at::Tensor& t, int64_t last) const {
    TORCH_CHECK_VALUE(t.dim() > 0 && t.size(-1) == last, op, ": ", name, " has shape ", t.sizes(),
        "; expected (..., ", last, ")");
  }
  // The leading dimensions of `like`, then `last`.
  void rows_like(const char* name, const at::Tensor& t, const at::Tensor& like, int64_t last) const {
    rows(name, t, last);
    TORCH_CHECK_VALUE(
        t.dim() == like.dim() && t.sizes().slice(0, t.dim() - 1) == like.sizes().slice(0, t.dim() - 1), op,
        ": ", name, " has shape ", t.sizes(), "; expected the rows of ", like.sizes());
  }
  void dtype(const char* name, const at::Tensor& t, at::ScalarType expected) const {
    TORCH_CHECK_TYPE(
        t.scalar_type() == expected, op, ": ", name, " is ", t.scalar_type(), "; expected ", expected);
  }
  void floating(const char* name, const at::Tensor& t) const {
    TORCH_CHECK_TYPE(at::isFloatingType(t.scalar_type()), op, ": ", name, " is ", t.scalar_type(),
        "; expected a floating-point tensor");
  }
  void served(const char* name, at::ScalarType dtype) const {
    TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16, op, ": ", name, " is ", dtype,
        "; expected float32 or bfloat16");
  }
  void served(const char* name, const at::Tensor& t) const { served(name, t.scalar_type()); }
  void same(
      const char* name, const at::Tensor& t, at::IntArrayRef expected, at::ScalarType expected_dtype) const {
    shape(name, t, expected);
    dtype(name, t, expected_dtype);
  }
};

// The data of a tensor of exactly this dtype; T is const where it is only read.
template <typename T>
T* data_of(const at::Tensor& t) {
  if constexpr (std::is_const_v<T>) {
    return t.const_data_ptr<std::remove_const_t<T>>();
  } else {
    return t.mutable_data_ptr<T>();
  }
}

} // namespace rskernels
