// distillation_loss on the CPU: the backward pass. Meaning and formulas: rskernels/ops/distillation_loss.py.
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>

#include "check.h"
#include "distillation_loss.h"
#include "work.h"

#define RSK_SIMD_FILE "distillation_loss_backward_simd.h"
#include "foreach_isa.h"

namespace rskernels {
namespace {

using at::Tensor;

template <typename S, typename T>
DistillationBackward backward() {
  return RSK_AT_ISA_LEVEL(distillation::kBackward<S, T>);
}

DistillationBackward backward_for(at::ScalarType student, at::ScalarType teacher) {
  const bool s = student == at::kBFloat16, t = teacher == at::kBFloat16;
  if (s) return t ? backward<at::BFloat16, at::BFloat16>() : backward<at::BFloat16, float>();
  return t ? backward<float, at::BFloat16>() : backward<float, float>();
}

struct Backward {
  const DistillationCall& call;
  DistillationBackward simd;
  const DistillationTasks& tasks;

  void run(int64_t task) {
    for (int64_t tile = tasks.begin(task); tile < tasks.end(task); ++tile) simd(call, tile);
  }
};

Tensor distillation_loss_backward(const std::optional<Tensor>& grad_kl, const std::optional<Tensor>& grad_mse,
    const Tensor& student_, const Tensor& teacher_, const Tensor& stats_, std::string_view axis,
    std::string_view direction, double temperature, std::string_view reduction) {
  check_distillation(student_, teacher_, axis, direction, temperature, reduction);
  const bool channel = axis == "channel";
  const Check check{"distillation_loss"};
  for (const auto& [name, grad] : {std::pair{"grad_kl", &grad_kl}, std::pair{"grad_mse", &grad_mse}}) {
    if (!grad->has_value()) continue;
    check.floating(name, **grad);
    check.shape(name, **grad, {});
  }
  const int64_t distributions = student_.numel() / student_.size(channel ? 1 : 3);
  check.same("stats", stats_, {direction == "student||teacher" ? 3 : 4, distributions}, at::kFloat);
  const Tensor stats = stats_.contiguous();
  const Tensor student = distillation_readable(student_, channel),
               teacher = distillation_readable(teacher_, channel);
  const Divergence divergence = grad_kl.has_value() ? distillation_divergence(direction) : Divergence::none;
  const Tensor result = at::empty_like(student_);
  const Tensor grad = distillation_reads_in_place(result, channel)
                          ? result
                          : at::empty_like(student, at::MemoryFormat::Contiguous);
  DistillationCall call =
      describe_distillation(student, teacher, grad, stats, channel, divergence, temperature);
  if (grad_kl.has_value()) {
    const double scale = divergence == Divergence::student_teacher ? 1.0 : temperature;
    call.kl_factor =
        static_cast<float>(grad_kl->item<double>() * scale / distillation_count(student, channel, reduction));
  }
  if (grad_mse.has_value()) {
    call.mse_factor = static_cast<float>(grad_mse->item<double>() * 2 / static_cast<double>(student.numel()));
  }
  const DistillationBackward simd = backward_for(student.scalar_type(), teacher.scalar_type());
  const DistillationTasks tasks(call.tiles(), call.part_steps * std::min(call.lanes, call.tile_lanes));
  run_tasks(tasks.count, 1, [&] { return Backward{call, simd, tasks}; });
  if (!grad.is_same(result)) result.copy_(grad);
  return result;
}

} // namespace

TORCH_LIBRARY_IMPL(rskernels, CPU, m) {
  m.impl("distillation_loss_backward", &distillation_loss_backward);
}

} // namespace rskernels
