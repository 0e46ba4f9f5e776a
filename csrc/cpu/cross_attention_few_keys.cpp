// cross_attention of many queries on few keys (SAM's image on the tokens, its tokens on each other), both passes.
//
// The keys and values of all heads stay in the first-level cache. A vector of queries meets all keys of a head in
// registers: its rows are read, transposed, multiplied, and the result goes back the same way; nothing of a query
// is packed or stored in between. Heads are innermost, so that token rows are read and written whole.
//
// Determinism: dk and dv are summed over parts of the queries, whose sums are added in order; the cut depends on
// the shape alone.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>

#include "cross_attention.h"

namespace rskernels::cross {
namespace {

constexpr int64_t kFewKeys = kMostFewKeys;

// At most kLanes queries of one head, all its keys. Packed keys carry the factor scale * log2(e).
template <typename Io>
struct Block {
  int64_t count, dim, keys, row; // queries, head dim, keys, values of a packed row
  bool more;                     // a whole block of queries follows
  const float *k, *v;
  const Io *q, *grad;
  int64_t q_stride, grad_stride;
  Io *out, *dq; // dq may be null, as dk and dv
  int64_t out_stride, dq_stride;
  float *lse, *dk, *dv;
};

template <typename Io>
struct FewKeysKernels {
  int64_t lanes;
  void (*forward)(const Block<Io>& block);
  void (*backward)(const Block<Io>& block);
  void (*pack_rows)(
      const Io* from, int64_t from_stride, int64_t rows, int64_t dim, float* to, int64_t to_stride);
  void (*write_rows)(const float* from, int64_t from_stride, int64_t rows, int64_t dim, float factor, Io* to,
      int64_t to_stride);
};

} // namespace
} // namespace rskernels::cross

#define RSK_SIMD_FILE "cross_attention_few_keys_simd.h"
#include "foreach_isa.h"

namespace rskernels::cross {
namespace {

// Queries are cut into parts, in backward each with its own sums of dk and dv.
constexpr int64_t kQueriesOfPart = 256, kEnoughTasks = 64;
constexpr int64_t kValuesOfMerge = 1 << 16; // that one thread adds up, at least: starting another costs as much

int64_t query_parts(const Layout& layout) {
  const int64_t most = (layout.queries + kQueriesOfPart - 1) / kQueriesOfPart;
  return std::clamp<int64_t>(kEnoughTasks / layout.batch, 1, most);
}

template <typename Io>
class Worker {
 public:
  Worker(const Layout& layout, const at::Tensor& k, const at::Tensor& v)
      : layout_(layout), simd_(RSK_AT_ISA_LEVEL(cross_simd::kFewKeysKernels<Io>)), k_(k), v_(v) {
    for (float** rows : {&k_rows_, &v_rows_}) *rows = scratch_.take<float>(layout.heads * head_size());
  }

 protected:
  int64_t head_size() const { return layout_.keys * layout_.row_size; }

  // Calls `visit` with the blocks of a part of the queries, heads innermost: block, batch entry, head, query.
  template <typename Visit>
  void for_each_block(int64_t task, const Visit& visit) {
    const int64_t parts = query_parts(layout_), batch = task / parts, part = task % parts;
    load_keys(batch);
    const int64_t blocks = (layout_.queries + simd_.lanes - 1) / simd_.lanes;
    const int64_t last = blocks * (part + 1) / parts;
    for (int64_t i = blocks * part / parts; i < last; ++i) {
      for (int64_t head = 0; head < layout_.heads; ++head) {
        Block<Io> block{};
        block.count = std::min(simd_.lanes, layout_.queries - i * simd_.lanes);
        block.more = (i + 2) * simd_.lanes <= layout_.queries;
        block.dim = layout_.dim;
        block.keys = layout_.keys;
        block.row = layout_.row_size;
        block.k = k_rows_ + head * head_size();
        block.v = v_rows_ + head * head_size();
        visit(block, batch, head, i * simd_.lanes);
      }
    }
  }

  const Layout& layout_;
  const FewKeysKernels<Io>& simd_;
  Scratch scratch_;

 private:
  void load_keys(int64_t batch) {
    if (batch == loaded_) return;
    loaded_ = batch;
    const int64_t row = layout_.row_size, size = head_size();
    for (int64_t head = 0; head < layout_.heads; ++head) {
      float *keys = k_rows_ + head * size, *values = v_rows_ + head * size;
      simd_.pack_rows(k_.at(batch, head, 0), k_.stride, layout_.keys, layout_.dim, keys, row);
      simd_.pack_rows(v_.at(batch, head, 0), v_.stride, layout_.keys, layout_.dim, values, row);
      for (int64_t i = 0; i < size; ++i) keys[i] *= layout_.scale * kLog2e;
      if (layout_.drop_first) std::fill_n(values, row, 0.0f);
    }
  }

  const Rows<const Io> k_, v_;
  float *k_rows_, *v_rows_;
  int64_t loaded_ = -1;
};

template <typename Io>
class Forward : Worker<Io> {
 public:
  Forward(const Layout& layout, const Tensors& call)
      : Worker<Io>(layout, call.k, call.v), q_(call.q), out_(call.out), lse_(call.lse.data_ptr<float>()) {}

