// See sampling.h.
#include "sampling.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>
#include <vector>

namespace seq2seq_fast {
namespace {

void keep_largest(float* x, int64_t n, int64_t k) {
  const float kth = kth_largest(x, n, k);
  for (int64_t i = 0; i < n; ++i) x[i] = x[i] < kth ? -INFINITY : x[i];
}

// Stretches of numbers from 0 to 1, in their order: those that share the first seven bits behind
// the point.
constexpr int64_t kStretches = 0x3f81;
int64_t stretch(float x) { return std::bit_cast<uint32_t>(x) >> 16; }

// Keeps the largest ones, of equals the first, as long as what comes before has less than a share
// of the sum of exp(scale x).
void keep_share(float* x, int64_t n, double share, float scale) {
  std::vector<float> e(n);
  const float top = loops.top(x, n);
  for (int64_t i = 0; i < n; ++i) e[i] = scale * (x[i] - top);  // at most 0, whatever the scale
  loops.exponentials(e.data(), nullptr, nullptr, n);
  std::vector<double> masses(kStretches);
  for (const float each : e) masses[stretch(each)] += each;
  const double wanted = share * std::accumulate(masses.begin(), masses.end(), 0.);
  double before = 0;
  int64_t at = kStretches - 1;  // where the last one that is kept lies
  while (at > 0 && before + masses[at] < wanted) before += masses[at--];
  std::vector<int32_t> order;
  for (int32_t i = 0; i < n; ++i)
    if (stretch(e[i]) == at) order.push_back(i);
  if (order.empty()) return;  // the share is that of all, but for rounding
  std::sort(order.begin(), order.end(),
            [&](int32_t i, int32_t j) { return x[i] > x[j] || (x[i] == x[j] && i < j); });
  size_t last = 0;
  while (last + 1 < order.size() && before + e[order[last]] < wanted) before += e[order[last++]];
  const int32_t end = order[last];
  const float least = x[end];
  for (int64_t i = 0; i < n; ++i) x[i] = x[i] < least ? -INFINITY : x[i];
  for (int64_t i = end + 1; i < n; ++i) x[i] = x[i] == least ? -INFINITY : x[i];
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
    const float top = loops.top(x + i, count);
    if (top == -INFINITY || draw.scale * top + kMostPerturbed < best) continue;
    loops.perturb(draw, i / kRandomBlock, x + i, count, values);
    const float largest = loops.top(values, count);
    if (!(largest > best)) continue;
    best = largest;
    at = i + (std::find(values, values + count, best) - values);
  }
  return static_cast<int32_t>(at);
}

void cut(const Sampling& sampling, float* logits, int64_t V) {
  if (loops.top(logits, V) == -INFINITY) return;
  if (sampling.top_k > 0 && sampling.top_k < V) keep_largest(logits, V, sampling.top_k);
  if (sampling.top_p < 1) keep_share(logits, V, sampling.top_p, sampling.scale);
}

}  // namespace seq2seq_fast
