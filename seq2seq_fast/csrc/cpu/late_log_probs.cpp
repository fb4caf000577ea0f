// See readout.h.
#include <algorithm>

#include "readout.h"

namespace seq2seq_fast {

// Tokens that pay for reading the weights, and what their logits may take, in bytes. No step has
// more than the fewest.
constexpr int64_t kTogether = 96, kFewTogether = 8, kMostBytes = int64_t{8} << 20;
static_assert(kFewTogether >= kFewRows);

LateLogProbs::LateLogProbs(const PackedReadout& packed, int64_t of_first, std::vector<double>& sums)
    : packed_(packed),
      no_values_(packed.matrix, 0, nullptr, nothing_),
      sums_(sums),
      of_first_(of_first),
      most_(std::clamp(kMostBytes / static_cast<int64_t>(packed.ld() * sizeof(float)), kFewTogether,
                       kTogether)) {}

void LateLogProbs::make_room(int64_t n) {
  if (end_ > 0 && end_ + n > most_) flush();
  begin_ = end_, end_ += n;
  sources_.resize(end_), tokens_.resize(end_), rows_.resize(end_ * packed_.matrix.K);
}

void LateLogProbs::add(int64_t i, int32_t source, int32_t token, const Operand& hidden,
                       const Operand& context, int64_t row) {
  i += begin_;
  sources_[i] = source, tokens_[i] = token;
  float* to = rows_.data() + i * packed_.matrix.K;
  for (const Operand* x : {&hidden, &context}) to = std::copy_n(x->x + row * x->ld, x->K, to);
}

void LateLogProbs::flush() {
  const int64_t n = end_, K = packed_.matrix.K;
  begin_ = end_ = 0;
  if (n == 0) return;
  if (!readout_) readout_.emplace(packed_, most_, nullptr, no_values_);
  const float* const rows = rows_.data();
  const Operand hidden = {rows, K, of_first_}, context = {rows + of_first_, K, K - of_first_};
  readout_->run({hidden, context, {}}, n, Made::kScores, {1, 1}, [](int64_t) {});
  std::vector<double> log_probs(n);
  parallel(n, packed_.V / 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      log_probs[i] = readout_->normaliser(i).log_prob(readout_->logit(i, tokens_[i]));
  });
  for (int64_t i = 0; i < n; ++i) sums_[sources_[i]] += log_probs[i];
}

}  // namespace seq2seq_fast
