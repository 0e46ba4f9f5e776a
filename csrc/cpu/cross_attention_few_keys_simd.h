// The arithmetic of cross_attention_few_keys.cpp, compiled once per instruction set by foreach_isa.h: one vector
// of queries against all keys of one head. A square is kLanes rows of one vector, and stays in registers.
#include "cross_attention_operands_simd.h"

namespace cross_simd {

using cross::Block;

// kLanes rows of at most `columns` values; what does not exist is zero. kWhole: all of it exists.
template <bool kWhole, typename Io>
RSK_INLINE void load_square(
    const Io* from, int64_t stride, int64_t rows, int64_t columns, VecF (&square)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    square[i] = kWhole || i < rows ? load_some<kWhole>(from + i * stride, columns) : VecF{};
  }
}

template <bool kWhole, typename Io>
RSK_INLINE void store_square(
    VecF (&square)[kLanes], VecF factor, Io* to, int64_t stride, int64_t rows, int64_t columns) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) square[i] *= factor;
  transpose_square(square);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (kWhole || i < rows) store_some<kWhole>(to + i * stride, square[i], columns);
  }
}

// c's rows = or += a (rows x kLanes) times the square.
template <int kRows>
RSK_INLINE void multiply_rows(
    const float* a, int64_t a_row, const VecF (&square)[kLanes], float* c, int64_t c_row, bool accumulate) {
  VecF sums[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) sums[r] = splat(a[r * a_row]) * square[0];
#pragma GCC unroll 16
  for (int i = 1; i < kLanes; ++i) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sums[r] += splat(a[r * a_row + i]) * square[i];
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) store(c + r * c_row, accumulate ? load(c + r * c_row) + sums[r] : sums[r]);
}

RSK_INLINE void multiply(int64_t rows, const float* a, int64_t a_row, const VecF (&square)[kLanes], float* c,
    int64_t c_row, bool accumulate) {
  for (; rows >= 4; rows -= 4, a += 4 * a_row, c += 4 * c_row) {
    multiply_rows<4>(a, a_row, square, c, c_row, accumulate);
  }
  if (rows == 3) multiply_rows<3>(a, a_row, square, c, c_row, accumulate);
  if (rows == 2) multiply_rows<2>(a, a_row, square, c, c_row, accumulate);
  if (rows == 1) multiply_rows<1>(a, a_row, square, c, c_row, accumulate);
}

// square = the transpose of a (keys x kLanes) times b (keys x kLanes)
RSK_INLINE void combine(int64_t keys, const float* a, int64_t a_row, const float* b, VecF (&square)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) square[i] = VecF{};
  for (int64_t key = 0; key < keys; ++key, a += a_row, b += kLanes) {
    const VecF right = load(b);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) square[i] += splat(a[i]) * right;
  }
}

// Rows (queries x dim) against packed keys: scores (keys x kLanes).
template <bool kWhole, typename Io>
RSK_INLINE void scores_of(
    const Block<Io>& at, const Io* rows, int64_t stride, const float* keys, float* scores) {
  for (int64_t c = 0; c < at.dim; c += kLanes) {
    VecF square[kLanes];
    load_square<kWhole>(rows + c, stride, at.count, at.dim - c, square);
    transpose_square(square);
    multiply(at.keys, keys + c, at.row, square, scores, kLanes, c > 0);
  }
}

struct Softmax {
  VecF largest, total;
};

// Keys were packed with the factor scale * log2(e): scores become 2^(score - largest).
RSK_INLINE Softmax exponentiate(int64_t keys, float* scores) {
  VecF largest = load(scores), total{};
  for (int64_t key = 1; key < keys; ++key) largest = vmax(largest, load(scores + key * kLanes));
  for (int64_t key = 0; key < keys; ++key) {
    const VecF p = exp2<5>(load(scores + key * kLanes) - largest);
    total += p;
    store(scores + key * kLanes, p);
  }
  return {largest, total};
}

