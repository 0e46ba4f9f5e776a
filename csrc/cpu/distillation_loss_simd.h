// The vector passes of distillation_loss, for one instruction set (see foreach_isa.h).

constexpr int kTileVectors = kWideTile / kLanes;
constexpr float kPadding = -1e30f;   // a value beside which no other counts
constexpr float kTooLarge = 1 << 24; // a sum of exponentials that calls for a new reference

// 2^x for x of any size; some huge number where that overflows.
template <int kDegree>
RSK_INLINE VecF exp2_any(VecF x) {
#if RSK_LEVEL >= 2
  return exp2<kDegree>(x);
#else
  return exp2<kDegree>(x > 126.0f ? splat(126.0f) : x);
#endif
}

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
  return __builtin_convertvector(power, VecF) * 0.693147181f + (2.0f * z + 2.0f * z * p) + (x - x); // keeps NaN
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

RSK_INLINE VecF largest_lane(VecF x) {
  float largest = x[0];
  for (int lane = 1; lane < kLanes; ++lane) largest = x[lane] > largest ? x[lane] : largest;
  return splat(largest);
}

// Lane i of rows[0]: the sum of row i. A transposition that adds up as it goes.
template <int kStep = 1>
RSK_INLINE VecF sum_of_each(VecF (&rows)[kLanes]) {
  if constexpr (kStep < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i += 2 * kStep) {
      swap_quarters<kStep>(rows[i], rows[i + kStep], std::make_integer_sequence<int, kLanes>());
      rows[i] += rows[i + kStep];
    }
    return sum_of_each<2 * kStep>(rows);
  } else {
    return rows[0];
  }
}

inline void copy_part(const c10::BFloat16* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(from[i]);
}

