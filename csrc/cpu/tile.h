// The product of two small matrices that every kernel here is made of.
//
//   tile_product(m, n, k, a, lda, b, ldb, c, ldc, accumulate):   c = a . b   or   c += a . b
//
// row-major, c and sums in fp32. a and b in fp32: b is (k, n). In bf16, where has_bf16_tiles(): k is even and b
// holds pairs of rows, (k / 2, n, 2), as the processor's dot product wants them. PyTorch's tile product (oneDNN code generated per
// distinct size: keep the set of sizes small) serves where it can, else a plain C++ product, which is also
// what sanitizers see: they cannot look into generated code.
//
// Nothing else in csrc may include CPUBlas.h.
#pragma once

#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>

#include <algorithm>

#include "isa.h"

namespace rskernels {

#if defined(__SANITIZE_ADDRESS__) || !defined(CPUBLAS_BRGEMM_F32F32F32)
inline constexpr bool kGeneratedTiles = false;
#else
inline constexpr bool kGeneratedTiles = true;
#endif

// Row by row of c, which stays in the first-level cache.
inline void plain_tile_product(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
    int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  for (int64_t i = 0; i < m; ++i) {
    float* row = c + i * ldc;
    if (!accumulate) std::fill_n(row, n, 0.0f);
    for (int64_t l = 0; l < k; ++l) {
      const float factor = a[i * lda + l];
      for (int64_t j = 0; j < n; ++j) row[j] += factor * b[l * ldb + j];
    }
  }
}

// Does this oneDNN make code for bf16? ONEDNN_MAX_CPU_ISA may hide what the processor has.
inline bool bf16_tile_works() {
  try {
    alignas(64) at::BFloat16 ones[2 * 16];
    alignas(64) float sums[16];
    std::fill_n(ones, 32, at::BFloat16(1.0f));
    at::native::cpublas::brgemm(1, 16, 2, 2, 16, 16, false, ones, ones, sums, true);
    return sums[0] == 2.0f;
  } catch (const std::exception&) {
    return false;
  }
}

// Are products of bf16 tiles to be had? Otherwise kernels convert bf16 to fp32 tiles.
inline bool has_bf16_tiles() {
  if (!kGeneratedTiles || isa_level() != Isa::avx512_bf16 || !at::globalContext().userEnabledMkldnn()) {
    return false;
  }
  static const bool works = bf16_tile_works();
  return works;
}

inline void tile_product(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
    int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  const bool generated =
      kGeneratedTiles && isa_level() != Isa::baseline && at::globalContext().userEnabledMkldnn();
  if (!generated) return plain_tile_product(m, n, k, a, lda, b, ldb, c, ldc, accumulate);
#if defined(CPUBLAS_BRGEMM_F32F32F32)
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, accumulate, a, b, c, false);
#endif
}

inline void tile_product(int64_t m, int64_t n, int64_t k, const at::BFloat16* a, int64_t lda,
    const at::BFloat16* b, int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, accumulate, a, b, c, true);
}

// At the end of each thread's work.
inline void tile_release() {
  if (kGeneratedTiles) at::native::cpublas::brgemm_release();
}

} // namespace rskernels