  void run(int64_t task) {
    this->for_each_block(task, [&](Block<Io>& block, int64_t batch, int64_t head, int64_t query) {
      block.q = q_.at(batch, head, query);
      block.q_stride = q_.stride;
      block.out = out_.at(batch, head, query);
      block.out_stride = out_.stride;
      block.lse = lse_ + (batch * this->layout_.heads + head) * this->layout_.queries + query;
      this->simd_.forward(block);
    });
  }

 private:
  const Rows<const Io> q_;
  const Rows<Io> out_;
  float* lse_;
};

// Sums of dk and dv (2, heads, keys, row) of every task.
struct Sums {
  at::Tensor values;
  int64_t which_size, task_size;

  Sums(const Layout& layout, bool wanted, int64_t tasks, const at::Tensor& like)
      : which_size(wanted ? layout.heads * layout.keys * layout.row_size : 0), task_size(2 * which_size) {
    values = at::empty({tasks, task_size}, like.options().dtype(at::kFloat));
  }
  float* at(int64_t task, int64_t which) const {
    return values.data_ptr<float>() + task * task_size + which * which_size;
  }
};

template <typename Io>
class Backward : Worker<Io> {
 public:
  Backward(const Layout& layout, const Gradients& call, const Sums& sums)
      : Worker<Io>(layout, call.k, call.v),
        call_(call),
        sums_(sums),
        q_(call.q),
        grad_(call.grad),
        dq_(call.dq) {}

  void run(int64_t task) {
    if (sums_.task_size > 0) std::fill_n(sums_.at(task, 0), sums_.task_size, 0.0f);
    this->for_each_block(task, [&](Block<Io>& block, int64_t batch, int64_t head, int64_t query) {
      block.q = q_.at(batch, head, query);
      block.q_stride = q_.stride;
      block.grad = grad_.at(batch, head, query);
      block.grad_stride = grad_.stride;
      block.dq = call_.wanted[0] ? dq_.at(batch, head, query) : nullptr;
      block.dq_stride = dq_.stride;
      block.dk = call_.wanted[1] ? sums_.at(task, 0) + head * this->head_size() : nullptr;
      block.dv = call_.wanted[2] ? sums_.at(task, 1) + head * this->head_size() : nullptr;
      this->simd_.backward(block);
    });
  }

 private:
  const Gradients& call_;
  const Sums& sums_;
  const Rows<const Io> q_, grad_;
  const Rows<Io> dq_;
};

// Adds up and writes dk and dv of one head, for each batch entry that has keys of its own.
template <typename Io>
void merge(const Layout& layout, const Gradients& call, const Sums& sums, int64_t head) {
  const int64_t size = layout.keys * layout.row_size;
  for (int64_t which = 0; which < 2; ++which) {
    if (!call.wanted[1 + which]) continue;
    const Rows<Io> to(which == 0 ? call.dk : call.dv);
    const int64_t batches = (which == 0 ? call.k : call.v).size(0);
    const int64_t terms = layout.batch / batches * query_parts(layout);
    for (int64_t batch = 0; batch < batches; ++batch) {
      float* sum = sums.at(batch * terms, which) + head * size;
      add_slices(sum, terms, sums.task_size, size, sum);
      if (which == 1 && layout.drop_first) std::fill_n(sum, layout.row_size, 0.0f);
      RSK_AT_ISA_LEVEL(cross_simd::kFewKeysKernels<Io>)
          .write_rows(sum, layout.row_size, layout.keys, layout.dim, which == 0 ? layout.scale : 1.0f,
              to.at(batch, head, 0), to.stride);
    }
  }
}

template <typename Io>
void forward(const Layout& layout, const Tensors& call) {
  run_tasks(layout.batch * query_parts(layout), 1, [&] { return Forward<Io>(layout, call); });
}

template <typename Io>
void backward(const Layout& layout, const Gradients& call) {
  const int64_t tasks = layout.batch * query_parts(layout);
  const Sums sums(layout, call.wanted[1] || call.wanted[2], tasks, call.q);
  run_tasks(tasks, 1, [&] { return Backward<Io>(layout, call, sums); });
  if (sums.task_size == 0) return;
  const int64_t values_of_head = tasks * sums.task_size / layout.heads;
  at::parallel_for(
      0, layout.heads, std::max<int64_t>(1, kValuesOfMerge / values_of_head), [&](int64_t begin, int64_t end) {
        for (int64_t head = begin; head < end; ++head) merge<Io>(layout, call, sums, head);
      });
}

} // namespace

void forward_of_few_keys(const Layout& layout, const Tensors& call) {
  call.q.scalar_type() == at::kFloat ? forward<float>(layout, call) : forward<at::BFloat16>(layout, call);
}

void backward_of_few_keys(const Layout& layout, const Gradients& call) {
  call.q.scalar_type() == at::kFloat ? backward<float>(layout, call) : backward<at::BFloat16>(layout, call);
}

} // namespace rskernels::cross
