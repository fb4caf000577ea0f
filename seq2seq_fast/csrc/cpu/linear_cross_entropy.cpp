// Cross entropy of logits = input linear_weight^T + bias, and its gradients, without the logits of
// all rows.
//
// Rows go in chunks: their logits by one product, loss and gradient of the logits in place, and
// from these the chunk's part of all other gradients. Rows whose target is ignored take no part.
// With p = softmax(logits), w the classes' weights and s the smoothing, up to the reduction's
// factor
//   loss = (1 - s) w[y] (-log p[y]) + s / V sum_j w[j] (-log p[j])
//   d logits[j] = p[j] ((1 - s) w[y] + s / V sum w) - s / V w[j] - [j = y] (1 - s) w[y]
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#include "../common.h"
#include "loops.h"
#include "product.h"

namespace seq2seq_fast {
namespace {

// Bytes of a chunk's logits: enough rows for the products, few enough for the third level of the
// cache. At V = 10,000 products take 5 % longer with 64 rows than with 384. A chunk goes through
// the weights four times, so where K rows have many bytes, they are the more.
constexpr int64_t kLeastBytes = int64_t{20} << 20, kMostBytes = int64_t{32} << 20;
int64_t rows_of_chunk(int64_t V, int64_t K, int64_t bytes_each) {
  const int64_t row = V * bytes_each;
  return std::clamp(std::min<int64_t>(K, 4096) / 2 * row, kLeastBytes, kMostBytes) / row;
}
constexpr int64_t kTogether = 16;  // rows whose gradients of the bias are summed up by one thread

struct ExponentialsDouble {
  double top, sum, weighted;
};

Exponentials exponentials(float* x, const float* bias, const float* w, int64_t n) {
  return loops.exponentials(x, bias, w, n);
}
ExponentialsDouble exponentials(double* x, const double* bias, const double* w, int64_t n) {
  ExponentialsDouble out = {-std::numeric_limits<double>::infinity(), 0, 0};
  for (int64_t i = 0; i < n; ++i) {
    if (bias) x[i] += bias[i];
    out.top = std::max(out.top, x[i]);
  }
  for (int64_t i = 0; i < n; ++i) {
    if (w) out.weighted += w[i] * (x[i] - out.top);
    out.sum += x[i] = std::exp(x[i] - out.top);
  }
  return out;
}

void logit_gradients(float* x, float factor, const float* subtrahend, int64_t n, bool first,
                     float* sums) {
  loops.logit_gradients(x, factor, subtrahend, n, first, sums);
}
void logit_gradients(double* x, double factor, const double* subtrahend, int64_t n, bool first,
                     double* sums) {
  for (int64_t i = 0; i < n; ++i) {
    x[i] = factor * x[i] - (subtrahend ? subtrahend[i] : 0);
    if (sums) sums[i] = first ? x[i] : sums[i] + x[i];
  }
}

struct Options {
  double smoothing;
  int64_t ignored;
  bool mean;
};

struct Gradients {
  Tensor input, weight, bias;  // empty where not needed
};

// Logits (B, T, V) of some of the steps, made already.
struct Made {
  const std::optional<Tensor>& logits;
  const std::vector<int64_t>& steps;
};

template <typename A>
class CrossEntropy {
 public:
  CrossEntropy(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
               const Tensor& target, const std::optional<Tensor>& class_weight, const Made& made,
               Options options, const Gradients& d)
      : input_(input),
        weight_(weight),
        made_(made.logits ? Rows<A>(*made.logits) : Rows<A>()),
        options_(options),
        d_(d),
        T_(input.size(1)),
        K_(input.size(2)),
        V_(weight.size(0)),
        most_(std::clamp<int64_t>(rows_of_chunk(V_, K_, sizeof(A)), 1,
                                  std::max<int64_t>(1, input.size(0) * T_))),
        features_(empty(weight, {most_, K_})),
        logits_(empty(weight, {most_, V_})),
        d_features_(empty(weight, {d.input.numel() > 0 ? most_ : 0, K_})),
        bias_(bias ? V_ : 0),
        class_weight_(V_),
        subtrahend_(options.smoothing > 0 ? V_ : 0),
        bias_sums_(d.bias.numel() > 0 ? blocks(most_) * V_ : 0),
        losses_(most_) {
    const auto read = [&](const Tensor& x, A* to) {
      Buffer<A> scratch(Rows<A>(x).scratch(1));
      std::copy_n(Rows<A>(x).block(0, 0, 1, scratch).data, V_, to);
    };
    if (bias) read(*bias, bias_);
    has_bias_ = bias.has_value();
    std::fill_n(+class_weight_, V_, A(1));
    if (class_weight) read(*class_weight, class_weight_);
    for (int64_t i = 0; i < V_; ++i) all_classes_ += class_weight_[i];
    choose_rows(target, made.steps);
    scale_ = options.mean ? 1 / total_ : 1;
    for (int64_t i = 0; smooth() && i < V_; ++i)
      subtrahend_[i] = static_cast<A>(scale_ * options.smoothing / V_ * class_weight_[i]);
  }

