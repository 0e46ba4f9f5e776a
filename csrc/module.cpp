// The host functions of rskernels._C. Operators are registered by the files in cpu/ through
// TORCH_LIBRARY_IMPL; their schemas live in Python (rskernels/ops).
#include <atomic>
#include <map>
#include <string>
#include <vector>

#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include "cpu/isa.h"
#include "cpu/linear.h"
#include "cpu/tile.h"

namespace {

std::map<std::string, std::string> build_info() {
  std::map<std::string, std::string> info;
  info["torch"] = TORCH_VERSION;
#if defined(__VERSION__)
  info["compiler"] = __VERSION__;
#endif
  info["c++"] = std::to_string(__cplusplus);
#if defined(_OPENMP)
  info["openmp"] = std::to_string(_OPENMP);
#else
  info["openmp"] = "off: at::parallel_for runs on one thread";
#endif
#if defined(__SANITIZE_ADDRESS__)
  info["sanitizer"] = "address";
#endif
  return info;
}

// How many threads a parallel_for of this extension really gets (its OpenMP runtime must be torch's).
int64_t parallel_threads() {
  std::atomic<int64_t> threads{0};
  at::parallel_for(0, 1024, 1, [&](int64_t, int64_t) { threads++; });
  return threads;
}

// The table of cpu/linear.h as a flat list: (float32, bfloat16) x (forward, grad_input, grad_weight) x shape
// class; 0 = aten, 1 = onednn.
void set_product_table(const std::vector<int>& products) {
  auto& table = rskernels::product_table();
  TORCH_CHECK_VALUE(
      products.size() == table.size(), "expected ", table.size(), " entries, got ", products.size());
  for (size_t i = 0; i < table.size(); ++i) {
    table[i].store(products[i] != 0 ? rskernels::Product::onednn : rskernels::Product::aten);
  }
}

} // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "C++ kernels of rskernels";
  module.def("build_info", &build_info, "What this extension was built with.");
  module.def("parallel_threads", &parallel_threads, "Threads that a parallel loop of this extension gets.");
  module.def(
      "cpu_capability", []() { return std::string(rskernels::isa_name(rskernels::isa_level())); },
      "Instruction set in use: baseline, avx2, avx512 or avx512_bf16.");
  module.def(
      "cpu_supported", []() { return std::string(rskernels::isa_name(rskernels::isa_supported())); },
      "The best of these instruction sets that this processor has.");
  module.def("has_bf16_tiles", &rskernels::has_bf16_tiles,
      "Are products of bfloat16 tiles to be had at the instruction set in use?");
  module.def(
      "set_cpu_capability", [](const std::string& level) { rskernels::set_isa_level(level); },
      "Use at most this instruction set; raises where the processor lacks it.");
  module.def(
      "set_product_table", &set_product_table, "Which library's product serves linear, per shape class.");
  module.def("shape_class", &rskernels::shape_class, "Shape class of a linear layer with (rows, in, out).");
}
