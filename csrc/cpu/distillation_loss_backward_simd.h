// The backward pass of distillation_loss over tiles, for one instruction set (see foreach_isa.h).
#include "distillation_loss_tile_simd.h"

namespace distillation {

// Per distribution; the factor of the gradient is in the inverse. `ratio` is inverse_t / inverse_s: P - Q is taken
// before it is normalised, so that equal maps have none.
struct Coefficients {
  VecF reference_s, inverse_s, mean, reference_t, ratio;
};

template <Divergence kDivergence>
inline Coefficients coefficients(const DistillationCall& call, const Tile& tile, int64_t lane) {
  Coefficients c{};
  if constexpr (kDivergence != Divergence::none) {
    const int64_t count = tile.lanes - lane < kLanes ? tile.lanes - lane : kLanes;
    const float* from = call.stats + tile.outer1 * call.stat_outer1 + tile.outer2 * call.stat_outer2 +
                        (tile.first_lane + lane) * call.stat_lane;
    float rows[4][kLanes] = {};
    for (int row = 0; row < (kDivergence == Divergence::teacher_student ? 4 : 3); ++row) {
      for (int64_t i = 0; i < count; ++i) rows[row][i] = from[row * call.stat_row + i * call.stat_lane];
    }
    const VecF inverse_s = load(rows[kInverseS]);
    c = {load(rows[kReferenceS]), inverse_s * call.kl_factor, load(rows[kMeanDifference]),
        load(rows[kReferenceT]), load(rows[kInverseT]) / inverse_s};
  }
  return c;
}

// d loss / d s. In a bf16 gradient an exponential of degree 3 is accurate enough, except in a difference of two.
template <Divergence kDivergence, int kDegree>
RSK_INLINE VecF gradient(VecF x, VecF y, const Coefficients& c, float exponent, float mse_factor) {
  const VecF difference = x - y;
  VecF sum = difference * mse_factor;
  if constexpr (kDivergence == Divergence::student_teacher) {
    sum += exp2_any<kDegree>((x - c.reference_s) * exponent) * c.inverse_s * (difference - c.mean);
  } else if constexpr (kDivergence == Divergence::teacher_student) {
    const VecF e_s = exp2_any<5>((x - c.reference_s) * exponent);
    const VecF e_t = exp2_any<5>((y - c.reference_t) * exponent);
    sum += (e_s - e_t * c.ratio) * c.inverse_s;
  }
  return sum;
}

template <Divergence kDivergence, int kDegree, typename S, typename T, typename G>
inline void gradient_steps(const DistillationCall& call, const S* s, int64_t s_stride, const T* t,
    int64_t t_stride, G* g, int64_t g_stride, int64_t steps, int64_t vectors, bool prefetch,
    const Coefficients* c) {
  const float exponent = call.exponent.high, factor = call.mse_factor;
  for (int64_t i = 0; i < steps; ++i) {
    const S* s_row = s + i * s_stride;
    const T* t_row = t + i * t_stride;
    G* g_row = g + i * g_stride;
    for (int64_t lane = 0, v = 0; v < vectors; ++v, lane += kLanes) {
      if (prefetch) {
        __builtin_prefetch(s_row + 2 * s_stride + lane);
        __builtin_prefetch(t_row + 2 * t_stride + lane);
        __builtin_prefetch(g_row + 2 * g_stride + lane, 1);
      }
      const VecF x = load(s_row + lane), y = load(t_row + lane);
      store(g_row + lane, gradient<kDivergence, kDegree>(x, y, c[v], exponent, factor));
    }
  }
}

// One distribution, read along its steps.
template <Divergence kDivergence, int kDegree, typename S, typename T>
inline void gradient_along(const DistillationCall& call, const S* s, const T* t, S* g, const Coefficients& c) {
  const int64_t vectors = call.steps / kLanes, rest = call.steps % kLanes;
  gradient_steps<kDivergence, kDegree>(call, s, kLanes, t, kLanes, g, kLanes, vectors, 1, false, &c);
  if (rest > 0) {
    const int64_t i = vectors * kLanes;
    const VecF x = load_first(s + i, rest), y = load_first(t + i, rest);
    store_first(g + i, gradient<kDivergence, kDegree>(x, y, c, call.exponent.high, call.mse_factor), rest);
  }
}

template <Divergence kDivergence, typename S, typename T>
inline void backward_tile_of(const DistillationCall& call, const Tile& tile) {
  constexpr int kDegree = std::is_same_v<S, float> ? 5 : 3;
  const S* s = reinterpret_cast<const S*>(call.student.data) + tile.offset(call.student);
  const T* t = reinterpret_cast<const T*>(call.teacher.data) + tile.offset(call.teacher);
  S* g = reinterpret_cast<S*>(call.grad.data) + tile.offset(call.grad);
  Coefficients c[kTileVectors];
  for (int64_t v = 0; v < tile.vectors(); ++v) c[v] = coefficients<kDivergence>(call, tile, v * kLanes);
  if (call.along) {
    for (int64_t i = 0; i < tile.lanes; ++i) {
      const Coefficients& all = c[i / kLanes];
      const int64_t lane = i % kLanes;
      const Coefficients one{splat(all.reference_s[lane]), splat(all.inverse_s[lane]), splat(all.mean[lane]),
          splat(all.reference_t[lane]), splat(all.ratio[lane])};
      gradient_along<kDivergence, kDegree>(
          call, s + i * call.student.lane, t + i * call.teacher.lane, g + i * call.grad.lane, one);
    }
    return;
  }
  if (tile.in_place(call)) {
    const int64_t first = tile.first_step;
    gradient_steps<kDivergence, kDegree>(call, s + first * call.student.step, call.student.step,
        t + first * call.teacher.step, call.teacher.step, g + first * call.grad.step, call.grad.step,
        tile.end_step - first, tile.vectors(), true, c);
    return;
  }
  alignas(64) float s_moved[kBlock * kTileLanes], t_moved[kBlock * kTileLanes], g_moved[kBlock * kTileLanes];
  for (int64_t begin = tile.first_step; begin < tile.end_step; begin += kBlock) {
    const int64_t steps = tile.end_step - begin < kBlock ? tile.end_step - begin : kBlock;
    move_in<S>(call.student, tile, begin, steps, s_moved);
    move_in<T>(call.teacher, tile, begin, steps, t_moved);
    gradient_steps<kDivergence, kDegree>(
        call, s_moved, kTileLanes, t_moved, kTileLanes, g_moved, kTileLanes, steps, tile.vectors(), false, c);
    move_out<S>(call.grad, tile, begin, steps, g_moved);
  }
}

template <typename S, typename T>
inline void backward_tile(const DistillationCall& call, int64_t index) {
  const Tile tile(call, index / call.parts, index % call.parts);
  switch (call.divergence) {
    case Divergence::student_teacher:
      return backward_tile_of<Divergence::student_teacher, S, T>(call, tile);
    case Divergence::teacher_student:
      return backward_tile_of<Divergence::teacher_student, S, T>(call, tile);
    case Divergence::none:
      return backward_tile_of<Divergence::none, S, T>(call, tile);
  }
}

template <typename S, typename T>
inline constexpr DistillationBackward kBackward = backward_tile<S, T>;

} // namespace distillation
