// deformable_attention on the CPU: the forward pass. Meaning and formulas: rskernels/ops/deformable_attention.py.
//
// value is copied once, head by head; then each task takes some queries of one head: corners and shares of their
// samples in vector passes over samples, then one weighted sum of corner rows per query, in registers. What is
// sampled is never written to memory.
#include "deformable_attention.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#define RSK_SIMD_FILE "deformable_attention_simd.h"
#include "foreach_isa.h"

namespace rskernels {

template <typename Io>
const DeformableKernels<Io>& deformable_kernels() {
  return RSK_AT_ISA_LEVEL(kDeformableKernels<Io>);
}
template const DeformableKernels<float>& deformable_kernels();
template const DeformableKernels<at::BFloat16>& deformable_kernels();

DeformableLayout::DeformableLayout(
    const at::Tensor& value, at::IntArrayRef shapes, const at::Tensor& locations, const at::Tensor& weights) {
  const Check check{"deformable_attention"};
  check.served("value", value);
  check.floating("sampling_locations", locations);
  check.floating("attention_weights", weights);
  check.rank("value", value, 4);
  check.rank("sampling_locations", locations, 6);
  batch = value.size(0);
  pixels = value.size(1);
  heads = value.size(2);
  dim = value.size(3);
  queries = locations.size(1);
  points = locations.size(4);
  row = round_up(dim, kVector);
  constexpr int64_t kLargestSide = 1 << 24, kMostPixels = 1 << 30; // exact in fp32; no overflow of 32 bits
  int64_t first = 0;
  for (size_t i = 0; i + 1 < shapes.size(); i += 2) {
    const int64_t height = shapes[i], width = shapes[i + 1];
    TORCH_CHECK_VALUE(height > 0 && width > 0 && height < kLargestSide && width < kLargestSide &&
                          height * width <= kMostPixels,
        "deformable_attention: a level of ", height, " x ", width, " pixels; expected 1 x 1 to 2^30 pixels");
    levels.push_back({height, width, first});
    first += height * width;
  }
  const int64_t count = static_cast<int64_t>(levels.size());
  TORCH_CHECK_VALUE(first == pixels && pixels <= kMostPixels, "deformable_attention: value has ", pixels,
      " pixels; expected the ", first, " of spatial_shapes");
  TORCH_CHECK_VALUE(locations.sizes() == at::IntArrayRef({batch, queries, heads, count, points, 2}) &&
                        weights.sizes() == locations.sizes().slice(0, 5),
      "deformable_attention: sampling_locations has shape ", locations.sizes(), ", attention_weights ",
      weights.sizes(), " for value ", value.sizes());
}

namespace {

template <typename Io>
struct Pack {
  static constexpr int64_t kPixels = 512; // of a task

  const DeformableLayout& layout;
  const at::Tensor& value;
  Io* packed;

  int64_t blocks() const { return (layout.pixels + kPixels - 1) / kPixels; }

  void run(int64_t task) {
    const int64_t unit = task / blocks(), begin = task % blocks() * kPixels;
    const int64_t head = unit % layout.heads, batch = unit / layout.heads;
    const int64_t end = std::min(begin + kPixels, layout.pixels);
    const Io* from = value.const_data_ptr<Io>() + batch * value.stride(0) + head * value.stride(2);
    Io* to = packed + unit * (layout.pixels + 1) * layout.row;
    deformable_kernels<Io>().pack_rows(from + begin * value.stride(1), value.stride(1), end - begin, layout.dim,
        to + begin * layout.row, layout.row);
    if (end == layout.pixels) std::fill_n(to + end * layout.row, layout.row, Io(0));
  }
};

template <typename Io>
class Forward {
 public:
  static constexpr int64_t kQueries = 256; // of a task

