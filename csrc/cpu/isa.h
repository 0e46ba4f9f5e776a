// The instruction set our kernels use: chosen when they run, never when they are compiled.
#pragma once

#include <c10/util/Exception.h>

#include <atomic>
#include <cstdlib>
#include <string>

// Can one source file be compiled for several instruction sets? Elsewhere kernels are compiled for what the
// compiler was told to assume, and that is the level `baseline`.
#if defined(__x86_64__) && defined(__GNUC__)
#define RSK_HAS_TARGET_SECTIONS 1
#else
#define RSK_HAS_TARGET_SECTIONS 0
#endif

namespace rskernels {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

inline const char* isa_name(Isa level) {
  constexpr const char* names[] = {"baseline", "avx2", "avx512", "avx512_bf16"};
  return names[static_cast<int>(level)];
}

// The best level that this processor has and this build has code for.
inline Isa isa_supported() {
#if RSK_HAS_TARGET_SECTIONS
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::avx512_bf16;
  if (avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::baseline;
}

inline Isa checked_isa(int level) {
  const Isa best = isa_supported();
  TORCH_CHECK_VALUE(level >= 0 && level <= static_cast<int>(best), "instruction set level ", level,
      " does not exist on this processor, which has 0 (baseline) to ", static_cast<int>(best), " (",
      isa_name(best), ")");
  return static_cast<Isa>(level);
}

inline Isa isa_named(const std::string& name) {
  for (int level = 0; level < 4; ++level) {
    if (name == isa_name(static_cast<Isa>(level))) return checked_isa(level);
  }
  TORCH_CHECK_VALUE(
      false, "instruction set is '", name, "' (RSKERNELS_ISA), expected baseline, avx2, avx512 or avx512_bf16");
}

// RSKERNELS_ISA=baseline|avx2|avx512|avx512_bf16 lowers the level, for tests and for bug reports.
inline Isa initial_isa() {
  const char* forced = std::getenv("RSKERNELS_ISA");
  if (forced == nullptr || *forced == '\0') return isa_supported();
  std::string name(forced);
  for (char& letter : name) letter = letter >= 'A' && letter <= 'Z' ? letter - 'A' + 'a' : letter;
  return isa_named(name);
}

inline std::atomic<Isa>& isa_in_use() {
  static std::atomic<Isa> level{initial_isa()};
  return level;
}

inline Isa isa_level() {
  return isa_in_use().load(std::memory_order_relaxed);
}

inline void set_isa_level(int level) {
  isa_in_use().store(checked_isa(level), std::memory_order_relaxed);
}

inline void set_isa_level(const std::string& name) {
  isa_in_use().store(isa_named(name), std::memory_order_relaxed);
}

} // namespace rskernels
