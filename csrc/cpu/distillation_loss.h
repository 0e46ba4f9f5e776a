// What the forward and the backward pass of distillation_loss share: how the vector passes see a call.
//
// Every layout and axis becomes one form: outer1 x outer2 x lanes distributions of `steps` values each. A *lane*
// is a distribution; some of them are a tile. Where neighbouring lanes are neighbours in memory (the channels of an
// NCHW map) vectors run across lanes, in place. Where the steps are neighbours (the channels of a channels-last
// map) long distributions are read along the steps, in place, too; short ones, and maps whose layouts differ,
// pass through a buffer in the first-level cache, block by block.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <string_view>

namespace rskernels {

constexpr int64_t kVectorLanes = 16;
constexpr int64_t kTileLanes = 64;  // distributions of a tile,
constexpr int64_t kWideTile = 1024; // and of one that is read in place: long runs suit memory
constexpr int64_t kBlock = 32;      // steps that are summed up between two looks at the sums
constexpr int64_t kStepsAtOnce = 2;
constexpr int64_t kPartialRows = 6; // what is known of a distribution after some of its steps

// One map; strides in elements.
struct DistillationMap {
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

// log2(e) / T, as the sum of two numbers.
struct Exponent {
  float high, low;
};

struct DistillationCall {
  DistillationMap student, teacher, grad;
  int64_t outer1, outer2, steps, lanes;
  Divergence divergence;
  bool along, in_place; // all maps are read along the steps, or across the lanes; else through buffers
  int64_t tile_lanes;
  int64_t parts, part_steps; // a tile's steps are cut where tiles are few
  Exponent exponent;
  float temperature;
  float* stats;                                          // (3 or 4, distributions)
  int64_t stat_row, stat_outer1, stat_outer2, stat_lane; // strides
  float* partial;              // (tiles, kPartialRows, kWideTile) sums of the parts, or null where there is one
  float kl_factor, mse_factor; // of the gradient's two terms

  int64_t tiles_across() const {
    const int64_t whole = in_place ? lanes / kVectorLanes * kVectorLanes : lanes;
    return (whole + tile_lanes - 1) / tile_lanes + (whole < lanes ? 1 : 0);
  }
  int64_t whole_tiles() const { return outer1 * outer2 * tiles_across(); } // the parts together
  int64_t tiles() const { return whole_tiles() * parts; }
};

struct DistillationSums {
  double kl = 0, squares = 0;
};

// The vector passes over one tile (distillation_loss_simd.h, distillation_loss_backward_simd.h).
struct DistillationForward {
  void (*tile)(const DistillationCall& call, int64_t tile, DistillationSums& sums);
  void (*merge)(const DistillationCall& call, int64_t whole_tile, DistillationSums& sums); // a tile's parts
};
using DistillationBackward = void (*)(const DistillationCall& call, int64_t tile);

// Tiles in tasks whose cut depends on the shape alone.
struct DistillationTasks {
  int64_t tiles, tiles_each, count;

  DistillationTasks(int64_t tiles, int64_t tile_values);
  int64_t begin(int64_t task) const { return task * tiles_each; }
  int64_t end(int64_t task) const { return std::min(tiles, begin(task) + tiles_each); }
};

// Can the map be read in place? Pixels must be evenly spaced where they are the lanes.
bool distillation_reads_in_place(const at::Tensor& map, bool channel);

inline at::Tensor distillation_readable(const at::Tensor& map, bool channel) {
  return distillation_reads_in_place(map, channel) ? map : map.contiguous();
}

// The call of maps that are readable; `grad` and `stats` may be undefined.
DistillationCall describe_distillation(const at::Tensor& student, const at::Tensor& teacher,
    const at::Tensor& grad, const at::Tensor& stats, bool channel, Divergence divergence, double temperature);

// Do the maps and options fit?
void check_distillation(const at::Tensor& student, const at::Tensor& teacher, std::string_view axis,
    std::string_view direction, double temperature, std::string_view reduction);

inline Divergence distillation_divergence(std::string_view direction) {
  return direction == "student||teacher" ? Divergence::student_teacher : Divergence::teacher_student;
}

// What the sum of all divergences is divided by.
inline double distillation_count(const at::Tensor& student, bool channel, std::string_view reduction) {
  const int64_t distributions = student.numel() / student.size(channel ? 1 : 3);
  return static_cast<double>(reduction == "batchmean" ? student.size(0) : distributions);
}

} // namespace rskernels
