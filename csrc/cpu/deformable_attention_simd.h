// The vector passes of deformable_attention, compiled once per instruction set by foreach_isa.h.

typedef int32_t LooseI __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

RSK_INLINE VecI load_ints(const int32_t* p) {
  return *reinterpret_cast<const LooseI*>(p);
}

RSK_INLINE void store_ints(int32_t* p, VecI x) {
  *reinterpret_cast<LooseI*>(p) = x;
}

// Every second lane of 2 * kLanes neighbours, from the first (0) or the second (1) on.
template <int kOdd, int... kLane>
RSK_INLINE VecF every_second(VecF a, VecF b, std::integer_sequence<int, kLane...>) {
  return shuffle(a, b, std::integer_sequence<int, (2 * kLane + kOdd)...>());
}

// Its inverse: the first (0) or second (1) half of a[0], b[0], a[1], b[1], ...
template <int kHalf, int... kLane>
RSK_INLINE VecF interleaved(VecF a, VecF b, std::integer_sequence<int, kLane...>) {
  return shuffle(
      a, b, std::integer_sequence<int, ((kLane & 1) * kLanes + (kLane >> 1) + kHalf * (kLanes / 2))...>());
}

// A few neighbours: too few for a call of memcpy to pay.
inline void copy_few(const float* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  for (; i + 4 <= n; i += 4) std::memcpy(to + i, from + i, 4 * sizeof(float));
  for (; i < n; ++i) to[i] = from[i];
}

// One head's rows lie far apart, where no processor fetches ahead by itself.
constexpr int64_t kRowsAhead = 8;

template <typename Io>
inline void pack_rows(const Io* from, int64_t stride, int64_t rows, int64_t dim, Io* to, int64_t row) {
  for (int64_t r = 0; r < rows; ++r, from += stride, to += row) {
    int64_t c = 0;
    for (; c + kLanes <= dim; c += kLanes) {
      __builtin_prefetch(from + kRowsAhead * stride + c);
      std::memcpy(to + c, from + c, kLanes * sizeof(Io));
    }
    for (; c < dim; ++c) to[c] = from[c];
    for (; c < row; ++c) to[c] = Io(0);
  }
}

// `to` is zero beyond dim, and stays so.
template <typename Io>
inline void widen_rows(const Io* from, int64_t stride, int64_t rows, int64_t dim, float* to, int64_t row) {
  for (int64_t r = 0; r < rows; ++r) {
    int64_t c = 0;
    for (; c + kLanes <= dim; c += kLanes) {
      __builtin_prefetch(from + (r + kRowsAhead) * stride + c);
      store(to + r * row + c, load(from + r * stride + c));
    }
    for (; c < dim; ++c) to[r * row + c] = static_cast<float>(from[r * stride + c]);
  }
}

template <typename Io>
inline void narrow_rows(const float* from, int64_t row, int64_t rows, int64_t dim, Io* to, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    int64_t c = 0;
    for (; c + kLanes <= dim; c += kLanes) store(to + r * stride + c, load(from + r * row + c));
    for (; c < dim; ++c) to[r * stride + c] = static_cast<Io>(from[r * row + c]);
  }
}

inline void add(const float* from, float* to, int64_t n) { // n: whole vectors
  for (int64_t i = 0; i < n; i += kLanes) store(to + i, load(to + i) + load(from + i));
}

// One coordinate: the pixel at or before it, and how far behind that pixel's centre it lies. Everything more than
// a pixel outside is alike, so it is moved near first: the conversion to int then cannot overflow. A coordinate
// that is no finite number ends up outside, with NaN for its fraction.
struct Coordinate {
  VecI pixel;
  VecF fraction;
};

RSK_INLINE Coordinate coordinate(VecF location, VecF size) {
  const VecF position = location * size - 0.5f;
  VecF near = position > -2.0f ? position : splat(-2.0f); // NaN, too
  near = near < size + 1.0f ? near : size + 1.0f;
  VecI pixel = __builtin_convertvector(near, VecI);
  pixel += (VecI)(__builtin_convertvector(pixel, VecF) > near); // towards zero -> down
  return {pixel, near - __builtin_convertvector(pixel, VecF) + (position - position)};
}

