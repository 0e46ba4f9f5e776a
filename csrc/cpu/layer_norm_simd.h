// layer_norm, rows of contiguous channels: statistics and sums in fp32, any of fp32 and bf16 in memory. For
// foreach_isa.h: no guard, no includes.
template <typename X>
RSK_INLINE float row_mean(const X* x, int64_t dim) {
  VecF even{}, odd{};
  int64_t i = 0;
  for (; i + 2 * kLanes <= dim; i += 2 * kLanes) {
    even += load(x + i);
    odd += load(x + i + kLanes);
  }
  for (; i + kLanes <= dim; i += kLanes) even += load(x + i);
  float rest = 0;
  for (; i < dim; ++i) rest += static_cast<float>(x[i]);
  return (sum_lanes(even + odd) + rest) / static_cast<float>(dim);
}

// The mean is first + shift: where it is large, `first` is off by its rounding, and `shift` says by how much.
struct Moments {
  float first, shift, variance;
};

// From the distances to a first mean: a second look at the row, which the cache holds.
template <typename X>
RSK_INLINE Moments row_moments(const X* x, int64_t dim) {
  const float mean = row_mean(x, dim);
  VecF even{}, odd{}, off{};
  int64_t i = 0;
  for (; i + 2 * kLanes <= dim; i += 2 * kLanes) {
    const VecF a = load(x + i) - mean, b = load(x + i + kLanes) - mean;
    even += a * a;
    odd += b * b;
    off += a + b;
  }
  for (; i + kLanes <= dim; i += kLanes) {
    const VecF a = load(x + i) - mean;
    even += a * a;
    off += a;
  }
  float rest = 0, rest_off = 0;
  for (; i < dim; ++i) {
    const float a = static_cast<float>(x[i]) - mean;
    rest += a * a;
    rest_off += a;
  }
  const float count = static_cast<float>(dim), shift = (sum_lanes(off) + rest_off) / count;
  const float variance = (sum_lanes(even + odd) + rest) / count - shift * shift;
  return {mean, shift, variance < 0 ? 0.0f : variance};
}

template <typename X, typename Y>
void norm_rows(const X* x, const float* weight, const float* bias, Y* y, float* means, float* rstds,
    int64_t rows, int64_t dim, float eps) {
  for (int64_t row = 0; row < rows; ++row, x += dim, y += dim) {
    const Moments moments = row_moments(x, dim);
    const float first = moments.first, shift = moments.shift;
    const float rstd = 1.0f / std::sqrt(moments.variance + eps);
    means[row] = first + shift;
    rstds[row] = rstd;
    int64_t i = 0;
    for (; i + kLanes <= dim; i += kLanes) {
      store(y + i, (load(x + i) - first - shift) * rstd * load(weight + i) + load(bias + i));
    }
    for (; i < dim; ++i) {
      y[i] = static_cast<Y>((static_cast<float>(x[i]) - first - shift) * rstd * weight[i] + bias[i]);
    }
  }
}

// With n = (x - mean) rstd and g = grad weight:  dx = rstd (g - mean(g) - n mean(g n)),
// dweight += grad n,  dbias += grad.  A null pointer: not wanted.
template <typename X, typename Y>
void norm_rows_backward(const Y* grad, const X* x, const float* weight, const float* means, const float* rstds,
    X* dx, float* dweight, float* dbias, int64_t rows, int64_t dim) {
  for (int64_t row = 0; row < rows; ++row, x += dim, grad += dim) {
    const float mean = means[row], rstd = rstds[row];
    const int64_t whole = dim / kLanes * kLanes;
    if (dx != nullptr) {
      VecF sum{}, sum_n{};
      for (int64_t i = 0; i < whole; i += kLanes) {
        const VecF g = load(grad + i) * load(weight + i);
        sum += g;
        sum_n += g * ((load(x + i) - mean) * rstd);
      }
      float rest = 0, rest_n = 0;
      for (int64_t i = whole; i < dim; ++i) {
        const float g = static_cast<float>(grad[i]) * weight[i];
        rest += g;
        rest_n += g * ((static_cast<float>(x[i]) - mean) * rstd);
      }
      const float mean_g = (sum_lanes(sum) + rest) / static_cast<float>(dim);
      const float mean_gn = (sum_lanes(sum_n) + rest_n) / static_cast<float>(dim);
      for (int64_t i = 0; i < whole; i += kLanes) {
        const VecF n = (load(x + i) - mean) * rstd;
        store(dx + i, (load(grad + i) * load(weight + i) - mean_g - n * mean_gn) * rstd);
      }
      for (int64_t i = whole; i < dim; ++i) {
        const float n = (static_cast<float>(x[i]) - mean) * rstd;
        dx[i] = static_cast<X>((static_cast<float>(grad[i]) * weight[i] - mean_g - n * mean_gn) * rstd);
      }
      dx += dim;
    }
    if (dweight != nullptr) {
      for (int64_t i = 0; i < whole; i += kLanes) {
        const VecF g = load(grad + i);
        store(dweight + i, load(dweight + i) + g * ((load(x + i) - mean) * rstd));
        store(dbias + i, load(dbias + i) + g);
      }
      for (int64_t i = whole; i < dim; ++i) {
        const float g = static_cast<float>(grad[i]);
        dweight[i] += g * ((static_cast<float>(x[i]) - mean) * rstd);
        dbias[i] += g;
      }
    }
  }
}

template <typename X, typename Y>
inline constexpr NormKernels<X, Y> kNormKernels = {norm_rows<X, Y>, norm_rows_backward<X, Y>};
