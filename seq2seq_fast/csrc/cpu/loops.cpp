// Which instruction set the inner loops run in.
#include "loops.h"

#include <cstdlib>
#include <string_view>

namespace seq2seq_fast {

#ifdef __x86_64__
extern const Loops kLoopsAvx512, kLoopsAvx2;
extern const QuantisedPanel kQuantisedPanelAvx512Vnni, kQuantisedPanelAvx2Vnni;
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
  const auto with_vnni = [](Loops loops, const char* name, QuantisedPanel panel) {
    loops.name = name, loops.quantised_panel = panel;
    return loops;
  };
  if (avx512 && !most.starts_with("avx2")) {
    if (most == "avx512" || !__builtin_cpu_supports("avx512vnni")) return kLoopsAvx512;
    return with_vnni(kLoopsAvx512, "avx512_vnni", kQuantisedPanelAvx512Vnni);
  }
  if (avx2) {
    if (most == "avx2" || !__builtin_cpu_supports("avxvnni")) return kLoopsAvx2;
    return with_vnni(kLoopsAvx2, "avx2_vnni", kQuantisedPanelAvx2Vnni);
  }
#endif
  return kLoopsDefault;
}

const Loops loops = choose();

}  // namespace seq2seq_fast
