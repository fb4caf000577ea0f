// See sampling.h.
#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "loops.h"

namespace seq2seq_fast {
namespace {

// Places of x above a threshold.
std::vector<int32_t> above(const float* x, int64_t n, float threshold) {
  std::vector<int32_t> places(n);
  places.resize(loops.above(x, n, threshold, places.data()));
  return places;
}

// The k-th largest is not below the k-th largest of the tops of so many stretches, so that only
// what is not below that needs to be ordered.
void keep_largest(float* x, int64_t n, int64_t k) {
  const int64_t width = std::max<int64_t>(n / (2 * k), 1);
  std::vector<float> left;
  for (int64_t i = 0; i < n; i += width) left.push_back(loops.top(x + i, std::min(width, n - i)));
  const auto place = [&] { return left.begin() + (k - 1); };
  std::nth_element(left.begin(), place(), left.end(), std::greater<>());
  const float least = std::nextafter(*place(), -INFINITY);
  left.clear();
  for (const int32_t i : above(x, n, least)) left.push_back(x[i]);
  if (static_cast<int64_t>(left.size()) < k) return;  // what is left out is -inf already
  std::nth_element(left.begin(), place(), left.end(), std::greater<>());
  const float kth = *place();
  for (int64_t i = 0; i < n; ++i) x[i] = x[i] < kth ? -INFINITY : x[i];
}

// Keeps the largest ones, of equals the first, as long as what comes before has less than a share
// of the sum of exp(scale x).
void keep_share(float* x, int64_t n, double share, float scale) {
  std::vector<float> e(n);
  for (int64_t i = 0; i < n; ++i) e[i] = scale * x[i];
  loops.exponentials(e.data(), nullptr, nullptr, n);
  const auto mass = [&](auto begin, auto end) {
    return std::accumulate(begin, end, 0., [&](double sum, int32_t i) { return sum + e[i]; });
  };
  const double wanted = share * std::accumulate(e.begin(), e.end(), 0.);
  std::vector<int32_t> order;
  for (const float least : {5e-2f, 1e-3f, 1e-6f, -1.f}) {  // few, most often, have that share
    order = above(e.data(), n, least);
    if (mass(order.begin(), order.end()) >= wanted) break;
  }
  const auto before = [&](int32_t i, int32_t j) { return x[i] > x[j] || (x[i] == x[j] && i < j); };
  double sum = 0;
  auto first = order.begin(), last = order.end();  // the last one that is kept is among these
  while (last - first > 1) {
    const auto middle = first + (last - first) / 2;
    std::nth_element(first, middle, last, before);
    const double more = mass(first, middle);
    if (sum + more >= wanted) {
      last = middle;
    } else {
      sum += more;
      first = middle;
    }
  }
  const int32_t end = *first;
  const float least = x[end];
  for (int32_t i = 0; i < n; ++i)
    if (x[i] < least || (x[i] == least && i > end)) x[i] = -INFINITY;
}

}  // namespace

void cut(const Sampling& sampling, float* logits, int64_t V) {
  if (loops.top(logits, V) == -INFINITY) return;
  if (sampling.top_k > 0 && sampling.top_k < V) keep_largest(logits, V, sampling.top_k);
  if (sampling.top_p < 1) keep_share(logits, V, sampling.top_p, sampling.scale);
}

}  // namespace seq2seq_fast
