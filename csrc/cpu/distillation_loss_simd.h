// The forward pass of distillation_loss over tiles, for one instruction set (see foreach_isa.h).
#include "distillation_loss_tile_simd.h"

namespace distillation {

constexpr int64_t kFirstLook = kBlock; // values whose largest is the first reference
constexpr float kPadding = -1e30f;     // a value beside which no other counts
constexpr float kTooLarge = 1 << 24;   // a sum of exponentials that calls for a new reference

// log(x) for normal x; accurate relative to log(x) itself near 1. x = 2^e m with m about 1, then the series of
// the inverse hyperbolic tangent.
RSK_INLINE VecF log(VecF x) {
  const VecI bits = (VecI)x;
  const VecI power = (bits - 0x3f3504f3) >> 23;
  const VecF f = (VecF)(bits - (power << 23)) - 1.0f;
  const VecF z = f / (f + 2.0f), z2 = z * z;
  VecF p = z2 * (1.0f / 9) + 1.0f / 7;
  p = p * z2 + 1.0f / 5;
  p = p * z2 + 1.0f / 3;
  p = p * z2;
  return __builtin_convertvector(power, VecF) * kLn2 + (2.0f * z + 2.0f * z * p) + (x - x); // keeps NaN
}

// Is any lane not below the limit?
RSK_INLINE bool any_reaches(VecF x, VecF y, float limit) {
#if RSK_LEVEL >= 2
  return (_mm512_cmp_ps_mask(x, splat(limit), _CMP_NLT_UQ) |
             _mm512_cmp_ps_mask(y, splat(limit), _CMP_NLT_UQ)) != 0;
#else
  const VecI below = (VecI)(x < limit) & (VecI)(y < limit);
  int32_t all = -1;
  for (int lane = 0; lane < kLanes; ++lane) all &= below[lane];
  return all == 0;
#endif
}

// ---------------------------------------------------------------- sums

// What is known of one vector of distributions, or of one distribution read along its steps. `weighted` is the
// sum of e (s - t - shift), where e are the exponentials of whichever comes first in the divergence.
struct Sums {
  VecF reference_s, reference_t, shift; // shift = reference_s - reference_t
  VecF z_s, z_t, weighted, squares;
};

struct BlockSums {
  VecF z_s, z_t, weighted, squares;
};

// Adds steps, at most kBlock in a row.
template <bool kTeacherFirst, int kSteps, typename S, typename T>
RSK_INLINE void add_steps(const S* s, int64_t s_stride, const T* t, int64_t t_stride, Exponent exponent,
    const Sums& now, BlockSums& block) {
  VecF z_s = block.z_s, z_t = block.z_t, weighted = block.weighted, squares = block.squares;
#pragma GCC unroll 4
  for (int i = 0; i < kSteps; ++i) {
    const VecF x = load(s + i * s_stride), y = load(t + i * t_stride);
    const VecF e_s = exp2_scaled(x - now.reference_s, exponent);
    const VecF e_t = exp2_scaled(y - now.reference_t, exponent);
    const VecF difference = x - y;
    z_s += e_s;
    z_t += e_t;
    weighted += (kTeacherFirst ? e_t : e_s) * (difference - now.shift);
    squares += difference * difference;
  }
  block.z_s = z_s;
  block.z_t = z_t;
  block.weighted = weighted;
  block.squares = squares;
}

// Makes sums relative to other references.
template <bool kTeacherFirst>
RSK_INLINE void rebase(VecF reference_s, VecF reference_t, Exponent exponent, Sums& now) {
  const VecF factor_s = exp2_scaled(now.reference_s - reference_s, exponent);
  const VecF factor_t = exp2_scaled(now.reference_t - reference_t, exponent);
  const VecF shift = reference_s - reference_t;
  now.weighted += (now.shift - shift) * (kTeacherFirst ? now.z_t : now.z_s);
  now.weighted *= kTeacherFirst ? factor_t : factor_s;
  now.z_s *= factor_s;
  now.z_t *= factor_t;
  now.reference_s = reference_s;
  now.reference_t = reference_t;
  now.shift = shift;
}

// The largest values so far become the references. References need not be maxima: that of the first few
// values does (the nearer, the smaller the rounding of differences), but exponentials must not overflow.
template <bool kTeacherFirst, bool kAlong, typename S, typename T>
__attribute__((noinline)) void raise_references(const S* s, int64_t s_stride, const T* t, int64_t t_stride,
    int64_t steps, Exponent exponent, const BlockSums& block, Sums& now) {
  VecF s_max = now.reference_s, t_max = now.reference_t;
  for (int64_t i = 0; i < steps; ++i) {
    s_max = vmax(load(s + i * s_stride), s_max);
    t_max = vmax(load(t + i * t_stride), t_max);
  }
  if constexpr (kAlong) {
    s_max = largest_lane(s_max);
    t_max = largest_lane(t_max);
  } else { // a distribution's result must not depend on its neighbours'
    s_max = block.z_s < kTooLarge ? now.reference_s : s_max;
    t_max = block.z_t < kTooLarge ? now.reference_t : t_max;
  }
  rebase<kTeacherFirst>(s_max, t_max, exponent, now);
}

RSK_INLINE Sums start(VecF s, VecF t) {
  return Sums{s, t, s - t, VecF{}, VecF{}, VecF{}, VecF{}};
}

template <typename Io>
RSK_INLINE VecF largest(const Io* from, int64_t stride, int64_t steps) {
  VecF result = load(from);
  for (int64_t i = 1; i < steps; ++i) result = vmax(load(from + i * stride), result);
  return result;
}

// A block ends. Where its exponentials grew too large, it is added up once more.
template <bool kTeacherFirst, bool kAlong, typename S, typename T>
RSK_INLINE void merge_block(const S* s, int64_t s_stride, const T* t, int64_t t_stride, int64_t steps,
    Exponent exponent, BlockSums& block, Sums& now) {
  if (any_reaches(block.z_s, block.z_t, kTooLarge)) {
    raise_references<kTeacherFirst, kAlong>(s, s_stride, t, t_stride, steps, exponent, block, now);
    block = BlockSums{};
    for (int64_t i = 0; i < steps; ++i) {
      add_steps<kTeacherFirst, 1>(s + i * s_stride, 0, t + i * t_stride, 0, exponent, now, block);
    }
  }
  now.z_s += block.z_s;
  now.z_t += block.z_t;
  now.weighted += block.weighted;
  now.squares += block.squares;
}

// At most kBlock steps of some vectors, the `first` of them or more. Two steps at a time, so that memory is read in long runs.
template <bool kTeacherFirst, typename S, typename T>
inline void add_block(const S* s, int64_t s_stride, const T* t, int64_t t_stride, int64_t steps,
    int64_t vectors, bool first, bool prefetch, Exponent exponent, Sums* now) {
  const int64_t few = first && steps < kFirstLook ? steps : kFirstLook;
  for (int64_t v = 0; first && v < vectors; ++v) {
    now[v] = start(largest(s + v * kLanes, s_stride, few), largest(t + v * kLanes, t_stride, few));
  }
  BlockSums block[kTileVectors];
  for (int64_t v = 0; v < vectors; ++v) block[v] = BlockSums{};
  int64_t i = 0;
  for (; i + kStepsAtOnce <= steps; i += kStepsAtOnce) {
    for (int64_t v = 0; v < vectors; ++v) {
      const S* s_from = s + i * s_stride + v * kLanes;
      const T* t_from = t + i * t_stride + v * kLanes;
      if (prefetch) {
        for (int64_t next = kStepsAtOnce; next < 2 * kStepsAtOnce; ++next) {
          __builtin_prefetch(s_from + next * s_stride);
          __builtin_prefetch(t_from + next * t_stride);
        }
      }
      add_steps<kTeacherFirst, kStepsAtOnce>(s_from, s_stride, t_from, t_stride, exponent, now[v], block[v]);
    }
  }
  for (; i < steps; ++i) {
    for (int64_t v = 0; v < vectors; ++v) {
      add_steps<kTeacherFirst, 1>(
          s + i * s_stride + v * kLanes, 0, t + i * t_stride + v * kLanes, 0, exponent, now[v], block[v]);
    }
  }
  for (int64_t v = 0; v < vectors; ++v) {
    merge_block<kTeacherFirst, false>(
        s + v * kLanes, s_stride, t + v * kLanes, t_stride, steps, exponent, block[v], now[v]);
  }
}

// At most kBlock vectors of one distribution.
template <bool kTeacherFirst, typename S, typename T>
RSK_INLINE void add_block_along(const S* s, const T* t, int64_t vectors, Exponent exponent, Sums& now) {
  BlockSums block{};
  for (int64_t i = 0; i < vectors; ++i) {
    add_steps<kTeacherFirst, 1>(s + i * kLanes, 0, t + i * kLanes, 0, exponent, now, block);
  }
  merge_block<kTeacherFirst, true>(s, kLanes, t, kLanes, vectors, exponent, block, now);
}

// A vector of distributions is done: stores its statistics and returns its divergences.
template <bool kTeacherFirst>
inline VecF finish(const DistillationCall& call, const Tile& tile, int64_t lane, const Sums& now) {
  const VecF inverse_s = 1.0f / now.z_s, inverse_t = 1.0f / now.z_t;
  const VecF mean = now.weighted * (kTeacherFirst ? inverse_t : inverse_s); // of s - t, shifted
  const VecF log_ratio = log(now.z_s / now.z_t);
  const VecF rows[] = {
      now.reference_s, inverse_s, kTeacherFirst ? now.reference_t : mean + now.shift, inverse_t};
  const int64_t count = tile.lanes - lane < kLanes ? tile.lanes - lane : kLanes;
  float* to = call.stats + tile.outer1 * call.stat_outer1 + tile.outer2 * call.stat_outer2 +
              (tile.first_lane + lane) * call.stat_lane;
  for (int row = 0; row < (kTeacherFirst ? 4 : 3); ++row) {
    float* place = to + row * call.stat_row;
    if (call.stat_lane == 1 && count == kLanes) {
      store(place, rows[row]);
    } else {
      for (int64_t i = 0; i < count; ++i) place[i * call.stat_lane] = rows[row][i];
    }
  }
  const VecF kl = mean * (1.0f / call.temperature) - log_ratio;
  return kTeacherFirst ? -kl : kl;
}

// A vector of distributions read along their steps.
template <bool kTeacherFirst, typename S, typename T>
inline Sums sums_along(const DistillationCall& call, const S* s, const T* t, int64_t count) {
  VecF z_s[kLanes], z_t[kLanes], weighted[kLanes], squares{};
  float reference_s[kLanes], reference_t[kLanes];
  const int64_t vectors = call.steps / kLanes, rest = call.steps % kLanes;
  const int64_t few = vectors < kFirstLook / kLanes ? vectors : kFirstLook / kLanes;
  for (int64_t lane = 0; lane < kLanes; ++lane) { // z_s, z_t: as buffers
    z_s[lane] = lane < count ? largest(s + lane * call.student.lane, kLanes, few) : VecF{};
    z_t[lane] = lane < count ? largest(t + lane * call.teacher.lane, kLanes, few) : VecF{};
  }
  store(reference_s, largest_each(z_s));
  store(reference_t, largest_each(z_t));
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    Sums now = start(VecF{}, VecF{});
    now.z_s = now.z_t = splat(1.0f / kLanes); // of lanes that are missing
    if (lane < count) {
      const S* s_row = s + lane * call.student.lane;
      const T* t_row = t + lane * call.teacher.lane;
      now = start(splat(reference_s[lane]), splat(reference_t[lane]));
      for (int64_t i = 0; i < vectors; i += kBlock) {
        const int64_t some = vectors - i < kBlock ? vectors - i : kBlock;
        add_block_along<kTeacherFirst>(s_row + i * kLanes, t_row + i * kLanes, some, call.exponent, now);
      }
      if (rest > 0) {
        float s_rest[kLanes], t_rest[kLanes];
        store(s_rest, splat(kPadding));
        copy_row(s_row + vectors * kLanes, s_rest, rest);
        store(t_rest, splat(kPadding));
        copy_row(t_row + vectors * kLanes, t_rest, rest);
        add_block_along<kTeacherFirst>(s_rest, t_rest, 1, call.exponent, now);
      }
    }
    z_s[lane] = now.z_s;
    z_t[lane] = now.z_t;
    weighted[lane] = now.weighted;
    squares += now.squares;
    reference_s[lane] = now.reference_s[0];
    reference_t[lane] = now.reference_t[0];
  }
  Sums total = start(load(reference_s), load(reference_t));
  total.z_s = sum_each(z_s);
  total.z_t = sum_each(z_t);
  total.weighted = sum_each(weighted);
  total.squares = squares;
  return total;
}

