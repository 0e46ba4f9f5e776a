// distillation_loss on the CPU. Meaning and formulas: rskernels/ops/distillation_loss.py.
//
// One pass over both maps gives both sums and a few statistics per distribution; one more pass gives the gradient.
// The softmax is an online one: exponentials relative to a reference that is replaced only where it must be.
// Tasks are cut by shape, and their sums added up in order, in double: the same bits for any number of threads.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <string_view>
#include <tuple>
#include <vector>

#include "distillation_loss.h"
#include "work.h"

#define RSK_SIMD_FILE "distillation_loss_simd.h"
#include "foreach_isa.h"

namespace rskernels {
namespace {

using at::Tensor;

constexpr int64_t kTaskValues = int64_t(1) << 15; // of one map: enough to make a task's overhead small

template <typename S, typename T>
const DistillationKernels& kernels() {
  return RSK_AT_ISA_LEVEL(kDistillationKernels<S, T>);
}

const DistillationKernels& kernels_for(at::ScalarType student, at::ScalarType teacher) {
  const bool s = student == at::kBFloat16, t = teacher == at::kBFloat16;
  if (s) return t ? kernels<at::BFloat16, at::BFloat16>() : kernels<at::BFloat16, float>();
  return t ? kernels<float, at::BFloat16>() : kernels<float, float>();
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

// Can the map be read in place? Pixels must be evenly spaced where they are the lanes.
bool serves(const Tensor& map, bool channel) {
  const auto [b, c, y, x] = strides_of(map);
  if (!channel) return x == 1 || c == 1;
  const bool even = y == map.size(3) * x || map.size(2) == 1 || map.size(3) == 1;
  return even && (c == 1 || pixel_stride(map) == 1);
}

// Rows of all channels and images, evenly spaced.
bool has_even_rows(const Tensor& map) {
  const auto [b, c, y, x] = strides_of(map);
  return x == 1 && (c == map.size(2) * y || map.size(1) == 1) && (b == map.size(1) * c || map.size(0) == 1);
}

struct Shape {
  int64_t batch, channels, height, width;
  bool channel, even_rows; // along the width, all of whose rows are lanes of one long row of tiles

  Shape(const std::vector<Tensor>& maps, bool channel_) : channel(channel_), even_rows(!channel_) {
    batch = maps[0].size(0), channels = maps[0].size(1), height = maps[0].size(2), width = maps[0].size(3);
    for (const Tensor& map : maps) even_rows = even_rows && has_even_rows(map);
  }

  int64_t distributions() const { return batch * height * (channel ? width : channels); }

  Map map(const Tensor& tensor) const {
    const auto [b, c, y, x] = strides_of(tensor);
    Map map;
    map.data = static_cast<char*>(tensor.data_ptr());
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
    call.stats = stats.defined() ? static_cast<float*>(stats.data_ptr()) : nullptr;
    call.stat_row = distributions();
    call.stat_outer1 = distributions() / batch;
    call.stat_outer2 = 1;
    call.stat_lane = channel || even_rows ? 1 : height;
  }
};

DistillationCall describe(const Tensor& student, const Tensor& teacher, const Tensor& grad, const Tensor& stats,
    bool channel, Divergence divergence, double temperature) {
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
  call.tile_lanes = kTileLanes;
  if (call.in_place && call.outer1 * call.outer2 * call.lanes >= 32 * kWideTile) call.tile_lanes = kWideTile;
  call.divergence = divergence;
  call.temperature = static_cast<float>(temperature);
  call.exponent = static_cast<float>(1.4426950408889634 / temperature);
  return call;
}

Tensor readable(const Tensor& map, bool channel) {
  return serves(map, channel) ? map : map.contiguous();
}

// Runs tiles in tasks whose cut depends on the shape alone.
struct Tasks {
  int64_t tiles, tiles_each, count;

  explicit Tasks(const DistillationCall& call)
      : tiles(call.tiles()),
        tiles_each(std::max<int64_t>(1, kTaskValues / (call.steps * std::min(call.lanes, call.tile_lanes)))),
        count((tiles + tiles_each - 1) / tiles_each) {}
  int64_t begin(int64_t task) const { return task * tiles_each; }
  int64_t end(int64_t task) const { return std::min(tiles, begin(task) + tiles_each); }
};

Divergence divergence_of(std::string_view direction) {
  return direction == "student||teacher" ? Divergence::student_teacher : Divergence::teacher_student;
}

// What the sum of all divergences is divided by.
double count_of(const Tensor& student, bool channel, std::string_view reduction) {
  const int64_t batch = student.size(0);
  return static_cast<double>(
      reduction == "batchmean" ? batch : student.numel() / student.size(channel ? 1 : 3));
}

struct Forward {
  const DistillationCall& call;
  const DistillationKernels& simd;
  const Tasks& tasks;
  DistillationSums* sums;

  void run(int64_t task) {
    DistillationSums sum;
    for (int64_t tile = tasks.begin(task); tile < tasks.end(task); ++tile) simd.forward_tile(call, tile, sum);
    sums[task] = sum;
  }
};

struct Backward {
  const DistillationCall& call;
  const DistillationKernels& simd;
  const Tasks& tasks;

  void run(int64_t task) {
    for (int64_t tile = tasks.begin(task); tile < tasks.end(task); ++tile) simd.backward_tile(call, tile);
  }
};

std::tuple<Tensor, Tensor, Tensor> distillation_loss_forward(const Tensor& student_, const Tensor& teacher_,
    std::string_view axis, std::string_view direction, double temperature, std::string_view reduction) {
  const bool channel = axis == "channel";
  const Tensor student = readable(student_, channel), teacher = readable(teacher_, channel);
  const Divergence divergence = divergence_of(direction);
  const auto scalars = student.options().dtype(at::kFloat);
  const int64_t rows = divergence == Divergence::student_teacher ? 3 : 4;
  const Tensor stats = at::empty({rows, student.numel() / student.size(channel ? 1 : 3)}, scalars);
  const DistillationCall call = describe(student, teacher, Tensor(), stats, channel, divergence, temperature);
  const DistillationKernels& simd = kernels_for(student.scalar_type(), teacher.scalar_type());
  const Tasks tasks(call);
  std::vector<DistillationSums> sums(tasks.count);
  run_tasks(tasks.count, 1, [&] { return Forward{call, simd, tasks, sums.data()}; });
  DistillationSums total;
  for (const DistillationSums& sum : sums) {
    total.kl += sum.kl;
    total.squares += sum.squares;
  }
  const double kl = total.kl * temperature * temperature / count_of(student, channel, reduction);
  const double mse = total.squares / static_cast<double>(student.numel());
  return {at::scalar_tensor(kl, scalars), at::scalar_tensor(mse, scalars), stats};
}

Tensor distillation_loss_backward(const std::optional<Tensor>& grad_kl, const std::optional<Tensor>& grad_mse,
    const Tensor& student_, const Tensor& teacher_, const Tensor& stats, std::string_view axis,
    std::string_view direction, double temperature, std::string_view reduction) {
  const bool channel = axis == "channel";
  const Tensor student = readable(student_, channel), teacher = readable(teacher_, channel);
  const Divergence divergence = grad_kl.has_value() ? divergence_of(direction) : Divergence::none;
  const Tensor result = at::empty_like(student_);
  const Tensor grad = serves(result, channel) ? result : at::empty_like(student, at::MemoryFormat::Contiguous);
  DistillationCall call =
      describe(student, teacher, grad, stats.contiguous(), channel, divergence, temperature);
  if (grad_kl.has_value()) {
    const double scale = divergence == Divergence::student_teacher ? 1.0 : temperature;
    call.kl_factor =
        static_cast<float>(grad_kl->item<double>() * scale / count_of(student, channel, reduction));
  }
  if (grad_mse.has_value()) {
    call.mse_factor = static_cast<float>(grad_mse->item<double>() * 2 / static_cast<double>(student.numel()));
  }
  const DistillationKernels& simd = kernels_for(student.scalar_type(), teacher.scalar_type());
  const Tasks tasks(call);
  run_tasks(tasks.count, 1, [&] { return Backward{call, simd, tasks}; });
  if (!grad.is_same(result)) result.copy_(grad);
  return result;
}

} // namespace

TORCH_LIBRARY_IMPL(rskernels, CPU, m) {
  m.impl("distillation_loss_forward", &distillation_loss_forward);
  m.impl("distillation_loss_backward", &distillation_loss_backward);
}

} // namespace rskernels
