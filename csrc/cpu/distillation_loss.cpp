// distillation_loss on the CPU: how maps become a call, and the forward pass. Meaning and formulas:
// rskernels/ops/distillation_loss.py.
//
// One pass over both maps gives both sums and a few statistics per distribution; one more pass gives the gradient
// (distillation_loss_backward.cpp). The softmax is an online one: exponentials relative to a reference that is
// replaced only where it must be. Tasks are cut by shape, and their sums added up in order, in double: the same
// bits for any number of threads.
#include "distillation_loss.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "check.h"
#include "work.h"

#define RSK_SIMD_FILE "distillation_loss_simd.h"
#include "foreach_isa.h"

namespace rskernels {

using at::Tensor;

void check_distillation(const Tensor& student, const Tensor& teacher, std::string_view axis,
    std::string_view direction, double temperature, std::string_view reduction) {
  const Check check{"distillation_loss"};
  check.served("student", student);
  check.served("teacher", teacher);
  check.rank("student", student, 4);
  check.shape("teacher", teacher, student.sizes());
  TORCH_CHECK_VALUE(
      student.numel() > 0, check.op, ": student has shape ", student.sizes(), "; expected no empty dimension");
  TORCH_CHECK_VALUE(axis == "channel" || axis == "width", check.op, ": axis is ", axis);
  TORCH_CHECK_VALUE(direction == "student||teacher" || direction == "teacher||student", check.op,
      ": direction is ", direction);
  TORCH_CHECK_VALUE(reduction == "mean" || reduction == "batchmean", check.op, ": reduction is ", reduction);
  TORCH_CHECK_VALUE(temperature > 0, check.op, ": temperature is ", temperature, "; expected > 0");
}

// ---------------------------------------------------------------- maps

namespace {

// The vector passes know a map's dtype; here it is bytes.
char* bytes_of(const Tensor& map) {
  if (map.scalar_type() == at::kBFloat16) return reinterpret_cast<char*>(map.data_ptr<at::BFloat16>());
  return reinterpret_cast<char*>(map.data_ptr<float>());
}

// The strides of a map; those that its size makes meaningless as in a contiguous one.
std::array<int64_t, 4> strides_of(const Tensor& map) {
  std::array<int64_t, 4> strides;
  const bool contiguous = map.is_contiguous();
  int64_t dense = 1;
  for (int d = 3; d >= 0; dense *= map.size(d), --d) strides[d] = contiguous ? dense : map.stride(d);
  return strides;
}

// Between neighbouring pixels.
int64_t pixel_stride(const Tensor& map) {
  const auto strides = strides_of(map);
  return map.size(3) == 1 ? strides[2] : strides[3];
}

} // namespace

bool distillation_reads_in_place(const Tensor& map, bool channel) {
  const auto [b, c, y, x] = strides_of(map);
  if (!channel) return x == 1 || c == 1;
  const bool even = y == map.size(3) * x || map.size(2) == 1 || map.size(3) == 1;
  return even && (c == 1 || pixel_stride(map) == 1);
}

namespace {

// Rows of all channels and images, evenly spaced.
bool has_even_rows(const Tensor& map) {
  const auto [b, c, y, x] = strides_of(map);
  const int64_t rows = map.size(1) * map.size(2);
  return x == 1 && (c == map.size(2) * y || map.size(1) == 1) && (b == rows * y || map.size(0) == 1);
}

struct Shape {
  int64_t batch, channels, height, width;
  bool channel, even_rows; // along the width, all of whose rows are lanes of one long row of tiles

  Shape(const std::vector<Tensor>& maps, bool channel_) : channel(channel_), even_rows(!channel_) {
    batch = maps[0].size(0), channels = maps[0].size(1), height = maps[0].size(2), width = maps[0].size(3);
    for (const Tensor& map : maps) even_rows = even_rows && has_even_rows(map);
  }

  int64_t distributions() const { return batch * height * (channel ? width : channels); }

  DistillationMap map(const Tensor& tensor) const {
    const auto [b, c, y, x] = strides_of(tensor);
    DistillationMap map;
    map.data = bytes_of(tensor);
    map.extent = (batch - 1) * b + (channels - 1) * c + (height - 1) * y + (width - 1) * x + 1;
    map.outer1 = even_rows ? 0 : b;
    map.outer2 = channel || even_rows ? 0 : y;
    map.step = channel ? c : x;
    map.lane = channel ? pixel_stride(tensor) : even_rows ? y : c;
    map.across = map.lane == 1;
    return map;
  }

