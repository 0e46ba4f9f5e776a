// The vector passes of dilated_aspp: operands, weights, and the epilogue. Compiled once per instruction set.

// to[pixel][channel] = from[channel][pixel], channels `plane` apart.
template <typename Io, typename Operand>
inline void image_to_rows(
    const Io* from, int64_t channels, int64_t plane, int64_t pixels, Operand* to, int64_t stride) {
  for (int64_t p = 0; p < pixels; p += kLanes) {
    for (int64_t c = 0; c < channels; c += kLanes) {
      VecF square[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        square[i] = c + i < channels ? load_some(from + (c + i) * plane + p, pixels - p) : VecF{};
      }
      transpose_square(square);
      for (int64_t i = 0; i < kLanes && p + i < pixels; ++i) {
        store_some(to + (p + i) * stride + c, square[i], channels - c);
      }
    }
  }
}

// A square of weights of kLanes outputs from n on, lanes are outputs: its rows are kLanes inputs of one tap or,
// where the taps are neighbours, kLanes taps of one input.
template <typename Io>
RSK_INLINE void load_weights(const TapSource& source, const Io* from, const Io* end, int64_t k, int64_t n,
    int64_t tap, VecF (&square)[kLanes]) {
  from += k * source.k_stride + n * source.n_stride + tap * source.tap_stride;
  if (source.n_stride == 1 && source.tap_stride != 1) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const bool inside = k + i < source.inputs && n < source.outputs;
      square[i] = inside ? load_some(from + i * source.k_stride, source.outputs - n) : VecF{};
    }
    return;
  }
  const int64_t limit = source.k_stride == 1 ? source.inputs - k : kLanes;
  for (int64_t i = 0; i < kLanes; ++i) {
    const Io* row = from + i * source.n_stride;
    const bool inside = n + i < source.outputs && k < source.inputs;
    square[i] = inside ? load_some(row, end - row < limit ? end - row : limit) : VecF{};
  }
  transpose_square(square);
}

// A vector group of outputs of TapSource into [tap][input][output]: rows of one tap, or taps of one input.
template <typename Io>
inline void pack_taps(
    const TapSource& source, const Io* from, const Io* end, float* to, int64_t to_k, int64_t to_tap) {
  const bool by_taps = source.tap_stride == 1 && source.taps > 1;
  const int64_t k_step = by_taps ? 1 : kLanes, tap_step = by_taps ? kLanes : 1;
  for (int64_t k = 0; k < source.inputs; k += k_step) {
    for (int64_t n = 0; n < 16; n += kLanes) {
      for (int64_t first = 0; first < source.taps; first += tap_step) {
        VecF square[kLanes];
        load_weights(source, from, end, k, n, first, square);
        for (int64_t i = 0; i < kLanes; ++i) {
          const int64_t input = by_taps ? k : k + i, found = by_taps ? first + i : first;
          if (input >= source.inputs || found >= source.taps) break;
          const int64_t tap = source.flip ? source.taps - 1 - found : found;
          store(to + tap * to_tap + input * to_k + n, square[i]);
        }
      }
    }
  }
}

template <typename Io>
inline void pack_taps(
    const TapSource& source, const Io* from, const Io* end, c10::BFloat16* to, int64_t to_k, int64_t to_tap) {
  const bool by_taps = source.tap_stride == 1 && source.taps > 1;
  const int64_t k_step = by_taps ? 2 : kLanes, tap_step = by_taps ? kLanes : 1;
  for (int64_t k = 0; k < source.inputs; k += k_step) {
    for (int64_t n = 0; n < 16; n += kLanes) {
      for (int64_t first = 0; first < source.taps; first += tap_step) {
        VecF even[kLanes], odd[kLanes];
        load_weights(source, from, end, k, n, first, even);
        if (by_taps) load_weights(source, from, end, k + 1, n, first, odd);
        for (int64_t i = 0; i < kLanes; i += by_taps ? 1 : 2) {
          const int64_t input = by_taps ? k : k + i, found = by_taps ? first + i : first;
          if (input >= source.inputs || found >= source.taps) break;
          const int64_t tap = source.flip ? source.taps - 1 - found : found;
          store_pairs(to + tap * to_tap + input * to_k + 2 * n, even[i], by_taps ? odd[i] : even[i + 1]);
        }
      }
    }
  }
}

