// The loops of 64-bit ARM, run by an emulator: those that are NEON's own must give the bits of the
// plain ones, and those the sums that are expected. Prints what differs, and how much was compared.
#include "../../seq2seq_fast/csrc/cpu/loops.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

namespace seq2seq_fast {

extern const Loops kLoopsDefault;
extern const Bytes kBytesNeonDot;

namespace {

std::mt19937 draw(0);
int compared = 0, wrong = 0;

std::vector<float> numbers(int64_t n) {
  std::normal_distribution<float> normal;
  std::vector<float> x(n);
  for (float& y : x) y = normal(draw);
  return x;
}

void compare(const char* what, const std::vector<float>& got, const std::vector<double>& want,
             double tolerance) {
  for (size_t i = 0; i < got.size(); ++i, ++compared)
    if (!(std::abs(got[i] - want[i]) <= tolerance) && ++wrong < 10)
      std::printf("%s: %g at %zu, not %g\n", what, got[i], i, want[i]);
}

void quantised(int64_t count, int64_t rows, int64_t K, int64_t width) {
  const int64_t K4 = round_up(K, 4), ld = K4 + 16;
  std::vector<uint8_t> w(K4 * width);
  for (uint8_t& x : w) x = static_cast<uint8_t>(draw());
  const std::vector<float> x = numbers(rows * K), scale = numbers(width);
  std::vector<int8_t> digits(rows * count * ld + 16);
  std::vector<float> scales(rows), norms(2 * rows);
  std::vector<int32_t> offsets(count * rows);
  const QuantisedRows to{K4,
                         ld,
                         count,
                         kBytesNeonDot.pairs,
                         count == 2 ? kTwoDigits : kBytesNeonDot.digit,
                         digits.data(),
                         scales.data(),
                         offsets.data(),
                         norms.data()};
  // The same as plain code takes them
  std::vector<int8_t> plain_digits(digits.size());
  std::vector<int32_t> plain_offsets(offsets.size());
  QuantisedRows to_plain = to;
  to_plain.pairs = kLoopsDefault.bytes.pairs;
  to_plain.digits = plain_digits.data(), to_plain.offsets = plain_offsets.data();
  Operand operands[kOperands] = {};
  operands[0] = {x.data(), K, K};
  for (int64_t row = 0; row < rows; ++row)
    kLoopsDefault.quantise(operands, row, to), kLoopsDefault.quantise(operands, row, to_plain);
  const std::vector<float> before = numbers(rows * width);
  std::vector<float> plain = before, own = before;
  const auto onto = [&](std::vector<float>& x) { return Sums{x.data(), width, x.data(), width}; };
  kLoopsDefault.bytes.panel(to_plain, 0, rows, w.data(), width, scale.data(), onto(plain));
  kBytesNeonDot.panel(to, 0, rows, w.data(), width, scale.data(), onto(own));
  compare("quantised_panel", own, {plain.begin(), plain.end()}, 0);
  std::vector<double> lengths(2 * rows);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t k = 0; k < K; ++k) {
      const int8_t* digit = digits.data() + i * count * ld + k;
      const int whole = count == 2 ? 128 * digit[0] + digit[ld] : digit[0];
      const double y = x[i * K + k], rest = y - double{scales[i]} * whole;
      lengths[2 * i] += y * y, lengths[2 * i + 1] += rest * rest;
    }
  for (double& y : lengths) y = std::sqrt(y);
  compare("norms", norms, lengths, 1e-4);
}

void six_bits(int64_t rows, int64_t K) {
  const int64_t fours = (K + 3) / 4, K4 = 4 * fours, ld = K4 + 16;
  std::vector<uint8_t> w(fours * 3 * kPanel), eight(K4 * kPanel);
  for (uint8_t& x : w) x = static_cast<uint8_t>(draw());
  const std::vector<float> x = numbers(rows * K), scale = numbers(kPanel);
  std::vector<int8_t> digits(rows * ld + 16);
  std::vector<float> scales(rows), norms(2 * rows);
  std::vector<int32_t> offsets(rows);
  const float most = kBytesNeonDot.digit;
  const QuantisedRows to{
      K4, ld, 1, false, most, digits.data(), scales.data(), offsets.data(), norms.data()};
  Operand operands[kOperands] = {};
  operands[0] = {x.data(), K, K};
  for (int64_t row = 0; row < rows; ++row) kLoopsDefault.quantise(operands, row, to);
  const std::vector<float> before = numbers(rows * kPanel);
  std::vector<double> want(before.begin(), before.end());
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < kPanel; ++j)
      for (int64_t k = 0; k < K; ++k) {
        const uint8_t* parts = &w[k / 4 * 3 * kPanel + j % kBlock * 4 + k % 4];
        const int64_t block = j / kBlock;
        const int whole =
            block < 3 ? parts[block * kPanel] & 63
                      : parts[0] >> 6 | parts[kPanel] >> 6 << 2 | parts[2 * kPanel] >> 6 << 4;
        want[i * kPanel + j] += double{scales[i]} * scale[j] * (whole - 32) * digits[i * ld + k];
      }
  kLoopsDefault.six_to_eight(w.data(), fours, eight.data());
  for (const int f : {0, 1, 2}) {
    std::vector<float> out = before;
    const Sums onto{out.data(), kPanel, out.data(), kPanel};
    if (f == 0) kBytesNeonDot.panel_of_six(to, 0, rows, w.data(), scale.data(), onto);
    if (f == 1) kLoopsDefault.bytes.panel_of_six(to, 0, rows, w.data(), scale.data(), onto);
    if (f == 2) kBytesNeonDot.panel(to, 0, rows, eight.data(), kPanel, scale.data(), onto);
    compare("six bits", out, want, f == 0 ? 1e-3 : 0);
    want.assign(out.begin(), out.end());  // of the others the same bits
  }
}

