// Which library's product serves a linear layer, as stored data (rskernels/tuning.py writes it).
//
// Nothing is timed here: the same table gives the same products, and so the same bits, in every run.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>

namespace rskernels {

enum class Product : uint8_t { aten = 0, onednn = 1 };
enum class Pass : int { forward = 0, grad_input = 1, grad_weight = 2 };

// A shape class: how much work (multiply-adds), times whether there are few rows or a thin side.
inline constexpr int kWorkClasses = 3, kForms = 3;
inline constexpr int64_t kSmallWork = int64_t(1) << 22;
inline constexpr int64_t kMediumWork = int64_t(1) << 27;
inline constexpr int64_t kThin = 32;

inline int shape_class(int64_t rows, int64_t in, int64_t out) {
  const int64_t work = rows * in * out;
  const int size = work < kSmallWork ? 0 : work < kMediumWork ? 1 : 2;
  const int form = rows < kThin ? 1 : in < kThin || out < kThin ? 2 : 0;
  return form * kWorkClasses + size;
}

inline constexpr int kShapeClasses = kForms * kWorkClasses;
inline constexpr int kTableSize = 2 * 3 * kShapeClasses; // (fp32, bf16) x pass x shape class

inline std::array<std::atomic<Product>, kTableSize>& product_table() {
  static std::array<std::atomic<Product>, kTableSize> table{};
  return table;
}

inline int table_index(bool bf16, Pass pass, int shape) {
  return ((bf16 ? 1 : 0) * 3 + static_cast<int>(pass)) * kShapeClasses + shape;
}

} // namespace rskernels
