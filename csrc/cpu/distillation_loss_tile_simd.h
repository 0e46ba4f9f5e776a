// What the forward and the backward pass of distillation_loss share, for one instruction set: included by
// distillation_loss_simd.h and distillation_loss_backward_simd.h.

namespace distillation {

constexpr int kTileVectors = kWideTile / kLanes;

// 2^x for x of any size; some huge number where that overflows.
template <int kDegree>
RSK_INLINE VecF exp2_any(VecF x) {
#if RSK_LEVEL >= 2
  return exp2<kDegree>(x);
#else
  return exp2<kDegree>(x > 126.0f ? splat(126.0f) : x);
#endif
}

// 2^(x * exponent), rounded and no more: of degree 6, and with the rounding of the product made good. The divergence
// is a small difference of sums of these; otherwise it would lose three times as many digits.
RSK_INLINE VecF exp2_scaled(VecF x, Exponent exponent) {
  const VecF product = x * exponent.high;
  const VecF lost = fused(x, splat(exponent.high), -product) + x * exponent.low;
  const VecF power = exp2_any<6>(product);
  return power + power * (lost * kLn2);
}

// Where a tile, or a part of one, is.
struct Tile {
  int64_t outer1, outer2, first_lane, lanes, first_step, end_step;

  Tile(const DistillationCall& call, int64_t index, int64_t part) {
    first_step = part * call.part_steps;
    end_step = call.steps - first_step < call.part_steps ? call.steps : first_step + call.part_steps;
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
  int64_t offset(const DistillationMap& map) const {
    return outer1 * map.outer1 + outer2 * map.outer2 + first_lane * map.lane;
  }
  int64_t vectors() const { return (lanes + kLanes - 1) / kLanes; }
  bool in_place(const DistillationCall& call) const { return call.in_place && lanes % kLanes == 0; }
};

// Steps begin ... begin + steps of a tile as rows of kTileLanes values; lanes that are missing become zeros.
template <typename Io>
inline void move_in(const DistillationMap& map, const Tile& tile, int64_t begin, int64_t steps, float* to) {
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
        square[i] = lane + i >= tile.lanes ? VecF{} : row <= last_whole ? load(row) : load_first(row, n);
      }
      transpose_square(square);
      for (int64_t i = 0; i < kLanes && step + i < steps; ++i)
        store(to + (step + i) * kTileLanes + lane, square[i]);
    }
  }
}

template <typename Io>
inline void move_out(
    const DistillationMap& map, const Tile& tile, int64_t begin, int64_t steps, const float* from) {
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
        store_some(row, square[i], steps - step);
      }
    }
  }
}

} // namespace distillation