// ---------------------------------------------------------------- tiles

// Some steps of a vector of distributions: kPartialRows rows of a part's tile.
RSK_INLINE void store_partial(float* to, const Sums& now) {
  const VecF rows[kPartialRows] = {
      now.reference_s, now.reference_t, now.z_s, now.z_t, now.weighted, now.squares};
  for (int64_t row = 0; row < kPartialRows; ++row) store(to + row * kWideTile, rows[row]);
}

RSK_INLINE Sums load_partial(const float* from) {
  Sums now = start(load(from), load(from + kWideTile));
  now.z_s = load(from + 2 * kWideTile);
  now.z_t = load(from + 3 * kWideTile);
  now.weighted = load(from + 4 * kWideTile);
  now.squares = load(from + 5 * kWideTile);
  return now;
}

template <bool kTeacherFirst>
inline void finish_tile(
    const DistillationCall& call, const Tile& tile, const Sums* now, DistillationSums& total) {
  VecF kl{};
  for (int64_t v = 0; v < tile.vectors(); ++v) {
    kl += finish<kTeacherFirst>(call, tile, v * kLanes, now[v]);
    for (int lane = 0; lane < kLanes; ++lane) total.squares += now[v].squares[lane];
  }
  for (int lane = 0; lane < kLanes; ++lane) total.kl += kl[lane];
}