// What the next block of queries needs is fetched meanwhile: its rows are far apart in memory.
template <int kForWriting, typename Io>
RSK_INLINE void prefetch_block(const Io* rows, int64_t stride, int64_t dim) {
  for (int i = 0; i < kLanes; ++i) {
    for (int64_t c = 0; c < dim; c += 64 / sizeof(Io)) {
      __builtin_prefetch(rows + (kLanes + i) * stride + c, kForWriting);
    }
  }
}

template <bool kWhole, typename Io>
inline void forward_block(const Block<Io>& at) {
  if (at.more) {
    prefetch_block<0>(at.q, at.q_stride, at.dim);
    prefetch_block<1>(at.out, at.out_stride, at.dim);
  }
  float scores[cross::kFewKeys * kLanes];
  scores_of<kWhole>(at, at.q, at.q_stride, at.k, scores);
  const Softmax softmax = exponentiate(at.keys, scores);
  store_some<kWhole>(at.lse, softmax.largest * kLn2 + log(softmax.total), at.count);
  for (int64_t c = 0; c < at.dim; c += kLanes) {
    VecF square[kLanes];
    combine(at.keys, at.v + c, at.row, scores, square);
    store_square<kWhole>(square, 1.0f / softmax.total, at.out + c, at.out_stride, at.count, at.dim - c);
  }
}

// p is rebuilt as in the forward pass and normalised by its own sum; delta is the sum of p dp. Both are more
// exact than the log-sum-exp and do . out: where one key takes all, dp - delta is a small difference.
template <bool kWhole, typename Io>
inline void backward_block(const Block<Io>& at) {
  if (at.more) {
    prefetch_block<0>(at.q, at.q_stride, at.dim);
    prefetch_block<0>(at.grad, at.grad_stride, at.dim);
    if (at.dq) prefetch_block<1>(at.dq, at.dq_stride, at.dim);
  }
  float p[cross::kFewKeys * kLanes], ds[cross::kFewKeys * kLanes];
  scores_of<kWhole>(at, at.q, at.q_stride, at.k, p);
  scores_of<kWhole>(at, at.grad, at.grad_stride, at.v, ds);
  const VecF factor = 1.0f / exponentiate(at.keys, p).total;
  VecF delta{};
  for (int64_t i = 0; i < at.keys * kLanes; i += kLanes) {
    const VecF probability = load(p + i) * factor;
    delta += probability * load(ds + i);
    store(p + i, probability);
  }
  for (int64_t i = 0; i < at.keys * kLanes; i += kLanes) store(ds + i, load(p + i) * (load(ds + i) - delta));
  for (int64_t c = 0; c < at.dim; c += kLanes) {
    VecF square[kLanes];
    if (at.dk) { // queries that do not exist are zero
      load_square<kWhole>(at.q + c, at.q_stride, at.count, at.dim - c, square);
      multiply(at.keys, ds, kLanes, square, at.dk + c, at.row, true);
    }
    if (at.dv) {
      load_square<kWhole>(at.grad + c, at.grad_stride, at.count, at.dim - c, square);
      multiply(at.keys, p, kLanes, square, at.dv + c, at.row, true);
    }
    if (at.dq) {
      combine(at.keys, at.k + c, at.row, ds, square);
      store_square<kWhole>(square, splat(kLn2), at.dq + c, at.dq_stride, at.count, at.dim - c);
    }
  }
}

template <typename Io>
inline void forward_queries(const Block<Io>& at) {
  at.count == kLanes&& at.dim % kLanes == 0 ? forward_block<true>(at) : forward_block<false>(at);
}

template <typename Io>
inline void backward_queries(const Block<Io>& at) {
  at.count == kLanes&& at.dim % kLanes == 0 ? backward_block<true>(at) : backward_block<false>(at);
}

template <typename Io>
inline constexpr cross::FewKeysKernels<Io> kFewKeysKernels = {
    kLanes, forward_queries<Io>, backward_queries<Io>, pack_rows<Io, float>, write_rows<Io>};

} // namespace cross_simd
