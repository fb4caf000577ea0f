// Which instruction set the inner loops run in.
#include "loops.h"

#include <cstdlib>
#include <string_view>

namespace seq2seq_fast {

#ifdef __x86_64__
extern const Loops kLoopsAvx512Vnni, kLoopsAvx512, kLoopsAvx2;
#endif
extern const Loops kLoopsDefault;

static Loops choose() {
#if defined(__x86_64__) && !defined(S2S_SANITIZE)
  const char* asked = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view most = asked ? asked : "avx512_vnni";
  if (most == "default") return kLoopsDefault;
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && most != "avx2")
    return most != "avx512" && __builtin_cpu_supports("avx512vnni") ? kLoopsAvx512Vnni
                                                                    : kLoopsAvx512;
  if (avx2) return kLoopsAvx2;
#endif
  return kLoopsDefault;
}

const Loops loops = choose();

}  // namespace seq2seq_fast