  double run() {
    double sum = 0;
    for (const bool made : {false, true}) {
      const std::vector<Row>& rows = rows_[made];
      const auto n = static_cast<int64_t>(rows.size()), chunks = (n + most_ - 1) / most_;
      for (int64_t i = 0; i < chunks; ++i) {
        const int64_t first = n * i / chunks;
        sum += chunk(rows.data() + first, n * (i + 1) / chunks - first, made);
      }
    }
    if (first_) {
      std::fill_n(row_of(d_.weight, 0), d_.weight.numel(), A(0));
      std::fill_n(row_of(d_.bias, 0), d_.bias.numel(), A(0));
    }
    return options_.mean ? sum / total_ + 0 / total_ : sum;  // NaN, of no weight at all
  }

 private:
  struct Row {
    int64_t b, t, target;
  };

  static int64_t blocks(int64_t rows) { return (rows + kTogether - 1) / kTogether; }
  bool smooth() const { return options_.smoothing > 0; }
  bool needs_gradients() const {
    return d_.input.numel() > 0 || d_.weight.numel() > 0 || d_.bias.numel() > 0;
  }

  void choose_rows(const Tensor& target, const std::vector<int64_t>& made) {
    std::vector<bool> known(T_);
    for (const int64_t t : made) known.at(t) = true;
    const auto* ids = static_cast<const int64_t*>(target.data_ptr());
    for (int64_t b = 0; b < target.size(0); ++b)
      for (int64_t t = 0; t < T_; ++t) {
        const int64_t y = ids[b * target.stride(0) + t * target.stride(1)];
        if (y == options_.ignored) {
          if (d_.input.numel() > 0) std::fill_n(row_of(d_.input, b * T_ + t), K_, A(0));
          continue;
        }
        STD_TORCH_CHECK(0 <= y && y < V_, "expected targets below the number of classes");
        rows_[known[t]].push_back({b, t, y});
        total_ += class_weight_[y];
      }
  }

  static A* row_of(const Tensor& x, int64_t i) {
    return static_cast<A*>(x.data_ptr()) + i * x.size(x.dim() - 1);
  }

  // Copies rows of `from` to those of `to`.
  void gather(const Rows<A>& from, const Row* rows, int64_t n, const Tensor& to) {
    parallel(n, from.width(), [&](int64_t begin, int64_t end) {
      Buffer<A> scratch(from.scratch(1));
      for (int64_t i = begin; i < end; ++i)
        std::copy_n(from.block(rows[i].b, rows[i].t, 1, scratch).data, from.width(), row_of(to, i));
    });
  }

