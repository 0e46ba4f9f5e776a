// Between exponentials and logarithms of base e and those of base 2.
#pragma once

namespace rskernels {

constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

} // namespace rskernels
