// Compiles RSK_SIMD_FILE once per instruction set, each time inside a namespace of that set's name:
//
//   #define RSK_SIMD_FILE "my_kernels_simd.h"
//   #include "foreach_isa.h"          // -> rskernels::baseline::..., rskernels::avx2::..., ...
//
// The file may use everything in vec.h and operands_simd.h and must not include anything: headers come
// before, outside the target sections, so that no shared inline function is compiled for an instruction set the
// processor may lack. Lambdas do not inherit the target section: use functions.
//
// One file, one inclusion per translation unit (namespaces would collide otherwise).

#if !defined(RSK_SIMD_FILE)
#error "define RSK_SIMD_FILE before including foreach_isa.h"
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include <c10/util/BFloat16.h>

#include "isa.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define RSK_HAS_TARGET_SECTIONS 1
#include <immintrin.h>
#else
#define RSK_HAS_TARGET_SECTIONS 0
#endif

#define RSK_INLINE inline __attribute__((always_inline))

// 64-byte vectors are only passed to functions that are inlined: the ABI note does not concern us.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"

#define RSK_LEVEL 0
namespace rskernels::baseline {
#include "vec.h"

#include "operands_simd.h"

#include RSK_SIMD_FILE
} // namespace rskernels::baseline
#undef RSK_LEVEL

#if RSK_HAS_TARGET_SECTIONS

#define RSK_LEVEL 1
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace rskernels::avx2 {
#include "vec.h"

#include "operands_simd.h"

#include RSK_SIMD_FILE
} // namespace rskernels::avx2
#pragma GCC pop_options
#undef RSK_LEVEL

#define RSK_LEVEL 2
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")
namespace rskernels::avx512 {
#include "vec.h"

#include "operands_simd.h"

#include RSK_SIMD_FILE
} // namespace rskernels::avx512
#pragma GCC pop_options
#undef RSK_LEVEL

#define RSK_LEVEL 3
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
namespace rskernels::avx512_bf16 {
#include "vec.h"

#include "operands_simd.h"

#include RSK_SIMD_FILE
} // namespace rskernels::avx512_bf16
#pragma GCC pop_options
#undef RSK_LEVEL

// The object of that name at the level in use.
#define RSK_AT_ISA_LEVEL(...)                                                                        \
  (::rskernels::isa_level() == ::rskernels::Isa::avx512_bf16 ? ::rskernels::avx512_bf16::__VA_ARGS__ \
      : ::rskernels::isa_level() == ::rskernels::Isa::avx512 ? ::rskernels::avx512::__VA_ARGS__      \
      : ::rskernels::isa_level() == ::rskernels::Isa::avx2   ? ::rskernels::avx2::__VA_ARGS__        \
                                                             : ::rskernels::baseline::__VA_ARGS__)
#else
#define RSK_AT_ISA_LEVEL(...) (::rskernels::baseline::__VA_ARGS__)
#endif

#pragma GCC diagnostic pop
#undef RSK_SIMD_FILE