  // The sum of the losses of n rows, before the reduction's factor; adds to all gradients.
  double chunk(const Row* rows, int64_t n, bool made) {
    const Tensor x = first_rows(features_, n), logits = first_rows(logits_, n);
    if (!made || d_.weight.numel() > 0) gather(input_, rows, n, x);
    if (made)
      gather(made_, rows, n, logits);
    else
      product(logits, x, transposed(weight_));
    parallel(blocks(n), kTogether * 2 * V_, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * kTogether; i < std::min(n, end * kTogether); ++i)
        losses_[i] = loss(row_of(logits, i), rows[i].target, made, i);
    });
    if (d_.input.numel() > 0) {
      const Tensor dx = first_rows(d_features_, n);
      product(dx, logits, weight_);
      parallel(n, K_, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          std::copy_n(row_of(dx, i), K_, row_of(d_.input, rows[i].b * T_ + rows[i].t));
      });
    }
    if (d_.weight.numel() > 0)
      product(d_.weight, transposed(logits), x, first_ ? nullptr : &d_.weight);
    if (d_.bias.numel() > 0) {
      A* out = row_of(d_.bias, 0);
      if (first_) std::fill_n(out, V_, A(0));
      for (int64_t i = 0; i < blocks(n); ++i)
        for (int64_t j = 0; j < V_; ++j) out[j] += bias_sums_[i * V_ + j];
    }
    first_ = false;
    return std::accumulate(+losses_, losses_ + n, 0.0);
  }

  // The loss of row i of a chunk, whose logits x become their gradient. Logits that were made
  // already have their bias.
  double loss(A* x, int64_t target, bool made, int64_t i) {
    const A* bias = has_bias_ && !made ? +bias_ : nullptr;
    const double at_target = x[target] + (bias ? bias[target] : A(0));
    const auto e = exponentials(x, bias, smooth() ? +class_weight_ : nullptr, V_);
    const double log_sum = std::log(static_cast<double>(e.sum)), s = options_.smoothing / V_;
    const double of_target = (1 - options_.smoothing) * class_weight_[target];
    double loss = of_target * (log_sum - (at_target - e.top));
    if (smooth()) loss += s * (all_classes_ * log_sum - e.weighted);
    if (!needs_gradients()) return loss;
    A* sums = d_.bias.numel() > 0 ? bias_sums_ + i / kTogether * V_ : nullptr;
    const double factor = scale_ * (of_target + (smooth() ? s * all_classes_ : 0)) / e.sum;
    // Of the target in float64: the terms nearly cancel where its probability is near one.
    const double others = smooth() ? scale_ * s * class_weight_[target] : 0;
    const A exact = static_cast<A>(factor * x[target] - others - scale_ * of_target);
    logit_gradients(x, static_cast<A>(factor), smooth() ? +subtrahend_ : nullptr, V_,
                    i % kTogether == 0, sums);
    if (sums) sums[target] += exact - x[target];
    x[target] = exact;
    return loss;
  }

  const Rows<A> input_;
  const Tensor& weight_;
  const Rows<A> made_;
  const Options options_;
  const Gradients& d_;
  const int64_t T_, K_, V_, most_;  // rows of a chunk at most
  const Tensor features_, logits_, d_features_;
  Buffer<A> bias_, class_weight_, subtrahend_, bias_sums_;
  Buffer<double> losses_;
  std::vector<Row> rows_[2];  // whose logits are to be made, and those that were
  double all_classes_ = 0, total_ = 0, scale_ = 1;  // of classes' weights
  bool has_bias_ = false, first_ = true;
};

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Outputs linear_cross_entropy(Tensor input, Tensor linear_weight, std::optional<Tensor> linear_bias,
                             Tensor target, std::optional<Tensor> weight,
                             std::optional<Tensor> logits, std::vector<int64_t> steps,
                             double label_smoothing, int64_t ignore_index, bool mean,
                             bool need_input, bool need_weight, bool need_bias) {
  STD_TORCH_CHECK(input.dim() == 3 && linear_weight.dim() == 2 && target.dim() == 2 &&
                      input.size(2) == linear_weight.size(1) && target.size(0) == input.size(0) &&
                      target.size(1) == input.size(1) && linear_weight.size(0) > 0,
                  "expected input (B, T, K), linear_weight (V, K) and target (B, T)");
  STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long, "expected int64 targets");
  const int64_t B = input.size(0), T = input.size(1), K = input.size(2), V = linear_weight.size(0);
  const auto none = [&] { return empty(input, {0}); };
  const Gradients d = {need_input ? empty(input, {B, T, K}) : none(),
                       need_weight ? empty(input, {V, K}) : none(),
                       need_bias ? empty(input, {V}) : none()};
  Tensor loss = empty(input, {});
  const auto go = [&]<typename A>() {
    CrossEntropy<A> entropy(input, linear_weight, linear_bias, target, weight, {logits, steps},
                            {label_smoothing, ignore_index, mean}, d);
    *static_cast<A*>(loss.data_ptr()) = static_cast<A>(entropy.run());
  };
  if (input.scalar_type() == ScalarType::Double)
    go.template operator()<double>();
  else
    go.template operator()<float>();
  return {loss, d.input, d.weight, d.bias};
}

}  // namespace
}  // namespace seq2seq_fast

STABLE_TORCH_LIBRARY_IMPL(seq2seq_fast, CPU, m) {
  m.impl("linear_cross_entropy", TORCH_BOX(&seq2seq_fast::linear_cross_entropy));
}