void packed(int64_t rows, int64_t K, int64_t width) {
  const std::vector<float> x = numbers(rows * K), w = numbers(K * width);
  const std::vector<float> start = numbers(rows * width);
  std::vector<float> out = start;
  std::vector<double> want(out.begin(), out.end());
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t k = 0; k < K; ++k)
      for (int64_t j = 0; j < width; ++j)
        want[i * width + j] += double{x[i * K + k]} * w[k * width + j];
  Operand operands[kOperands] = {};
  operands[0] = {x.data(), K, K};
  kLoopsDefault.packed_panel(operands, 0, rows, w.data(), width,
                             {out.data(), width, out.data(), width});
  compare("packed_panel", out, want, 1e-4);
  // Columns of w as rows: the same sums, to the last bit
  std::vector<float> turned(width * K), before(width), dots(width);
  std::vector<int32_t> places(width);
  for (int64_t j = 0; j < width; ++j) {
    places[j] = static_cast<int32_t>(width - 1 - j);
    for (int64_t k = 0; k < K; ++k) turned[places[j] * K + k] = w[k * width + j];
    before[places[j]] = start[j];
  }
  kLoopsDefault.dots(operands, 0, turned.data(), K, places.data(), width, before.data(),
                     dots.data());
  compare("dots", dots, {out.begin(), out.begin() + width}, 0);
  // Of bfloat16, the upper halves
  std::vector<uint16_t> halves(K * width), turned_halves(K * width);
  for (int64_t i = 0; i < K * width; ++i) {
    uint32_t bits[2];
    std::memcpy(&bits[0], &w[i], 4), std::memcpy(&bits[1], &turned[i], 4);
    halves[i] = bits[0] >> 16, turned_halves[i] = bits[1] >> 16;
  }
  kLoopsDefault.packed_panel_half(operands, 0, 1, halves.data(), width,
                                  {start.data(), width, out.data(), width});
  kLoopsDefault.dots_half(operands, 0, turned_halves.data(), K, places.data(), width, before.data(),
                          dots.data());
  compare("dots_half", dots, {out.begin(), out.begin() + width}, 0);
}