template <bool kTeacherFirst, typename S, typename T>
inline void forward_tile_of(const DistillationCall& call, int64_t index, DistillationSums& total) {
  const Tile tile(call, index / call.parts, index % call.parts);
  const S* s = reinterpret_cast<const S*>(call.student.data) + tile.offset(call.student);
  const T* t = reinterpret_cast<const T*>(call.teacher.data) + tile.offset(call.teacher);
  const int64_t vectors = tile.vectors();
  Sums now[kTileVectors];
  if (call.along) {
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t lane = v * kLanes;
      now[v] = sums_along<kTeacherFirst>(
          call, s + lane * call.student.lane, t + lane * call.teacher.lane, tile.lanes - lane);
    }
  } else {
    alignas(64) float s_moved[kBlock * kTileLanes], t_moved[kBlock * kTileLanes];
    for (int64_t begin = tile.first_step; begin < tile.end_step; begin += kBlock) {
      const int64_t steps = tile.end_step - begin < kBlock ? tile.end_step - begin : kBlock;
      const bool first = begin == tile.first_step;
      if (tile.in_place(call)) {
        add_block<kTeacherFirst>(s + begin * call.student.step, call.student.step,
            t + begin * call.teacher.step, call.teacher.step, steps, vectors, first, true, call.exponent, now);
      } else {
        move_in<S>(call.student, tile, begin, steps, s_moved);
        move_in<T>(call.teacher, tile, begin, steps, t_moved);
        add_block<kTeacherFirst>(
            s_moved, kTileLanes, t_moved, kTileLanes, steps, vectors, first, false, call.exponent, now);
      }
    }
  }
  if (call.parts == 1) return finish_tile<kTeacherFirst>(call, tile, now, total);
  float* partial = call.partial + index * kPartialRows * kWideTile;
  for (int64_t v = 0; v < vectors; ++v) store_partial(partial + v * kLanes, now[v]);
}