// x Phi(x). Phi(-|x|) by Abramowitz and Stegun 7.1.26: off by less than 1e-7.
RSK_INLINE VecF gelu_erf(VecF x) {
  const VecF size = x < 0.0f ? -x : x;
  const VecF t = 1.0f / (1.0f + 0.3275911f * 0.70710678f * size);
  VecF p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const VecF tail = 0.5f * p * t * exp(-0.5f * size * size);
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

// x / (1 + exp(-2u)) = x (1 + tanh u) / 2
RSK_INLINE VecF gelu_by_tanh(VecF x) {
  const VecF power = (x + 0.044715f * x * x * x) * (-2.0f * 0.79788456f * kLog2e);
  return x / (1.0f + exp2<5>(power > 126.0f ? splat(126.0f) : power)); // keeps NaN
}

template <Activation kActivation>
RSK_INLINE VecF activated(VecF x) {
  if constexpr (kActivation == Activation::gelu) return gelu_erf(x);
  if constexpr (kActivation == Activation::gelu_tanh) return gelu_by_tanh(x);
  if constexpr (kActivation == Activation::relu) return x < 0.0f ? VecF{} : x; // keeps NaN
  return x;
}

template <Activation kActivation, typename Io, typename To>
inline void finish_rows(const Finish& finish, const float* sums, To* out, Io* kept) {
  for (int64_t p = 0; p < finish.pixels; ++p) {
    for (int64_t c = 0; c < finish.channels; c += kLanes) {
      VecF x = load(sums + p * finish.sums_stride + c);
      if (finish.gain != nullptr) x *= load(finish.gain + c);
      x += load(finish.offset + c);
      const int64_t n = finish.channels - c;
      if (kept != nullptr) store_some(kept + p * finish.kept_stride + c, x, n);
      store_some(out + p * finish.out_stride + c, activated<kActivation>(x), n);
    }
  }
}

template <typename Io, typename To>
inline void finish_map(const Finish& finish, const float* sums, To* out, Io* kept) {
  switch (finish.activation) {
    case Activation::gelu:
      return finish_rows<Activation::gelu>(finish, sums, out, kept);
    case Activation::gelu_tanh:
      return finish_rows<Activation::gelu_tanh>(finish, sums, out, kept);
    case Activation::relu:
      return finish_rows<Activation::relu>(finish, sums, out, kept);
    case Activation::none:
      return finish_rows<Activation::none>(finish, sums, out, kept);
  }
}

// to[channel][tap] = from[tap][channel]: the weights' gradient as PyTorch keeps it.
template <typename Io>
inline void interleave_taps(const float* from, int64_t tap_stride, int64_t channels, Io* to) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    float values[kLanes * 9 + kLanes];
    for (int64_t first = 0; first < 9; first += kLanes) {
      VecF square[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        square[i] = first + i < 9 ? load_some(from + (first + i) * tap_stride + c, channels - c) : VecF{};
      }
      transpose_square(square);
      for (int64_t i = 0; i < kLanes; ++i) {
        for (int64_t t = 0; t < kLanes && first + t < 9; ++t) values[i * 9 + first + t] = square[i][t];
      }
    }
    const int64_t n = channels - c < kLanes ? channels - c : kLanes;
    copy_row<float, Io>(values, to + c * 9, n * 9);
  }
}

template <typename Io, typename Operand>
inline constexpr AsppKernels<Io, Operand> kAsppKernels = {
    image_to_rows<Io, Operand>,
    copy_row<Io, Operand>,
    pack_taps<Io>,
    finish_map<Io, Io>,
    finish_map<Io, Operand>,
    pair_rows,
    interleave_taps<Io>,
};
