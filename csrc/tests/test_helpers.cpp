// What Python cannot see: instruction-set choice, shape classes, the tile product, vector maths.
// Takes the instruction set as its argument; 77 = this processor lacks it.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/linear.h"
#include "cpu/tile.h"

namespace rskernels {
struct VectorProbe {
  void (*exp)(const float* x, float* y, int64_t n); // n: a multiple of 16
  void (*to_bf16)(const float* x, c10::BFloat16* y, int64_t n);
  void (*from_bf16)(const c10::BFloat16* x, float* y, int64_t n);
  // Vector by vector, the last one in part.
  void (*copy_floats)(const float* x, float* y, int64_t n);
  void (*copy_bf16)(const c10::BFloat16* x, c10::BFloat16* y, int64_t n);
};
} // namespace rskernels

#define RSK_SIMD_FILE "tests/vector_probe_simd.h"
#include "cpu/foreach_isa.h"

using namespace rskernels;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::vector<float> random_floats(int64_t n, float scale = 1.0f) {
  static std::mt19937 engine(0);
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> values(n);
  for (float& value : values) value = normal(engine);
  return values;
}

template <typename F>
bool throws(F f) {
  try {
    f();
  } catch (const c10::Error&) {
    return true;
  }
  return false;
}

void test_instruction_set_choice() {
  CHECK(isa_named("baseline") == Isa::baseline);
  CHECK(throws([] { isa_named("sse9"); }));
  CHECK(throws([] { checked_isa(static_cast<int>(isa_supported()) + 1); }));
  CHECK(throws([] { checked_isa(-1); }));
}

void test_shape_classes_index_the_table_without_collision() {
  std::vector<int> seen(kTableSize, 0);
  const int64_t sizes[][3] = {{64, 64, 64}, {256, 128, 512}, {4096, 768, 768}, {31, 64, 64}, {1, 2048, 2048},
      {31, 4096, 4096}, {100, 31, 64}, {4096, 768, 8}, {32768, 4096, 31}};
  for (const bool bf16 : {false, true}) {
    for (const Pass pass : {Pass::forward, Pass::grad_input, Pass::grad_weight}) {
      for (const auto& s : sizes) seen[table_index(bf16, pass, shape_class(s[0], s[1], s[2]))]++;
    }
  }
  CHECK(std::all_of(seen.begin(), seen.end(), [](int n) { return n == 1; }));
}

// c (+)= a b against double, a by rows and by columns, with strides, and nothing written beside the tile. The
// operands have no byte more than they need: what a sanitizer would see.
void test_tile_product() {
  for (const auto& [m, n, k] : {std::array<int64_t, 3>{64, 48, 32}, {1, 16, 2}, {7, 33, 14}, {196, 64, 196},
           {13, 95, 257}, {5, 3, 1}, {2, 1, 130}, {0, 16, 4}, {4, 0, 4}}) {
    const int64_t lda = k + 3, ldb = n + 5, ldc = n + 2, by_columns = m + 1;
    const auto a = random_floats(m * lda), b = random_floats(k * ldb - 5);
    std::vector<float> columns(k * by_columns - 1);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t l = 0; l < k; ++l) columns[l * by_columns + i] = a[i * lda + l];
    }
    for (const bool accumulate : {false, true}) {
      std::vector<float> c(m * ldc, 0.5f), same(c);
      tile_product(m, n, k, a.data(), lda, b.data(), ldb, c.data(), ldc, accumulate);
      tile_product_columns(m, n, k, columns.data(), by_columns, b.data(), ldb, same.data(), ldc, accumulate);
      CHECK(c == same);
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t j = 0; j < ldc; ++j) {
          double expected = j >= n || accumulate ? 0.5 : 0.0;
          for (int64_t l = 0; j < n && l < k; ++l) expected += double(a[i * lda + l]) * b[l * ldb + j];
          CHECK(std::abs(c[i * ldc + j] - expected) <= 1e-5 * std::sqrt(double(k)) + 1e-6 * std::abs(expected));
        }
      }
    }
  }
  float zeroed[2] = {1.0f, 1.0f};
  tile_product(1, 2, 0, zeroed, 1, zeroed, 2, zeroed, 2, false); // an empty sum
  CHECK(zeroed[0] == 0.0f && zeroed[1] == 0.0f);
}

void test_tile_product_bf16() {
  if (!has_bf16_tiles()) return;
  for (const auto& [m, n, k] : {std::array<int64_t, 3>{20, 32, 48}, {7, 33, 14}, {196, 80, 300}, {1, 1, 2}}) {
    const auto a = random_floats(m * k), b = random_floats(k * n);
    std::vector<at::BFloat16> left(a.begin(), a.end()), right(k * n), columns(m * k);
    for (int64_t l = 0; l < k; ++l) {
      for (int64_t j = 0; j < n; ++j) right[(l / 2 * n + j) * 2 + l % 2] = b[l * n + j];
      for (int64_t i = 0; i < m; ++i) columns[(l / 2 * m + i) * 2 + l % 2] = left[i * k + l];
    }
    std::vector<float> c(m * n), same(m * n);
    tile_product(m, n, k, left.data(), k, right.data(), n, c.data(), n, false);
    tile_product_columns(m, n, k, columns.data(), m, right.data(), n, same.data(), n, false);
    CHECK(c == same);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        double expected = 0;
        for (int64_t l = 0; l < k; ++l) {
          expected += double(left[i * k + l]) * double(at::BFloat16(b[l * n + j]));
        }
        CHECK(std::abs(c[i * n + j] - expected) < 1e-4 * std::sqrt(double(k)));
      }
    }
  }
}

