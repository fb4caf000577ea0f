// See readout.h.
#include "readout.h"

namespace seq2seq_fast {

constexpr int64_t kTogether = 96;  // tokens that pay for reading the weights

LateLogProbs::LateLogProbs(const PackedReadout& packed, std::vector<double>& sums)
    : packed_(packed), sums_(sums) {}

void LateLogProbs::make_room(int64_t n) {
  if (end_ > 0 && end_ + n > kTogether) flush();
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
  const int64_t n = end_, K = packed_.matrix.K, chunks = packed_.chunks;
  begin_ = end_ = 0;
  if (n == 0) return;
  const Factor rows(packed_.matrix, n, {rows_.data(), K, K});
  const Buffer<Peak> peaks(n * chunks);
  const Buffer<float> chosen(n);
  const int64_t width = packed_.chunk_width();
  parallel_in_turns(
      chunks, packed_.chunk_panels * packed_.matrix.operations(n), [&](int64_t chunk) {
        const Buffer<float> logits(n * width);
        packed_.over_panels(chunk, logits, width,
                            [&](int64_t p, const Sums& to) { rows.multiply(p, 0, n, to); });
        for (int64_t i = 0; i < n; ++i) {
          peaks[i * chunks + chunk] = loops.peak(logits + i * width, packed_.count(chunk));
          const int64_t at = tokens_[i] - chunk * width;
          if (at >= 0 && at < width) chosen[i] = logits[i * width + at];
        }
      });
  for (int64_t i = 0; i < n; ++i)
    sums_[sources_[i]] += Normaliser(peaks + i * chunks, chunks).log_prob(chosen[i]);
}

}  // namespace seq2seq_fast
