// deformable_attention on the CPU: the backward pass. Meaning and formulas:
// rskernels/ops/deformable_attention.py.
//
// Locations and weights: as in the forward pass, a task takes some queries of one head; their gradients are made
// of the four products grad · corner of each sample.
// value: a scatter-add, without atomics. A task owns one level of one head and goes through all queries, summing
// into rows of its thread; levels are disjoint, so this cut costs nothing. Where it gives few tasks, the queries
// are cut, too, by shape alone, and partial sums, each summed in place, are added up in order.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

#include "deformable_attention.h"

namespace rskernels {
namespace {

struct Call {
  at::Tensor grad, locations, weights; // contiguous, the last two fp32
  at::Tensor grad_value, grad_locations, grad_weights;
};

// Gradients of locations and weights.
template <typename Io>
class SampleGradients {
 public:
  static constexpr int64_t kQueries = 256; // of a task

  SampleGradients(const DeformableLayout& layout, const Io* packed, const Call& call)
      : layout_(layout),
        packed_(packed),
        grad_(call.grad.const_data_ptr<Io>()),
        grad_locations_(call.grad_locations.data_ptr<float>()),
        grad_weights_(call.grad_weights.data_ptr<float>()),
        simd_(deformable_kernels<Io>()),
        tile_(layout, call.locations.const_data_ptr<float>(), call.weights.const_data_ptr<float>(), scratch_) {
    tile_.use_levels(0, static_cast<int64_t>(layout.levels.size()), layout.pixels);
    const int64_t most = round_up(tile_.queries * tile_.per_query, kVector);
    grads_ = scratch_.take<float>(tile_.queries * layout.row);
    locations_ = scratch_.take<float>(2 * most);
    weights_ = scratch_.take<float>(most);
  }

  static int64_t blocks(const DeformableLayout& layout) { return (layout.queries + kQueries - 1) / kQueries; }

  void run(int64_t task) {
    const int64_t unit = task / blocks(layout_), first = task % blocks(layout_) * kQueries;
    const int64_t last = std::min(first + kQueries, layout_.queries);
    for (int64_t q = first; q < last; q += tile_.queries) {
      differentiate(unit, q, std::min(tile_.queries, last - q));
    }
  }

 private:
  void differentiate(int64_t unit, int64_t begin, int64_t n) {
    const int64_t head = unit % layout_.heads, batch = unit / layout_.heads, per_query = tile_.per_query;
    const Io* maps = packed_ + unit * (layout_.pixels + 1) * layout_.row;
    tile_.load(simd_, unit, begin, n);
    const Io* grad = grad_ + (batch * layout_.queries + begin) * layout_.embed() + head * layout_.dim;
    simd_.widen_rows(grad, layout_.embed(), n, layout_.dim, grads_, layout_.row);
    simd_.differentiate(maps, grads_, layout_.row, tile_.samples, n * per_query, locations_, weights_);
    for (int64_t q = 0; q < n; ++q) {
      const int64_t to = tile_.sample_index(unit, begin + q);
      simd_.copy_few(locations_ + 2 * q * per_query, grad_locations_ + 2 * to, 2 * per_query);
      simd_.copy_few(weights_ + q * per_query, grad_weights_ + to, per_query);
    }
  }

  const DeformableLayout& layout_;
  const Io *packed_, *grad_;
  float *grad_locations_, *grad_weights_;
  const DeformableKernels<Io>& simd_;
  Scratch scratch_;
  SampleTile tile_;
  float *grads_, *locations_, *weights_;
};

// How the scatter-add is cut: by shape alone.
struct Cut {
  static constexpr int64_t kEnoughTasks = 12; // more would be better for many threads, and is memory for all

  int64_t levels, tasks, parts = 1; // levels: of all units

  explicit Cut(const DeformableLayout& layout)
      : levels(layout.units() * static_cast<int64_t>(layout.levels.size())) {
    // A part zeroes and adds up all its pixels: worth it where it adds many more corners to them.
    const int64_t corners = 4 * layout.queries * layout.points * static_cast<int64_t>(layout.levels.size());
    const int64_t most = std::max<int64_t>(1, corners / (16 * layout.pixels));
    parts = std::min((kEnoughTasks + levels - 1) / levels, most);
    tasks = levels * parts;
  }
};

// The gradient of value. Its tasks are parts of the queries of one level of one unit.
template <typename Io>
class ValueGradient {
 public:
  // partial: (parts, units, S + L, row), or null where there is one part.
  ValueGradient(const DeformableLayout& layout, const Cut& cut, const Call& call, float* partial)
      : layout_(layout),
        cut_(cut),
        grad_(call.grad.const_data_ptr<Io>()),
        grad_value_(call.grad_value.data_ptr<Io>()),
        partial_(partial),
        simd_(deformable_kernels<Io>()),
        tile_(layout, call.locations.const_data_ptr<float>(), call.weights.const_data_ptr<float>(), scratch_) {
    int64_t most = 0;
    for (const Level& level : layout.levels) most = std::max(most, level.pixels());
    if (cut.parts == 1) sums_ = scratch_.take<float>((most + 1) * layout.row);
    grads_ = scratch_.take<float>(kSampleTile * layout.row);
  }

  void run(int64_t task) {
    const int64_t part = task % cut_.parts;
    const auto [unit, index] = unit_and_level(task / cut_.parts);
    const Level& level = layout_.levels[index];
    float* sums = cut_.parts == 1 ? sums_ : part_of(part, unit, index);
    tile_.use_levels(index, index + 1, level.pixels()); // the last row of sums is for corners outside
    std::fill_n(sums, (level.pixels() + 1) * layout_.row, 0.0f);
    const int64_t first = layout_.queries * part / cut_.parts;
    const int64_t last = layout_.queries * (part + 1) / cut_.parts;
    for (int64_t q = first; q < last; q += tile_.queries)
      scatter(unit, q, std::min(tile_.queries, last - q), sums);
    if (cut_.parts == 1) write(unit, level, sums);
  }