void test_exponential() {
  const auto& probe = RSK_AT_ISA_LEVEL(kVectorProbe);
  auto x = random_floats(4096, 20.0f);
  std::transform(x.begin(), x.end(), x.begin(), [](float v) { return std::min(v, 80.0f); });
  std::vector<float> y(x.size());
  probe.exp(x.data(), y.data(), static_cast<int64_t>(x.size()));
  for (size_t i = 0; i < x.size(); ++i) {
    // Error of the argument's own rounding (x log2 e) plus the polynomial's; tiny results may flush to zero.
    const double expected = std::exp(double(x[i]));
    CHECK(std::abs(y[i] - expected) <= expected * (3e-7 + 1.2e-7 * std::abs(x[i])) + 1.2e-38);
  }
  std::vector<float> special(16, -kInf), out(16);
  special[1] = kNan;
  special[2] = 0.0f;
  special[3] = -1e30f;
  probe.exp(special.data(), out.data(), 16);
  CHECK(out[0] == 0.0f && std::isnan(out[1]) && std::abs(out[2] - 1.0f) < 1e-6f && out[3] == 0.0f);
}

void test_bf16_conversion_rounds_as_torch_does() {
  const auto& probe = RSK_AT_ISA_LEVEL(kVectorProbe);
  std::vector<float> x(1 << 16);
  for (size_t i = 0; i < x.size(); ++i) {
    const uint32_t bits = static_cast<uint32_t>(i) << 16 | static_cast<uint32_t>(i * 40503u & 0xffffu);
    std::memcpy(&x[i], &bits, sizeof(bits));
    // vcvtneps2bf16 takes denormals for zero; the kernels never meet one that matters.
    if (std::abs(x[i]) < std::numeric_limits<float>::min()) x[i] = 0.0f;
  }
  x[5] = 1.00390625f; // half way between two bf16 numbers: to even
  x[6] = 1.01171875f;
  std::vector<at::BFloat16> y(x.size());
  std::vector<float> back(x.size());
  probe.to_bf16(x.data(), y.data(), static_cast<int64_t>(x.size()));
  probe.from_bf16(y.data(), back.data(), static_cast<int64_t>(y.size()));
  for (size_t i = 0; i < x.size(); ++i) {
    const float expected = at::BFloat16(x[i]);
    CHECK(std::isnan(expected) ? std::isnan(back[i]) : back[i] == expected);
  }
}

void test_rows_of_any_length_write_nothing_beyond_their_end() {
  const auto& probe = RSK_AT_ISA_LEVEL(kVectorProbe);
  for (int64_t n = 0; n < 70; ++n) {
    const auto x = random_floats(n + 1);
    std::vector<at::BFloat16> y(n + 1, at::BFloat16(7.0f));
    probe.to_bf16(x.data(), y.data(), n);
    for (int64_t i = 0; i < n; ++i) CHECK(y[i] == at::BFloat16(x[i]));
    CHECK(y[n] == at::BFloat16(7.0f));
  }
}

// The operands have no byte more than they need: what a sanitizer would see.
void test_parts_of_vectors_touch_nothing_else() {
  const auto& probe = RSK_AT_ISA_LEVEL(kVectorProbe);
  for (int64_t n = 1; n < 35; ++n) {
    const auto x = random_floats(n);
    const std::vector<at::BFloat16> bf16(x.begin(), x.end());
    std::vector<float> y(n + 1, 7.0f);
    std::vector<at::BFloat16> z(n + 1, at::BFloat16(7.0f));
    probe.copy_floats(x.data(), y.data(), n);
    probe.copy_bf16(bf16.data(), z.data(), n);
    for (int64_t i = 0; i < n; ++i) CHECK(y[i] == x[i] && z[i] == bf16[i]);
    CHECK(y[n] == 7.0f && z[n] == at::BFloat16(7.0f));
  }
}

} // namespace

int main(int argc, char** argv) {
  CHECK(argc == 2);
  try {
    set_isa_level(std::string(argv[1]));
  } catch (const c10::Error&) {
    std::printf("this processor has no %s\n", argv[1]);
    return 77;
  }
  test_instruction_set_choice();
  test_shape_classes_index_the_table_without_collision();
  test_tile_product();
  test_tile_product_bf16();
  test_exponential();
  test_bf16_conversion_rounds_as_torch_does();
  test_rows_of_any_length_write_nothing_beyond_their_end();
  test_parts_of_vectors_touch_nothing_else();
  std::printf("ok at %s\n", argv[1]);
  return 0;
}