inline void copy_part(const float* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

// n < kLanes values, the rest filled up.
template <typename Io>
RSK_INLINE VecF load_part(const Io* from, int64_t n, float fill) {
  float values[kLanes];
  store(values, splat(fill));
  copy_part(from, values, n);
  return load(values);
}

template <typename Io>
RSK_INLINE void store_part(Io* to, VecF x, int64_t n) {
  Io values[kLanes];
  store(values, x);
  for (int64_t i = 0; i < n; ++i) to[i] = values[i];
}

// ---------------------------------------------------------------- tiles

// Where a tile is.
struct Tile {
  int64_t outer1, outer2, first_lane, lanes;

  Tile(const DistillationCall& call, int64_t index) {
    const int64_t across = call.tiles_across(), outer = index / across;
    outer1 = outer / call.outer2;
    outer2 = outer % call.outer2;
    first_lane = index % across * call.tile_lanes;
    // Lanes that do not fill a vector are a tile of their own, after the last whole tile and what is left of it.
    const int64_t whole = call.lanes / kVectorLanes * kVectorLanes;
    if (call.in_place && index % across == across - 1 && whole < call.lanes) first_lane = whole;
    const int64_t end = call.in_place && first_lane < whole ? whole : call.lanes;
    lanes = end - first_lane < call.tile_lanes ? end - first_lane : call.tile_lanes;
  }
  int64_t offset(const Map& map) const {
    return outer1 * map.outer1 + outer2 * map.outer2 + first_lane * map.lane;
  }
  int64_t vectors() const { return (lanes + kLanes - 1) / kLanes; }
  bool in_place(const DistillationCall& call) const { return call.in_place && lanes % kLanes == 0; }
};

// Steps begin ... begin + steps of a tile as rows of kTileLanes values; lanes that are missing become zeros.
template <typename Io>
inline void move_in(const Map& map, const Tile& tile, int64_t begin, int64_t steps, float* to) {
  const Io* data = reinterpret_cast<const Io*>(map.data);
  const Io* from = data + tile.offset(map) + begin * map.step;
  const int64_t width = tile.vectors() * kLanes;
  if (map.across) {
    for (int64_t i = 0; i < steps; ++i) {
      copy_row(from + i * map.step, to + i * kTileLanes, tile.lanes);
      for (int64_t lane = tile.lanes; lane < width; ++lane) to[i * kTileLanes + lane] = 0;
    }
    return;
  }
  const Io* last_whole = data + map.extent - kLanes;
  for (int64_t lane = 0; lane < width; lane += kLanes) {
    for (int64_t step = 0; step < steps; step += kLanes) {
      VecF square[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const Io* row = from + (lane + i) * map.lane + step;
        const int64_t n = steps - step < kLanes ? steps - step : kLanes;
        // Running over the end of a row is fine, over the end of the map it is not.
        square[i] = lane + i >= tile.lanes ? VecF{} : row <= last_whole ? load(row) : load_part(row, n, 0);
      }
      transpose_square(square);
      for (int64_t i = 0; i < kLanes && step + i < steps; ++i)
        store(to + (step + i) * kTileLanes + lane, square[i]);
    }
  }
}

template <typename Io>
inline void move_out(const Map& map, const Tile& tile, int64_t begin, int64_t steps, const float* from) {
  Io* to = reinterpret_cast<Io*>(map.data) + tile.offset(map) + begin * map.step;
  if (map.across) {
    for (int64_t i = 0; i < steps; ++i) copy_row(from + i * kTileLanes, to + i * map.step, tile.lanes);
    return;
  }
  for (int64_t lane = 0; lane < tile.lanes; lane += kLanes) {
    for (int64_t step = 0; step < steps; step += kLanes) {
      VecF square[kLanes];
      load_square(from + step * kTileLanes + lane, kTileLanes, nullptr, steps - step, square);
      transpose_square(square);
      for (int64_t i = 0; i < kLanes && lane + i < tile.lanes; ++i) {
        Io* row = to + (lane + i) * map.lane + step;
        steps - step >= kLanes ? store(row, square[i]) : store_part(row, square[i], steps - step);
      }
    }
  }
}

// ---------------------------------------------------------------- forward

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
RSK_INLINE void add_steps(const S* s, int64_t s_stride, const T* t, int64_t t_stride, float exponent,
    const Sums& now, BlockSums& block) {
  VecF z_s = block.z_s, z_t = block.z_t, weighted = block.weighted, squares = block.squares;
#pragma GCC unroll 4
  for (int i = 0; i < kSteps; ++i) {
    const VecF x = load(s + i * s_stride), y = load(t + i * t_stride);
    const VecF e_s = exp2_any<5>((x - now.reference_s) * exponent);
    const VecF e_t = exp2_any<5>((y - now.reference_t) * exponent);
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

// The largest values so far become the references. References need not be maxima, the first values do, but
// exponentials must not overflow.
template <bool kTeacherFirst, bool kAlong, typename S, typename T>
__attribute__((noinline)) void raise_references(const S* s, int64_t s_stride, const T* t, int64_t t_stride,
    int64_t steps, float exponent, const BlockSums& block, Sums& now) {
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
  const VecF factor_s = exp2_any<5>((now.reference_s - s_max) * exponent);
  const VecF factor_t = exp2_any<5>((now.reference_t - t_max) * exponent);
  const VecF shift = s_max - t_max;
  now.weighted += (now.shift - shift) * (kTeacherFirst ? now.z_t : now.z_s);
  now.weighted *= kTeacherFirst ? factor_t : factor_s;
  now.z_s *= factor_s;
  now.z_t *= factor_t;
  now.reference_s = s_max;
  now.reference_t = t_max;
  now.shift = shift;
}

RSK_INLINE Sums start(VecF s, VecF t) {
  return Sums{s, t, s - t, VecF{}, VecF{}, VecF{}, VecF{}};
}

// A block ends. Where its exponentials grew too large, it is added up once more.
template <bool kTeacherFirst, bool kAlong, typename S, typename T>
RSK_INLINE void merge_block(const S* s, int64_t s_stride, const T* t, int64_t t_stride, int64_t steps,
    float exponent, BlockSums& block, Sums& now) {
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

// At most kBlock steps of some vectors. Two steps at a time, so that memory is read in long runs.
template <bool kTeacherFirst, typename S, typename T>
inline void add_block(const S* s, int64_t s_stride, const T* t, int64_t t_stride, int64_t steps,
    int64_t vectors, bool prefetch, float exponent, Sums* now) {
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
RSK_INLINE void add_block_along(const S* s, const T* t, int64_t vectors, float exponent, Sums& now) {
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
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    Sums now = start(VecF{}, VecF{});
    now.z_s = now.z_t = splat(1.0f / kLanes); // of lanes that are missing
    if (lane < count) {
      const S* s_row = s + lane * call.student.lane;
      const T* t_row = t + lane * call.teacher.lane;
      now = start(splat(static_cast<float>(s_row[0])), splat(static_cast<float>(t_row[0])));
      for (int64_t i = 0; i < vectors; i += kBlock) {
        const int64_t some = vectors - i < kBlock ? vectors - i : kBlock;
        add_block_along<kTeacherFirst>(s_row + i * kLanes, t_row + i * kLanes, some, call.exponent, now);
      }
      if (rest > 0) {
        float s_rest[kLanes], t_rest[kLanes];
        store(s_rest, load_part(s_row + vectors * kLanes, rest, kPadding));
        store(t_rest, load_part(t_row + vectors * kLanes, rest, kPadding));
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
  total.z_s = sum_of_each(z_s);
  total.z_t = sum_of_each(z_t);
  total.weighted = sum_of_each(weighted);
  total.squares = squares;
  return total;
}

template <bool kTeacherFirst, typename S, typename T>
inline void forward_tile_of(const DistillationCall& call, const Tile& tile, DistillationSums& total) {
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
  } else if (tile.in_place(call)) {
    for (int64_t v = 0; v < vectors; ++v) now[v] = start(load(s + v * kLanes), load(t + v * kLanes));
    for (int64_t begin = 0; begin < call.steps; begin += kBlock) {
      const int64_t steps = call.steps - begin < kBlock ? call.steps - begin : kBlock;
      add_block<kTeacherFirst>(s + begin * call.student.step, call.student.step, t + begin * call.teacher.step,
          call.teacher.step, steps, vectors, true, call.exponent, now);
    }
  } else {
    alignas(64) float s_moved[kBlock * kTileLanes], t_moved[kBlock * kTileLanes];
    for (int64_t begin = 0; begin < call.steps; begin += kBlock) {
      const int64_t steps = call.steps - begin < kBlock ? call.steps - begin : kBlock;
      move_in<S>(call.student, tile, begin, steps, s_moved);
      move_in<T>(call.teacher, tile, begin, steps, t_moved);
      for (int64_t v = 0; begin == 0 && v < vectors; ++v) {
        now[v] = start(load(s_moved + v * kLanes), load(t_moved + v * kLanes));
      }
      add_block<kTeacherFirst>(
          s_moved, kTileLanes, t_moved, kTileLanes, steps, vectors, false, call.exponent, now);
    }
  }
  VecF kl{};
  for (int64_t v = 0; v < vectors; ++v) {
    kl += finish<kTeacherFirst>(call, tile, v * kLanes, now[v]);
    for (int lane = 0; lane < kLanes; ++lane) total.squares += now[v].squares[lane];
  }
  for (int lane = 0; lane < kLanes; ++lane) total.kl += kl[lane];
}

// ---------------------------------------------------------------- backward

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
  const float exponent = call.exponent, factor = call.mse_factor;
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
    const VecF x = load_part(s + i, rest, 0), y = load_part(t + i, rest, 0);
    store_part(g + i, gradient<kDivergence, kDegree>(x, y, c, call.exponent, call.mse_factor), rest);
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
    gradient_steps<kDivergence, kDegree>(call, s, call.student.step, t, call.teacher.step, g, call.grad.step,
        call.steps, tile.vectors(), true, c);
    return;
  }
  alignas(64) float s_moved[kBlock * kTileLanes], t_moved[kBlock * kTileLanes], g_moved[kBlock * kTileLanes];
  for (int64_t begin = 0; begin < call.steps; begin += kBlock) {
    const int64_t steps = call.steps - begin < kBlock ? call.steps - begin : kBlock;
    move_in<S>(call.student, tile, begin, steps, s_moved);
    move_in<T>(call.teacher, tile, begin, steps, t_moved);
    gradient_steps<kDivergence, kDegree>(
        call, s_moved, kTileLanes, t_moved, kTileLanes, g_moved, kTileLanes, steps, tile.vectors(), false, c);
    move_out<S>(call.grad, tile, begin, steps, g_moved);
  }
}

// ---------------------------------------------------------------- entry points

template <typename S, typename T>
inline void forward_tile(const DistillationCall& call, int64_t index, DistillationSums& sums) {
  const Tile tile(call, index);
  call.divergence == Divergence::teacher_student ? forward_tile_of<true, S, T>(call, tile, sums)
                                                 : forward_tile_of<false, S, T>(call, tile, sums);
}

template <typename S, typename T>
inline void backward_tile(const DistillationCall& call, int64_t index) {
  const Tile tile(call, index);
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
inline constexpr DistillationKernels kDistillationKernels = {forward_tile<S, T>, backward_tile<S, T>};
