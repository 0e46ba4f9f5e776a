// Products of small matrices (tile.h) for one instruction set: a block of c stays in registers while the depth
// runs. For files that foreach_isa.h compiles once per instruction set: like vec.h, included inside a namespace,
// without guard and without includes.
//
// bf16 goes by pairs along the depth, each in the 32 bits of a float: to everything here but the multiplication
// itself, a matrix of pairs is one of floats.

#if RSK_LEVEL >= 2
constexpr int kBlockRows = 6, kBlockVectors = 4; // 24 sums, 4 right and 1 left operand in 32 registers
#else
constexpr int kBlockRows = 6, kBlockVectors = 2; // 12, 2 and 1 in 16
#endif

// As much of the right operand as goes through the first-level cache at a time, with the left one beside it.
constexpr int64_t kDepthBlock = 64;

struct Numbers {
  static RSK_INLINE VecF left(const char* a) {
    float number;
    std::memcpy(&number, a, sizeof(number));
    return splat(number);
  }
  static RSK_INLINE VecF multiply_add(VecF a, VecF b, VecF sum) { return a * b + sum; }
};

#if RSK_LEVEL >= 3
struct Pairs {
  static RSK_INLINE VecF left(const char* a) {
    int32_t bits; // as an integer: no float must be made of two bf16 numbers
    std::memcpy(&bits, a, sizeof(bits));
    return (VecF)_mm512_set1_epi32(bits);
  }
  static RSK_INLINE VecF multiply_add(VecF a, VecF b, VecF sum) {
    return (VecF)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// What a block of c, kRows rows of kVectors vectors, is the product of. Where kWhole is false, `width` columns of
// its one vector exist.
struct Block {
  int64_t k;
  const char* a;
  int64_t a_row, a_step; // bytes from one row of c to the next, and along the depth
  const float* b;
  int64_t ldb;
  float* c;
  int64_t ldc;
  bool accumulate;
  int64_t width;
};

template <bool kWhole>
RSK_INLINE VecF load_width(const float* p, int64_t width) {
  if constexpr (kWhole) return load(p);
  return load_first(p, width);
}

template <typename Step, int kRows, int kVectors, bool kWhole>
inline void block_product(const Block& at) {
  static_assert(kWhole || kVectors == 1);
  VecF sums[kRows][kVectors];
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[i][v] = VecF{};
  }
  const char* a = at.a;
  const float* b = at.b;
  const int64_t a_row = at.a_row, a_step = at.a_step, ldb = at.ldb;
  for (int64_t l = at.k; l > 0; --l, a += a_step, b += ldb) {
    VecF right[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) right[v] = load_width<kWhole>(b + v * kLanes, at.width);
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      const VecF left = Step::left(a + i * a_row);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[i][v] = Step::multiply_add(left, right[v], sums[i][v]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* c = at.c + i * at.ldc + v * kLanes;
      // A block's own sum first: terms added one by one to a long sum all round to one side where they are alike.
      if (at.accumulate) sums[i][v] += load_width<kWhole>(c, at.width);
      if constexpr (kWhole) {
        store(c, sums[i][v]);
      } else {
        store_first(c, sums[i][v], at.width);
      }
    }
  }
}

template <typename Step, int kVectors, bool kWhole>
inline void rows_product(Block at, int64_t rows) {
  for (; rows >= kBlockRows; rows -= kBlockRows) {
    block_product<Step, kBlockRows, kVectors, kWhole>(at);
    at.a += kBlockRows * at.a_row;
    at.c += kBlockRows * at.ldc;
  }
  switch (rows) {
    case 1:
      return block_product<Step, 1, kVectors, kWhole>(at);
    case 2:
      return block_product<Step, 2, kVectors, kWhole>(at);
    case 3:
      return block_product<Step, 3, kVectors, kWhole>(at);
    case 4:
      return block_product<Step, 4, kVectors, kWhole>(at);
    case 5:
      return block_product<Step, 5, kVectors, kWhole>(at);
    default:
      return;
  }
}

template <typename Step>
inline void columns_product(const Block& at, int64_t rows, int64_t vectors) {
  switch (vectors) {
    case 1:
      return rows_product<Step, 1, true>(at, rows);
    case 2:
      return rows_product<Step, 2, true>(at, rows);
#if RSK_LEVEL >= 2
    case 3:
      return rows_product<Step, 3, true>(at, rows);
    case 4:
      return rows_product<Step, 4, true>(at, rows);
#endif
    default:
      return;
  }
}

// c (m, n) = or += a b; a's element of row i and depth l lies at a + i * a_row + l * a_step.
template <typename Step>
inline void product(int64_t m, int64_t n, int64_t k, const char* a, int64_t a_row, int64_t a_step,
    const float* b, int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  const int64_t vectors = n / kLanes, stripes = (vectors + kBlockVectors - 1) / kBlockVectors;
  for (int64_t l = 0; l == 0 || l < k; l += kDepthBlock) {
    Block at{std::min(kDepthBlock, k - l), a + l * a_step, a_row, a_step, b + l * ldb, ldb, c, ldc,
        accumulate || l > 0, n % kLanes};
    for (int64_t s = 0; s < stripes; ++s) { // as even as can be: a stripe of one vector is slow
      const int64_t width = vectors * (s + 1) / stripes - vectors * s / stripes;
      columns_product<Step>(at, m, width);
      at.b += width * kLanes;
      at.c += width * kLanes;
    }
    if (at.width > 0) rows_product<Step, 1, false>(at, m);
  }
}

#if RSK_LEVEL >= 3
inline constexpr TileProduct kPairProduct = product<Pairs>;
#else
inline constexpr TileProduct kPairProduct = nullptr;
#endif
inline constexpr ProductKernels kProductKernels = {product<Numbers>, kPairProduct};