void bytes(int64_t n, int64_t width) {
  const std::vector<float> x = numbers(n * width);
  std::vector<uint8_t> out(round_up(n, 4) * width);
  std::vector<float> scales(width), taken(width), norms(width);
  kLoopsDefault.to_bytes(x.data(), n, width, out.data(), scales.data(), taken.data(), norms.data());
  std::vector<double> rests(width), lengths(width);
  for (int64_t i = 0; i < round_up(n, 4); ++i)
    for (int64_t j = 0; j < width; ++j) {
      const double y = double{scales[j]} * (out[(i / 4 * width + j) * 4 + i % 4] - 128);
      rests[j] += std::pow((i < n ? x[i * width + j] : 0) - y, 2), lengths[j] += y * y;
      compared += 1, wrong += std::abs((i < n ? x[i * width + j] : 0) - y) > 0.501 * scales[j];
    }
  for (int64_t j = 0; j < width; ++j)
    rests[j] = std::sqrt(rests[j]), lengths[j] = std::sqrt(lengths[j]);
  compare("to_bytes, taken", taken, rests, 1e-4);
  compare("to_bytes, norms", norms, lengths, 1e-4);
}

// The j-th word of Philox4x32-10 of a counter.
uint32_t philox(uint64_t key, std::array<uint32_t, 4> x, int j) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t a = uint64_t{0xD2511F53u} * x[0], b = uint64_t{0xCD9E8D57u} * x[2];
    x = {static_cast<uint32_t>(b >> 32) ^ x[1] ^ k0, static_cast<uint32_t>(b),
         static_cast<uint32_t>(a >> 32) ^ x[3] ^ k1, static_cast<uint32_t>(a)};
  }
  return x[j];
}

void perturbed(int64_t n) {
  const std::vector<float> x = numbers(n);
  std::vector<float> out(n);
  std::vector<double> want(n);
  const Draw which = {uint64_t{7} << 40 | 5, 3, 9, 0.5f};
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t lane = static_cast<uint32_t>(i % 64), counter = 64 * 2 + lane;
    const uint32_t word = philox(which.seed, {counter, 0, which.row, which.step}, i / 64);
    want[i] = 0.5 * x[i] - std::log(-std::log1p(-(word + 0.5) / 4294967296.));
  }
  const float top = kLoopsDefault.perturb(which, 2, x.data(), n, -INFINITY, out.data());
  compare("perturb", out, want, 1e-5);
  const double most = *std::max_element(want.begin(), want.end());
  compare("perturb, top", {top}, {most}, 1e-5);
  // What lies below a bound may be left out, and the largest is found all the same.
  for (const float least : {float(most) - 3, float(most) - 0.5f, float(most) + 1, 1e3f}) {
    std::vector<float> some(n);
    const float found = kLoopsDefault.perturb(which, 2, x.data(), n, least, some.data());
    if (least < most) compare("perturb, top above a bound", {found}, {top}, 0);
    for (int64_t i = 0; i < n; ++i)
      if (some[i] != out[i] && (some[i] != -INFINITY || want[i] > least + 1e-3))
        compare("perturb above a bound", {some[i]}, {out[i]}, 0);
  }
  // Of some tokens: the same bits
  std::vector<int32_t> tokens;
  std::vector<float> some, same;
  for (int32_t i = 0; i < n; i += 3)
    tokens.push_back(256 * 2 + i), some.push_back(x[i]), same.push_back(out[i]);
  const auto count = static_cast<int64_t>(tokens.size());
  kLoopsDefault.perturb_some(which, tokens.data(), some.data(), count, some.data());
  compare("perturb_some", some, {same.begin(), same.end()}, 0);
}

}  // namespace
}  // namespace seq2seq_fast

int main() {
  using namespace seq2seq_fast;
  for (int64_t rows : {1, 2, 3, 7})
    for (int64_t K : {4, 9, 100})
      for (int64_t width : {16, 48, 64}) {
        quantised(1, rows, K, width), quantised(2, rows, K, width);
        packed(rows, K, width);
        bytes(K, width);
      }
  for (int64_t rows : {1, 2, 7})
    for (int64_t K : {4, 9, 100}) six_bits(rows, K);
  for (int64_t n : {1, 17, 256}) perturbed(n);
  std::printf("%d compared, %d wrong\n", compared, wrong);
  return wrong != 0;
}
