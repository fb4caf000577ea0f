// See sampling.h.
#include "sampling.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <numeric>
#include <vector>

namespace seq2seq_fast {
namespace {

void keep_largest(float* x, int64_t n, int64_t k) {
  const float kth = kth_largest(x, n, k);
  for (int64_t i = 0; i < n; ++i) x[i] = x[i] < kth ? -INFINITY : x[i];
}

// f(result so far, x) of all of them, eight at a time, so that none waits for another.
template <typename T, typename F>
T joined(const std::vector<float>& x, F f) {
  constexpr size_t kTogether = 8;
  T results[kTogether] = {};
  size_t i = 0;
  for (; i + kTogether <= x.size(); i += kTogether)
    for (size_t j = 0; j < kTogether; ++j) results[j] = f(results[j], x[i + j]);
  for (; i < x.size(); ++i) results[0] = f(results[0], x[i]);
  return std::accumulate(results + 1, results + kTogether, results[0], f);
}

// Keeps the largest ones, of equals the first, as long as what comes before has less than a share
// of the sum of exp(scale x). The range of x is cut into stretches, so that only what shares one
// with the last that is kept needs to be ordered.
void keep_share(float* x, int64_t n, float top, double share, float scale) {
  constexpr int32_t kStretches = 1024;
  constexpr float kNothing = -88, kOne = -1e-30f;  // beside exp(0): nothing, and as much
  std::vector<float> e(n);
  for (int64_t i = 0; i < n; ++i) e[i] = scale * (x[i] - top);  // at most 0, whatever the scale
  const float least =
      joined<float>(e, [](float least, float x) { return x < least && x > kNothing ? x : least; });
  const float per = least < kOne ? (kStretches - 2) / -least : 0.f;
  std::vector<int32_t> stretch(n), order(n);
  for (int64_t i = 0; i < n; ++i)
    stretch[i] = e[i] < least ? 0 : 1 + static_cast<int32_t>((e[i] - least) * per);
  loops.exponentials(e.data(), nullptr, nullptr, n);
  std::array<double, kStretches> masses{};
  for (int64_t i = 0; i < n; ++i) masses[stretch[i]] += e[i];
  const double wanted = share * joined<double>(e, std::plus<double>());
  double before = 0;
  int32_t at = kStretches - 1;  // where the last one that is kept lies
  while (at > 0 && before + masses[at] < wanted) before += masses[at--];
  int64_t found = 0;
  constexpr int64_t kTogether = 16;  // in most of so many there is none
  for (int64_t i = 0; i < n; i += kTogether) {
    int32_t any = n - i < kTogether;
    for (int64_t j = i; j < i + kTogether && n - i >= kTogether; ++j) any |= stretch[j] == at;
    for (int64_t j = i; any && j < std::min(i + kTogether, n); ++j)
      if (stretch[j] == at) order[found++] = static_cast<int32_t>(j);
  }
  if (found == 0) return;  // the share is that of all, but for rounding
  std::sort(order.begin(), order.begin() + found,
            [&](int32_t i, int32_t j) { return x[i] > x[j] || (x[i] == x[j] && i < j); });
  int64_t last = 0;
  while (last + 1 < found && before + e[order[last]] < wanted) before += e[order[last++]];
  const int32_t end = order[last];
  const float bound = x[end];
  for (int64_t i = 0; i < n; ++i) x[i] = x[i] < bound ? -INFINITY : x[i];
  for (int64_t i = end + 1; i < n; ++i) x[i] = x[i] == bound ? -INFINITY : x[i];
}

}  // namespace

// It is not below the k-th largest of the tops of so many stretches, so that only what is not below
// that needs to be ordered.
float kth_largest(const float* x, int64_t n, int64_t k) {
  const int64_t width = std::max<int64_t>(n / (2 * k), 1);
  std::vector<float> left;
  for (int64_t i = 0; i < n; i += width) left.push_back(loops.top(x + i, std::min(width, n - i)));
  const auto kth = [&] {
    std::nth_element(left.begin(), left.begin() + (k - 1), left.end(), std::greater<>());
    return left[k - 1];
  };
  std::vector<int32_t> places(n);
  const float least = std::nextafter(kth(), -INFINITY);
  const int64_t found = loops.above(x, n, least, places.data());
  if (found < k) return -INFINITY;
  left.resize(found);
  for (int64_t i = 0; i < found; ++i) left[i] = x[places[i]];
  return kth();
}

int32_t drawn(const float* x, int64_t n, const Draw& draw) {
  float best = -INFINITY, values[kRandomBlock];
  int64_t at = 0;
  for (int64_t i = 0; i < n; i += kRandomBlock) {
    const int64_t count = std::min(kRandomBlock, n - i);
    const float largest = loops.perturb(draw, i / kRandomBlock, x + i, count, best, values);
    if (!(largest > best)) continue;
    best = largest;
    at = i + (std::find(values, values + count, best) - values);
  }
  return static_cast<int32_t>(at);
}

void cut(const Sampling& sampling, float* logits, int64_t V) {
  const float top = loops.top(logits, V);
  if (top == -INFINITY) return;
  if (sampling.top_k > 0 && sampling.top_k < V) keep_largest(logits, V, sampling.top_k);
  if (sampling.top_p < 1) keep_share(logits, V, top, sampling.top_p, sampling.scale);
}

}  // namespace seq2seq_fast
