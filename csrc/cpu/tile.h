// The product of two small matrices that every kernel here is made of.
//
//   tile_product(m, n, k, a, lda, b, ldb, c, ldc, accumulate):           c = a . b    or   c += a . b
//   tile_product_columns(m, n, k, a, lda, b, ldb, c, ldc, accumulate):   the same with a by columns, (k, m)
//
// row-major, c and sums in fp32. The *operands* a and b are fp32, or bf16 where has_bf16_tiles(). In bf16 k is even
// and what lies along it goes by pairs, as the processor's dot product wants them:
//
//                          fp32                     bf16
//   a                      (m, k), lda numbers      (m, k), lda numbers from row to row
//   a by columns           (k, m), lda numbers      (k / 2, m, 2), lda pairs
//   b                      (k, n), ldb numbers      (k / 2, n, 2), ldb pairs
//   c                      (m, n), ldc numbers      the same
//
// So the strides of a packed operand are the same in both: a row of pairs is two rows of numbers. Nothing outside the
// matrices is read or written.
//
// a by columns costs nothing beyond the odd line of cache: what a kernel has by rows of k (keys, pixels) need not be
// transposed for a sum over k.
//
// One C++ source for every instruction set (product_simd.h, compiled in tile.cpp), which sanitizers see into.
// Measured against oneDNN's generated code (PyTorch's cpublas::brgemm) on an AMD EPYC, one thread, 16 x 16 x 16 to
// 256 x 208 x 256: between equal and half as fast again (small tiles), in fp32 at AVX-512 and AVX2, and in bf16.
// The order in which an element of c is summed depends on k alone, not on where the element lies.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

#include "isa.h"

namespace rskernels {

// c (m, n) = or += a b in 32-bit numbers or pairs; a's element of row i and depth l: a + i * a_row + l * a_step, in
// bytes, at any alignment.
using TileProduct = void (*)(int64_t m, int64_t n, int64_t k, const char* a, int64_t a_row, int64_t a_step,
    const float* b, int64_t ldb, float* c, int64_t ldc, bool accumulate);

struct ProductKernels {
  TileProduct numbers, pairs;
};

const ProductKernels& product_kernels(); // of the instruction set in use

// Are products of bf16 tiles to be had? Otherwise kernels convert bf16 to fp32 tiles.
inline bool has_bf16_tiles() {
  return product_kernels().pairs != nullptr;
}

inline void tile_product(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
    int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  constexpr int64_t kSize = sizeof(float);
  product_kernels().numbers(
      m, n, k, reinterpret_cast<const char*>(a), lda * kSize, kSize, b, ldb, c, ldc, accumulate);
}

inline void tile_product_columns(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
    int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  constexpr int64_t kSize = sizeof(float);
  product_kernels().numbers(
      m, n, k, reinterpret_cast<const char*>(a), kSize, lda * kSize, b, ldb, c, ldc, accumulate);
}

inline void tile_product(int64_t m, int64_t n, int64_t k, const c10::BFloat16* a, int64_t lda,
    const c10::BFloat16* b, int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  constexpr int64_t kSize = sizeof(c10::BFloat16), kPair = 2 * kSize;
  product_kernels().pairs(m, n, k / 2, reinterpret_cast<const char*>(a), lda * kSize, kPair,
      reinterpret_cast<const float*>(b), ldb, c, ldc, accumulate);
}

inline void tile_product_columns(int64_t m, int64_t n, int64_t k, const c10::BFloat16* a, int64_t lda,
    const c10::BFloat16* b, int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  constexpr int64_t kPair = 2 * sizeof(c10::BFloat16);
  product_kernels().pairs(m, n, k / 2, reinterpret_cast<const char*>(a), kPair, lda * kPair,
      reinterpret_cast<const float*>(b), ldb, c, ldc, accumulate);
}

} // namespace rskernels