// Corners, fractions and shares of samples.
inline void place(const Samples& samples, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const VecF pairs = load(samples.locations + 2 * i), more = load(samples.locations + 2 * i + kLanes);
    const VecF widths = load(samples.width + i), heights = load(samples.height + i);
    const Coordinate x = coordinate(every_second<0>(pairs, more, EveryLane()), widths);
    const Coordinate y = coordinate(every_second<1>(pairs, more, EveryLane()), heights);
    const VecI width = __builtin_convertvector(widths, VecI), height = __builtin_convertvector(heights, VecI);
    const VecI left = (x.pixel >= 0) & (x.pixel < width), right = (x.pixel >= -1) & (x.pixel < width - 1);
    const VecI top = (y.pixel >= 0) & (y.pixel < height), bottom = (y.pixel >= -1) & (y.pixel < height - 1);
    const VecI pixel = load_ints(samples.first + i) + y.pixel * width + x.pixel;
    const VecI outside = pixel - pixel + samples.outside;
    store_ints(samples.corner[0] + i, (top & left) ? pixel : outside);
    store_ints(samples.corner[1] + i, (top & right) ? pixel + 1 : outside);
    store_ints(samples.corner[2] + i, (bottom & left) ? pixel + width : outside);
    store_ints(samples.corner[3] + i, (bottom & right) ? pixel + width + 1 : outside);
    const VecF nowhere = x.fraction * 0.0f + y.fraction * 0.0f; // NaN in one coordinate spoils both
    const VecF across = x.fraction + nowhere, down = y.fraction + nowhere, weight = load(samples.weights + i);
    store(samples.across + i, across);
    store(samples.down + i, down);
    store(samples.share[0] + i, weight * (1.0f - across) * (1.0f - down));
    store(samples.share[1] + i, weight * across * (1.0f - down));
    store(samples.share[2] + i, weight * (1.0f - across) * down);
    store(samples.share[3] + i, weight * across * down);
  }
}

// Calls block<kVectors>(channel, ...) for the channels of a row, four vectors at a time, then two, then one.
#define RSK_FOR_CHANNELS(BLOCK, ...)                                                  \
  do {                                                                                \
    int64_t channel = 0;                                                              \
    for (; channel + 4 * kLanes <= row; channel += 4 * kLanes) BLOCK(4)(__VA_ARGS__); \
    if (channel + 2 * kLanes <= row) {                                                \
      BLOCK(2)(__VA_ARGS__);                                                          \
      channel += 2 * kLanes;                                                          \
    }                                                                                 \
    if (channel < row) BLOCK(1)(__VA_ARGS__);                                         \
  } while (false)

// Two sums, so that no addition waits for the one before it.
template <int kVectors, typename Io>
RSK_INLINE void gather_block(
    const Io* maps, int64_t row, const Samples& samples, int64_t begin, int64_t end, float* out) {
  const int32_t *upper_left = samples.corner[0], *upper_right = samples.corner[1];
  const int32_t *lower_left = samples.corner[2], *lower_right = samples.corner[3];
  const float *share0 = samples.share[0], *share1 = samples.share[1];
  const float *share2 = samples.share[2], *share3 = samples.share[3];
  VecF left[kVectors] = {}, right[kVectors] = {};
  for (int64_t i = begin; i < end; ++i) {
    const Io *a = maps + upper_left[i] * row, *b = maps + upper_right[i] * row;
    const Io *c = maps + lower_left[i] * row, *d = maps + lower_right[i] * row;
    for (int v = 0; v < kVectors; ++v) {
      left[v] += share0[i] * load(a + v * kLanes);
      right[v] += share1[i] * load(b + v * kLanes);
      left[v] += share2[i] * load(c + v * kLanes);
      right[v] += share3[i] * load(d + v * kLanes);
    }
  }
  for (int v = 0; v < kVectors; ++v) store(out + v * kLanes, left[v] + right[v]);
}