template <bool kTeacherFirst>
inline void merge_tile_of(const DistillationCall& call, int64_t index, DistillationSums& total) {
  const Tile tile(call, index, 0);
  Sums now[kTileVectors];
  for (int64_t v = 0; v < tile.vectors(); ++v) {
    const float* partial = call.partial + index * call.parts * kPartialRows * kWideTile + v * kLanes;
    Sums sum = load_partial(partial);
    for (int64_t part = 1; part < call.parts; ++part) {
      Sums more = load_partial(partial + part * kPartialRows * kWideTile);
      const VecF reference_s = vmax(sum.reference_s, more.reference_s);
      const VecF reference_t = vmax(sum.reference_t, more.reference_t);
      rebase<kTeacherFirst>(reference_s, reference_t, call.exponent, sum);
      rebase<kTeacherFirst>(reference_s, reference_t, call.exponent, more);
      sum.z_s += more.z_s;
      sum.z_t += more.z_t;
      sum.weighted += more.weighted;
      sum.squares += more.squares;
    }
    now[v] = sum;
  }
  finish_tile<kTeacherFirst>(call, tile, now, total);
}

template <typename S, typename T>
inline void forward_tile(const DistillationCall& call, int64_t index, DistillationSums& sums) {
  call.divergence == Divergence::teacher_student ? forward_tile_of<true, S, T>(call, index, sums)
                                                 : forward_tile_of<false, S, T>(call, index, sums);
}

inline void merge_tile(const DistillationCall& call, int64_t index, DistillationSums& sums) {
  call.divergence == Divergence::teacher_student ? merge_tile_of<true>(call, index, sums)
                                                 : merge_tile_of<false>(call, index, sums);
}

template <typename S, typename T>
inline constexpr DistillationForward kForward = {forward_tile<S, T>, merge_tile};

} // namespace distillation