  // Adds up the parts of one level of one unit.
  void merge(int64_t task) {
    const auto [unit, index] = unit_and_level(task);
    const Level& level = layout_.levels[index];
    const int64_t n = level.pixels() * layout_.row;
    float* sums = part_of(0, unit, index);
    for (int64_t part = 1; part < cut_.parts; ++part) simd_.add(part_of(part, unit, index), sums, n);
    write(unit, level, sums);
  }

 private:
  // Levels outermost: all units of a level, the longest tasks first where levels shrink.
  std::pair<int64_t, int64_t> unit_and_level(int64_t index) const {
    return {index % layout_.units(), index / layout_.units()};
  }

  // Every level has one row more, for corners outside.
  float* part_of(int64_t part, int64_t unit, int64_t index) const {
    const int64_t rows = layout_.pixels + static_cast<int64_t>(layout_.levels.size());
    return partial_ +
           ((part * layout_.units() + unit) * rows + layout_.levels[index].first + index) * layout_.row;
  }

  void scatter(int64_t unit, int64_t begin, int64_t n, float* sums) {
    const int64_t head = unit % layout_.heads, batch = unit / layout_.heads, per_query = tile_.per_query;
    tile_.load(simd_, unit, begin, n);
    const Io* grad = grad_ + (batch * layout_.queries + begin) * layout_.embed() + head * layout_.dim;
    simd_.widen_rows(grad, layout_.embed(), n, layout_.dim, grads_, layout_.row);
    for (int64_t q = 0; q < n; ++q) {
      simd_.scatter(
          grads_ + q * layout_.row, tile_.samples, q * per_query, (q + 1) * per_query, sums, layout_.row);
    }
  }

  void write(int64_t unit, const Level& level, const float* sums) {
    const int64_t head = unit % layout_.heads, batch = unit / layout_.heads;
    Io* to = grad_value_ + (batch * layout_.pixels + level.first) * layout_.embed() + head * layout_.dim;
    simd_.narrow_rows(sums, layout_.row, level.pixels(), layout_.dim, to, layout_.embed());
  }

  const DeformableLayout& layout_;
  const Cut& cut_;
  const Io* grad_;
  Io* grad_value_;
  float* partial_;
  const DeformableKernels<Io>& simd_;
  Scratch scratch_;
  SampleTile tile_;
  float *sums_ = nullptr, *grads_;
};

template <typename Io>
void backward(const DeformableLayout& layout, const at::Tensor& value, const Call& call) {
  if (call.grad_locations.defined()) {
    const at::Tensor packed = pack_value<Io>(layout, value);
    run_tasks(layout.units() * SampleGradients<Io>::blocks(layout), 1,
        [&] { return SampleGradients<Io>(layout, packed.const_data_ptr<Io>(), call); });
  }
  if (!call.grad_value.defined()) return;
  const Cut cut(layout);
  at::Tensor parts;
  if (cut.parts > 1) {
    const int64_t rows = layout.pixels + static_cast<int64_t>(layout.levels.size());
    parts = at::empty({cut.parts, layout.units(), rows, layout.row}, call.locations.options());
  }
  float* partial = cut.parts > 1 ? parts.data_ptr<float>() : nullptr;
  const auto worker = [&] { return ValueGradient<Io>(layout, cut, call, partial); };
  run_tasks(cut.tasks, 1, worker);
  if (cut.parts > 1) run_tasks(cut.levels, 1, [&] { return TasksOf<&ValueGradient<Io>::merge>{worker()}; });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> deformable_attention_backward(const at::Tensor& grad,
    const at::Tensor& value, at::IntArrayRef spatial_shapes, const at::Tensor& locations,
    const at::Tensor& weights, std::array<bool, 3> mask) {
  const DeformableLayout layout(value, spatial_shapes, locations, weights);
  TORCH_CHECK_VALUE(grad.sizes() == at::IntArrayRef({layout.batch, layout.queries, layout.embed()}) &&
                        grad.scalar_type() == value.scalar_type(),
      "deformable_attention: the gradient has shape ", grad.sizes(), " and dtype ", grad.scalar_type());
  const at::Tensor nothing = at::empty({0}, grad.options());
  const bool empty = grad.numel() == 0 || layout.samples() == 0;
  const auto like = [&](const at::Tensor& tensor, at::ScalarType dtype) {
    const auto options = tensor.options().dtype(dtype);
    return empty ? at::zeros(tensor.sizes(), options) : at::empty(tensor.sizes(), options);
  };

  Call call;
  if (mask[0]) call.grad_value = like(value, value.scalar_type());
  if (mask[1] || mask[2]) { // two by-products of the same products
    call.grad_locations = like(locations, at::kFloat);
    call.grad_weights = like(weights, at::kFloat);
  }
  if (!empty) {
    call.grad = grad.contiguous();
    call.locations = locations.to(at::kFloat).contiguous();
    call.weights = weights.to(at::kFloat).contiguous();
    if (value.scalar_type() == at::kFloat) {
      backward<float>(layout, value, call);
    } else {
      backward<at::BFloat16>(layout, value, call);
    }
  }
  return {
      mask[0] ? call.grad_value : nothing,
      mask[1] ? call.grad_locations.to(locations.scalar_type()) : nothing,
      mask[2] ? call.grad_weights.to(weights.scalar_type()) : nothing,
  };
}

} // namespace

TORCH_LIBRARY_IMPL(rskernels, CPU, m) {
  m.impl("deformable_attention_backward", &deformable_attention_backward);
}

} // namespace rskernels
