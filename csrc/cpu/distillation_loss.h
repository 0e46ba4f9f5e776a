// distillation_loss on the CPU: how the vector passes see a call.
//
// Every layout and axis becomes one form: outer1 x outer2 x lanes distributions of `steps` values each. A *lane*
// is a distribution; some of them are a tile. Where neighbouring lanes are neighbours in memory (the channels of an
// NCHW map) vectors run across lanes, in place. Where the steps are neighbours (the channels of a channels-last
// map) long distributions are read along the steps, in place, too; short ones, and maps whose layouts differ,
// pass through a buffer in the first-level cache, block by block.
#pragma once

#include <cstdint>

namespace rskernels {

constexpr int64_t kVectorLanes = 16;
constexpr int64_t kTileLanes = 64; // distributions of a tile,
constexpr int64_t kWideTile = 256; // and of one that is read in place: long runs suit memory
constexpr int64_t kBlock = 32;     // steps that are summed up between two looks at the sums
constexpr int64_t kStepsAtOnce = 2;

// One map; strides in elements.
struct Map {
  char* data;
  int64_t outer1, outer2, step, lane;
  int64_t extent; // elements from the first to the last, gaps included: what may be read
  bool across;    // neighbouring lanes are neighbours in memory, otherwise neighbouring steps are
};

enum class Divergence : int { student_teacher = 0, teacher_student = 1, none = 2 };

// Statistics of each distribution, which backward rebuilds the probabilities from. For either divergence
// 2^((s - reference_s) * exponent) * inverse_s is the student's probability; then the probabilities' mean of
// s - t, or the teacher's reference and inverse.
constexpr int64_t kReferenceS = 0, kInverseS = 1, kMeanDifference = 2, kReferenceT = 2, kInverseT = 3;

struct DistillationCall {
  Map student, teacher, grad;
  int64_t outer1, outer2, steps, lanes;
  Divergence divergence;
  bool along, in_place; // all maps are read along the steps, or across the lanes; else through buffers
  int64_t tile_lanes;
  float exponent; // log2(e) / T
  float temperature;
  float* stats;                                          // (3 or 4, distributions)
  int64_t stat_row, stat_outer1, stat_outer2, stat_lane; // strides
  float kl_factor, mse_factor;                           // of the gradient's two terms

  int64_t tiles_across() const {
    const int64_t whole = in_place ? lanes / kVectorLanes * kVectorLanes : lanes;
    return (whole + tile_lanes - 1) / tile_lanes + (whole < lanes ? 1 : 0);
  }
  int64_t tiles() const { return outer1 * outer2 * tiles_across(); }
};

struct DistillationSums {
  double kl = 0, squares = 0;
};

struct DistillationKernels {
  void (*forward_tile)(const DistillationCall& call, int64_t tile, DistillationSums& sums);
  void (*backward_tile)(const DistillationCall& call, int64_t tile);
};

} // namespace rskernels