  Forward(const DeformableLayout& layout, const Io* packed, const at::Tensor& locations,
      const at::Tensor& weights, const at::Tensor& out)
      : layout_(layout),
        packed_(packed),
        out_(out.data_ptr<Io>()),
        simd_(deformable_kernels<Io>()),
        tile_(layout, locations.const_data_ptr<float>(), weights.const_data_ptr<float>(), scratch_),
        row_(scratch_.take<float>(layout.row)) {
    tile_.use_levels(0, static_cast<int64_t>(layout.levels.size()), layout.pixels);
  }

  static int64_t blocks(const DeformableLayout& layout) { return (layout.queries + kQueries - 1) / kQueries; }

  void run(int64_t task) {
    const int64_t unit = task / blocks(layout_), first = task % blocks(layout_) * kQueries;
    const int64_t last = std::min(first + kQueries, layout_.queries);
    for (int64_t q = first; q < last; q += tile_.queries) sample(unit, q, std::min(tile_.queries, last - q));
  }

 private:
  void sample(int64_t unit, int64_t begin, int64_t n) {
    const int64_t head = unit % layout_.heads, batch = unit / layout_.heads, per_query = tile_.per_query;
    const Io* maps = packed_ + unit * (layout_.pixels + 1) * layout_.row;
    tile_.load(simd_, unit, begin, n);
    Io* out = out_ + (batch * layout_.queries + begin) * layout_.embed() + head * layout_.dim;
    for (int64_t q = 0; q < n; ++q) {
      simd_.gather(maps, layout_.row, tile_.samples, q * per_query, (q + 1) * per_query, row_);
      simd_.narrow_rows(row_, layout_.row, 1, layout_.dim, out + q * layout_.embed(), 0);
    }
  }

  const DeformableLayout& layout_;
  const Io* packed_;
  Io* out_;
  const DeformableKernels<Io>& simd_;
  Scratch scratch_;
  SampleTile tile_;
  float* row_;
};

template <typename Io>
void forward(const DeformableLayout& layout, const at::Tensor& value, const at::Tensor& locations,
    const at::Tensor& weights, const at::Tensor& out) {
  const at::Tensor packed = pack_value<Io>(layout, value);
  run_tasks(layout.units() * Forward<Io>::blocks(layout), 1,
      [&] { return Forward<Io>(layout, packed.const_data_ptr<Io>(), locations, weights, out); });
}

at::Tensor deformable_attention_forward(const at::Tensor& value, at::IntArrayRef spatial_shapes,
    const at::Tensor& locations, const at::Tensor& weights) {
  const DeformableLayout layout(value, spatial_shapes, locations, weights);
  const at::Tensor out = at::empty({layout.batch, layout.queries, layout.embed()}, value.options());
  if (out.numel() == 0) return out;
  const at::Tensor places = locations.to(at::kFloat).contiguous(), shares = weights.to(at::kFloat).contiguous();
  if (value.scalar_type() == at::kFloat) {
    forward<float>(layout, value, places, shares, out);
  } else {
    forward<at::BFloat16>(layout, value, places, shares, out);
  }
  return out;
}

} // namespace

template <typename Io>
at::Tensor pack_value(const DeformableLayout& layout, const at::Tensor& value_) {
  const at::Tensor value = layout.dim == 1 || value_.stride(3) == 1 ? value_ : value_.contiguous();
  const at::Tensor packed =
      at::empty({layout.batch, layout.heads, layout.pixels + 1, layout.row}, value.options());
  const Pack<Io> pack{layout, value, packed.data_ptr<Io>()};
  if (layout.pixels == 0) {
    std::fill_n(pack.packed, packed.numel(), Io(0));
  } else {
    run_tasks(layout.units() * pack.blocks(), 1, [&] { return pack; });
  }
  return packed;
}
template at::Tensor pack_value<float>(const DeformableLayout&, const at::Tensor&);
template at::Tensor pack_value<at::BFloat16>(const DeformableLayout&, const at::Tensor&);

TORCH_LIBRARY_IMPL(rskernels, CPU, m) {
  m.impl("deformable_attention_forward", &deformable_attention_forward);
}

} // namespace rskernels
