// What kernels made of tile products share: how ranges are cut, a thread's buffers, and a task queue.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "tile.h"

namespace rskernels {

constexpr int64_t kVector = 16; // lanes and row lengths are multiples of it at every instruction set

inline int64_t round_up(int64_t n, int64_t step) {
  return (n + step - 1) / step * step;
}

// A range cut into equal tiles, the last one smaller.
struct Tiling {
  int64_t total, size, count;

  Tiling(int64_t n, int64_t largest) : total(n) {
    TORCH_INTERNAL_ASSERT(n >= 1 && largest >= 1, "a tiling of ", n, " into tiles of ", largest);
    const int64_t pieces = (n + largest - 1) / largest;
    size = round_up((n + pieces - 1) / pieces, kVector);
    count = (n + size - 1) / size;
  }
  int64_t begin(int64_t tile) const { return tile * size; }
  int64_t length(int64_t tile) const { return std::min(size, total - begin(tile)); }
};

// Zeroed, aligned memory for one thread, freed at the end of its work.
class Scratch {
 public:
  template <typename T>
  T* take(int64_t n) {
    constexpr int64_t kAlign = 64, kSlack = 64 * sizeof(float); // transpositions run over the end
    constexpr int64_t kMost = (std::numeric_limits<int64_t>::max() - kSlack - kAlign) / sizeof(T);
    TORCH_CHECK(n >= 0 && n <= kMost, "rskernels: a thread's buffer of ", n, " values");
    char* block = static_cast<char*>(std::calloc(n * sizeof(T) + kSlack + kAlign, 1));
    TORCH_CHECK(block != nullptr, "rskernels: out of memory for a thread's buffers");
    blocks_.emplace_back(block, std::free);
    return reinterpret_cast<T*>(round_up(reinterpret_cast<int64_t>(block), kAlign));
  }

 private:
  std::vector<std::unique_ptr<char, void (*)(void*)>> blocks_;
};

// The depth of a tile product over n: bf16 goes by pairs, the odd one out is paired with zero. Operand: what the
// products of a kernel multiply, float or, where there are bf16 tiles, BFloat16 (tile.h).
template <typename Operand>
int64_t depth(int64_t n) {
  return std::is_same_v<Operand, float> ? n : round_up(n, 2);
}

// Calls serve(Io, Operand) with values of the types that serve tensors of this dtype at the instruction set in use.
template <typename Serve>
void with_operand_types(at::ScalarType dtype, const Serve& serve) {
  if (dtype == at::kFloat) return serve(float(), float());
  if (has_bf16_tiles()) return serve(at::BFloat16(), at::BFloat16());
  serve(at::BFloat16(), float());
}

// to[0 .. n) = the sum of `slices` rows of n values, `stride` apart, first to last: the same bits whoever computed
// them. `to` may be the first row.
inline void add_slices(const float* from, int64_t slices, int64_t stride, int64_t n, float* to) {
  if (to != from) std::copy_n(from, n, to);
  for (int64_t slice = 1; slice < slices; ++slice) {
    const float* more = from + slice * stride;
    for (int64_t i = 0; i < n; ++i) to[i] += more[i];
  }
}

// Runs tasks 0 ... tasks - 1; whichever thread is free takes the next `run` of them. make() builds a thread's
// worker.
template <typename Make>
void run_tasks(int64_t tasks, int64_t run, const Make& make) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(tasks, at::get_num_threads());
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    auto worker = make();
    for (int64_t begin = next.fetch_add(run); begin < tasks; begin = next.fetch_add(run)) {
      for (int64_t task = begin; task < std::min(begin + run, tasks); ++task) worker.run(task);
    }
  });
}

// A worker for run_tasks whose tasks are calls of another of its functions: TasksOf<&Worker::merge>{worker}.
template <auto kTask>
struct TasksOf;

template <typename Worker, void (Worker::*kTask)(int64_t)>
struct TasksOf<kTask> {
  Worker worker;
  void run(int64_t task) { (worker.*kTask)(task); }
};

} // namespace rskernels
