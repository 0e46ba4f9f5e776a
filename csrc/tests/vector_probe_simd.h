// Functions of vec.h as plain pointers, one set per instruction set (included by foreach_isa.h).

inline void probe_exp(const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(y + i, exp(load(x + i)));
}

template <typename Io>
inline void probe_some(const Io* x, Io* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store_some(y + i, load_some(x + i, n - i), n - i);
}

inline constexpr VectorProbe kVectorProbe = {&probe_exp, &copy_row<float, c10::BFloat16>,
    &copy_row<c10::BFloat16, float>, &probe_some<float>, &probe_some<c10::BFloat16>};
