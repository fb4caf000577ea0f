// Which instruction set the inner loops run in.
#include "loops.h"

#include <cstdlib>
#include <string_view>
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace seq2seq_fast {

extern const Loops kLoopsDefault;
#ifdef __x86_64__
extern const Loops kLoopsAvx512, kLoopsAvx2;
extern const Bytes kBytesAvx512Vnni, kBytesAvx2Vnni;
#endif
#ifdef __aarch64__
extern const Bytes kBytesNeonDot;

static bool multiplies_bytes() {
#ifdef __linux__
  constexpr unsigned long kDot = 1 << 20;  // HWCAP_ASIMDDP
  return getauxval(AT_HWCAP) & kDot;
#elif defined(__APPLE__)
  return true;  // as of the M1
#else
  return false;
#endif
}
#endif

[[maybe_unused]] static Loops with(Loops loops, const char* name, const Bytes& bytes) {
  loops.name = name, loops.bytes = bytes;
  return loops;
}

static Loops choose() {
  const char* const asked = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view most = asked ? asked : "best";
  if (most == "default") return kLoopsDefault;
#if defined(__x86_64__) && !defined(S2S_SANITIZE)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && !most.starts_with("avx2")) {
    if (most == "avx512" || !__builtin_cpu_supports("avx512vnni")) return kLoopsAvx512;
    return with(kLoopsAvx512, "avx512_vnni", kBytesAvx512Vnni);
  }
  if (avx2) {
    if (most == "avx2" || !__builtin_cpu_supports("avxvnni")) return kLoopsAvx2;
    return with(kLoopsAvx2, "avx2_vnni", kBytesAvx2Vnni);
  }
#elif defined(__aarch64__)
  if (multiplies_bytes()) return with(kLoopsDefault, "neon_dot", kBytesNeonDot);
#endif
  return kLoopsDefault;
}

const Loops loops = choose();

}  // namespace seq2seq_fast