// out = the samples begin ... end of maps, weighted
template <typename Io>
inline void gather(
    const Io* maps, int64_t row, const Samples& samples, int64_t begin, int64_t end, float* out) {
#define RSK_GATHER(VECTORS) gather_block<VECTORS>
  RSK_FOR_CHANNELS(RSK_GATHER, maps + channel, row, samples, begin, end, out + channel);
#undef RSK_GATHER
}

template <int kVectors>
RSK_INLINE void scatter_block(
    const float* grad, const Samples& samples, int64_t begin, int64_t end, float* maps, int64_t row) {
  VecF g[kVectors];
  for (int v = 0; v < kVectors; ++v) g[v] = load(grad + v * kLanes);
  for (int64_t i = begin; i < end; ++i) {
    for (int k = 0; k < 4; ++k) {
      float* to = maps + samples.corner[k][i] * row;
      const float share = samples.share[k][i];
      for (int v = 0; v < kVectors; ++v) store(to + v * kLanes, load(to + v * kLanes) + share * g[v]);
    }
  }
}

// maps += the gradient of what gather made of them
inline void scatter(
    const float* grad, const Samples& samples, int64_t begin, int64_t end, float* maps, int64_t row) {
#define RSK_SCATTER(VECTORS) scatter_block<VECTORS>
  RSK_FOR_CHANNELS(RSK_SCATTER, grad + channel, samples, begin, end, maps + channel, row);
#undef RSK_SCATTER
}

#undef RSK_FOR_CHANNELS

// Products of corner rows with the gradients of the samples' queries, kLanes samples. kVectors 0: any row.
template <int kVectors, typename Io>
RSK_INLINE VecF corner_products(
    const Io* maps, const float* grads, int64_t row, const int32_t* corner, const int32_t* query) {
  VecF sums[kLanes];
  const int64_t end = kVectors > 0 ? kVectors * kLanes : row;
#pragma GCC unroll 16
  for (int lane = 0; lane < kLanes; ++lane) {
    const Io* values = maps + corner[lane] * row;
    const float* grad = grads + query[lane] * row;
    VecF sum = load(grad) * load(values);
    for (int64_t c = kLanes; c < end; c += kLanes) sum += load(grad + c) * load(values + c);
    sums[lane] = sum;
  }
  return sum_each(sums);
}

template <int kVectors, typename Io>
inline void differentiate_rows(const Io* maps, const float* grads, int64_t row, const Samples& samples,
    int64_t count, float* grad_locations, float* grad_weights) {
  for (int64_t i = 0; i < count; i += kLanes) {
    VecF product[4];
    for (int k = 0; k < 4; ++k) {
      product[k] = corner_products<kVectors>(maps, grads, row, samples.corner[k] + i, samples.query + i);
    }
    const VecF across = load(samples.across + i), down = load(samples.down + i);
    const VecF weight = load(samples.weights + i);
    const VecF upper = product[1] - product[0], lower = product[3] - product[2];
    const VecF top = product[0] + across * upper, bottom = product[2] + across * lower;
    store(grad_weights + i, top + down * (bottom - top));
    const VecF x = weight * load(samples.width + i) * (upper + down * (lower - upper));
    const VecF y = weight * load(samples.height + i) * (bottom - top);
    store(grad_locations + 2 * i, interleaved<0>(x, y, EveryLane()));
    store(grad_locations + 2 * i + kLanes, interleaved<1>(x, y, EveryLane()));
  }
}

// Gradients of the samples' locations and weights. grads: a row for each query at hand.
template <typename Io>
inline void differentiate(const Io* maps, const float* grads, int64_t row, const Samples& samples,
    int64_t count, float* grad_locations, float* grad_weights) {
  const auto rows = row == kLanes       ? differentiate_rows<1, Io>
                    : row == 2 * kLanes ? differentiate_rows<2, Io>
                    : row == 4 * kLanes ? differentiate_rows<4, Io>
                                        : differentiate_rows<0, Io>;
  rows(maps, grads, row, samples, count, grad_locations, grad_weights);
}

template <typename Io>
inline constexpr DeformableKernels<Io> kDeformableKernels = {
    pack_rows<Io>,
    widen_rows<Io>,
    narrow_rows<Io>,
    copy_few,
    place,
    gather<Io>,
    scatter,
    differentiate<Io>,
    add,
};
