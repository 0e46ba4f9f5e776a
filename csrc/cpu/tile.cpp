// The tile product at every instruction set.
#include "tile.h"

#include <algorithm>

#define RSK_SIMD_FILE "product_simd.h"
#include "foreach_isa.h"

namespace rskernels {

const ProductKernels& product_kernels() {
  return RSK_AT_ISA_LEVEL(kProductKernels);
}

} // namespace rskernels