  void describe(DistillationCall& call, const Tensor& stats) const {
    call.outer1 = even_rows ? 1 : batch;
    call.outer2 = channel || even_rows ? 1 : height;
    call.steps = channel ? channels : width;
    call.lanes = channel ? height * width : even_rows ? batch * channels * height : channels;
    // Statistics lie as (B, h, w) or (B, C, h), whatever the maps' layout.
    call.stats = stats.defined() ? stats.data_ptr<float>() : nullptr;
    call.stat_row = distributions();
    call.stat_outer1 = distributions() / batch;
    call.stat_outer2 = 1;
    call.stat_lane = channel || even_rows ? 1 : height;
  }
};

} // namespace

DistillationCall describe_distillation(const Tensor& student, const Tensor& teacher, const Tensor& grad,
    const Tensor& stats, bool channel, Divergence divergence, double temperature) {
  std::vector<Tensor> maps{student, teacher};
  if (grad.defined()) maps.push_back(grad);
  const Shape shape(maps, channel);
  DistillationCall call{};
  shape.describe(call, stats);
  call.student = shape.map(student);
  call.teacher = shape.map(teacher);
  call.grad = grad.defined() ? shape.map(grad) : call.student;
  const int across = call.student.across + call.teacher.across + call.grad.across;
  call.in_place = across == 3;
  // Distributions that do not fill vectors are faster transposed, unless long.
  call.along = across == 0 && (call.steps % kVectorLanes == 0 || call.steps >= 6 * kVectorLanes);
  call.tile_lanes = call.in_place ? kWideTile : kTileLanes;
  call.parts = 1;
  call.part_steps = call.steps;
  if (call.in_place) {
    // Long runs of memory are worth more than whole distributions: their sums are added up afterwards.
    constexpr int64_t kEnoughTiles = 24, kFewestSteps = 64;
    const int64_t wanted = (kEnoughTiles + call.whole_tiles() - 1) / call.whole_tiles();
    const int64_t parts = std::max<int64_t>(1, std::min(wanted, call.steps / kFewestSteps));
    call.part_steps = (call.steps + parts - 1) / parts;
    call.parts = (call.steps + call.part_steps - 1) / call.part_steps;
  }
  call.divergence = divergence;
  call.temperature = static_cast<float>(temperature);
  const double exponent = 1.4426950408889634 / temperature;
  call.exponent.high = static_cast<float>(exponent);
  call.exponent.low = static_cast<float>(exponent - call.exponent.high);
  return call;
}

DistillationTasks::DistillationTasks(int64_t tiles_, int64_t tile_values) : tiles(tiles_) {
  constexpr int64_t kTaskValues = int64_t(1) << 15; // of one map: enough to make a task's overhead small
  tiles_each = std::max<int64_t>(1, kTaskValues / tile_values);
  count = (tiles + tiles_each - 1) / tiles_each;
}

// ---------------------------------------------------------------- forward

namespace {

template <typename S, typename T>
DistillationForward forward() {
  return RSK_AT_ISA_LEVEL(distillation::kForward<S, T>);
}

DistillationForward forward_for(at::ScalarType student, at::ScalarType teacher) {
  const bool s = student == at::kBFloat16, t = teacher == at::kBFloat16;
  if (s) return t ? forward<at::BFloat16, at::BFloat16>() : forward<at::BFloat16, float>();
  return t ? forward<float, at::BFloat16>() : forward<float, float>();
}

using TilePass = void (*)(const DistillationCall& call, int64_t tile, DistillationSums& sums);

struct Forward {
  const DistillationCall& call;
  TilePass pass;
  const DistillationTasks& tasks;
  DistillationSums* sums;

  void run(int64_t task) {
    DistillationSums sum;
    for (int64_t tile = tasks.begin(task); tile < tasks.end(task); ++tile) pass(call, tile, sum);
    sums[task] = sum;
  }
};

// `pass` over `tiles` tiles, and the sum of what they give.
DistillationSums sum_tiles(const DistillationCall& call, TilePass pass, int64_t tiles, int64_t tile_values) {
  const DistillationTasks tasks(tiles, tile_values);
  std::vector<DistillationSums> sums(tasks.count);
  run_tasks(tasks.count, 1, [&] { return Forward{call, pass, tasks, sums.data()}; });
  DistillationSums total;
  for (const DistillationSums& sum : sums) {
    total.kl += sum.kl;
    total.squares += sum.squares;
  }
  return total;
}

std::tuple<Tensor, Tensor, Tensor> distillation_loss_forward(const Tensor& student_, const Tensor& teacher_,
    std::string_view axis, std::string_view direction, double temperature, std::string_view reduction) {
  check_distillation(student_, teacher_, axis, direction, temperature, reduction);
  const bool channel = axis == "channel";
  const Tensor student = distillation_readable(student_, channel),
               teacher = distillation_readable(teacher_, channel);
  const Divergence divergence = distillation_divergence(direction);
  const auto scalars = student.options().dtype(at::kFloat);
  const int64_t rows = divergence == Divergence::student_teacher ? 3 : 4;
  const Tensor stats = at::empty({rows, student.numel() / student.size(channel ? 1 : 3)}, scalars);
  DistillationCall call =
      describe_distillation(student, teacher, Tensor(), stats, channel, divergence, temperature);
  const DistillationForward simd = forward_for(student.scalar_type(), teacher.scalar_type());
  const int64_t lanes = std::min(call.lanes, call.tile_lanes);
  Tensor partial;
  if (call.parts > 1) {
    partial = at::empty({call.tiles(), kPartialRows, kWideTile}, scalars);
    call.partial = partial.data_ptr<float>();
  }
  DistillationSums total = sum_tiles(call, simd.tile, call.tiles(), lanes * call.part_steps);
  if (call.parts > 1)
    total = sum_tiles(call, simd.merge, call.whole_tiles(), lanes * call.parts * kPartialRows);
  const double kl = total.kl * temperature * temperature / distillation_count(student, channel, reduction);
  const double mse = total.squares / static_cast<double>(student.numel());
  return {at::scalar_tensor(kl, scalars), at::scalar_tensor(mse, scalars), stats};
}

} // namespace

TORCH_LIBRARY_IMPL(rskernels, CPU, m) {
  m.impl("distillation_loss_forward", &distillation_loss_forward);
}

} // namespace rskernels
