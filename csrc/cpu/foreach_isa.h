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

#include "constants.h"
#include "isa.h"

#if RSK_HAS_TARGET_SECTIONS
#include <immintrin.h>
#endif

// What follows is compiled for the processors that have these instructions.
#define RSK_PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(__clang__)
#define RSK_BEGIN_TARGET(features) \
  RSK_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define RSK_END_TARGET RSK_PRAGMA(clang attribute pop)
#else
#define RSK_BEGIN_TARGET(features) RSK_PRAGMA(GCC push_options) RSK_PRAGMA(GCC target(features))
#define RSK_END_TARGET RSK_PRAGMA(GCC pop_options)
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
RSK_BEGIN_TARGET("avx2,fma")
namespace rskernels::avx2 {
#include "vec.h"

#include "operands_simd.h"

#include RSK_SIMD_FILE
} // namespace rskernels::avx2
RSK_END_TARGET
#undef RSK_LEVEL

#define RSK_LEVEL 2
RSK_BEGIN_TARGET("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")
namespace rskernels::avx512 {
#include "vec.h"

#include "operands_simd.h"

#include RSK_SIMD_FILE
} // namespace rskernels::avx512
RSK_END_TARGET
#undef RSK_LEVEL

#define RSK_LEVEL 3
RSK_BEGIN_TARGET("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
namespace rskernels::avx512_bf16 {
#include "vec.h"

#include "operands_simd.h"

#include RSK_SIMD_FILE
} // namespace rskernels::avx512_bf16
RSK_END_TARGET
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
