// The inner loops, which have no torch in them: compiled for each instruction set from the same
// source, chosen when the library is loaded.
//
// scores[b,t,s] = sum_h v[h] tanh(q[b,t,h] + k[b,s,h]). With x = exp(2q) exp(2k), tanh(q + k) =
// (x - 1) / (x + 1), and 1 - tanh^2 = 4 x / (x + 1)^2. Exponentials are made once per element of q
// and k, and four terms share one division: n1/d1 + n2/d2 = (n1 d2 + n2 d1) / (d1 d2), twice.
// Numerators x - 1, not 1 - 2 / (x + 1): what is rounded is then of the size of tanh.
//
// Vectors run over features. What belongs to a query or a key is padded with zeros to Hp features,
// a multiple of kPad, and cut into groups of kGroup features, of which the last may be narrower.
// Keys come in blocks of kRows, of which the last may be shorter: (groups, rows, width of the
// group), so that the piece of a block that is worked on lies in one place.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../cell.h"

namespace seq2seq_fast {

constexpr int64_t kRows = 16, kGroup = 64, kPad = 16;
constexpr int64_t kQueries = 16;  // of one call, at most
constexpr int64_t kTile = 64;     // queries that go together through scores, softmax and context

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// How queries meet a block of keys, from m = max|q| + max|k|:
//   kSmall    x - 1 made of exp(2q) - 1 and exp(2k) - 1, so that a tanh near zero keeps its
//             relative accuracy. m < 2
//   kFast     as above, while v x^4 stays finite. m < 9.5
//   kLarge    m < 43, so that both factors are finite. Scores: a division for each term, which
//             makes a tanh that rounds to 1 exactly 1. Gradients: x clamped far behind that
//   kExact    tanh itself; everything else, infinities and NaN among it
enum class Mode : uint8_t { kSmall, kFast, kLarge, kExact };

// Blocks with max|k| below this hold exp(2k) - 1 in place of exp(2k).
constexpr float kSmallKeys = 1.f;

// Weights are packed into panels of kBlocks blocks of kBlock outputs, (K, kBlocks, kBlock): what a
// step of the product reads lies together.
constexpr int64_t kBlock = 16, kBlocks = 4, kPanel = kBlocks * kBlock;
constexpr int64_t kStrip = 6;  // rows whose sums stay in registers; see product_panel

// What the loops read of a query, each (T, width) apart for every group: exp(2q), exp(2q) - 1 and q
enum Stream { kPower, kPowerMinusOne, kRaw, kStreams };

// What a decoding engine reads: panels of kPanel outputs, or fewer whole blocks, in these types.
// Those of kInt8 are whole numbers + 128, (K / 4, width, 4), and `scale` is of each column. Those
// of kInt6 are whole numbers + 32 of as many columns as a panel has at most, (K / 4, 3, kPanel):
// the k-th block's of four rows are the low bits of the k-th part, and the fourth block's lie above
// them, two bits in each part, the lowest ones first. Those of kInt16 are whole numbers, (K / 2,
// width, 2).
enum class Weights : uint8_t { kFloat, kBFloat16, kInt8, kInt6, kInt16 };

// Columns of the left factor of a product: rows x, ld apart, of K numbers. Up to kOperands of them
// lie side by side; those that are not there have no columns.
struct Operand {
  const float* x = nullptr;
  int64_t ld = 0, K = 0;
};
constexpr int kOperands = 3;

// What weights of kInt8 and kInt6 are multiplied by: x = scale * (128 * digit + digit), both of
// them from -64 to 64. Twice 7 bits are much finer than the weights, and products of bytes are
// quick, where an instruction adds up four. Where it takes two to add up two digits' products of
// four weights, 128 * digit + digit lies in 16 bits, and two are multiplied at once: of each four
// numbers the second and the third change places, to meet weights' even bytes and odd ones. With
// one digit for a number x = scale * digit.
struct QuantisedRows {
  int64_t K, ld;  // K is filled up with zeros to a multiple of 4
  int64_t count;  // digits of a number, two of which may lie in 16 bits: Bytes::pairs
  bool pairs;
  float most;      // what a number is at most: kTwoDigits, or Bytes::digit
  int8_t* digits;  // (rows, count, ld): the high ones of a row, the low ones; or (rows, ld) int16
  float* scales;   // (rows,)
  // (rows, parts, count): -128 times the sum of a part's digits, or numbers, as weights are 128 too
  // large; of whole numbers the second is not looked at
  int32_t* offsets;
  float* norms;  // (rows, 2): Euclidean, of x and of what rounding it has taken
  int64_t parts() const;
};
constexpr float kTwoDigits = 8191;
// Rows that are multiplied in 32 bits: of two digits, as many as 128 * 8191 times is below 2^31.
constexpr int64_t kTwoDigitsPart = 2048;
inline int64_t parts_of_digits(int64_t K, int64_t count) {
  return count == 2 && K > kTwoDigitsPart ? (K + kTwoDigitsPart - 1) / kTwoDigitsPart : 1;
}
inline int64_t QuantisedRows::parts() const { return parts_of_digits(K, count); }

// What weights of kInt16 are multiplied by: x = scale * whole number, with a scale for each block
// of kSixteenBlock numbers, none of which is above kSixteen, nor their Euclidean norm above
// kSixteenLength before they are rounded, nor that of as many weights above it: sums of
// their products are whole numbers of 32 bits (Cauchy-Schwarz).
//
// What rounding takes from x it takes for all columns alike. So there is one block more: that
// taken, by the kCommon directions that the weights have most in common, to meet the weights' own
// part of those. The numbers are sixteen times too large there, and the weights as much too small,
// which leaves the scale to the others.
struct SixteenRows {
  int64_t K, ld;      // K: without that block, filled up with zeros to an even number
  int16_t* numbers;   // (rows, ld), whole blocks
  float* scales;      // (rows, blocks)
  float* norms;       // (rows, 2): Euclidean, of x and of what rounding it has taken
  const float* mean;  // (ld - kSixteenBlock,): a row that was taken from all columns of the weights
  const float* directions;  // (ld - kSixteenBlock, kCommon), times sixteen
  float* shifts;            // (rows,): products with the mean, which all sums of a row begin with
  int64_t blocks() const;
};
constexpr int64_t kSixteenBlock = 64, kCommon = 16;
constexpr float kSixteen = 32767, kSixteenLength = 46328;  // 2^15.5 - 12.95
inline int64_t SixteenRows::blocks() const { return ld / kSixteenBlock; }

// What exp(x - top) was made with: the largest x, their sum, and sum w (x - top).
struct Exponentials {
  float top, sum, weighted;
};

// What is known of a stretch of logits: the largest, sum exp(x - largest), and where it is.
struct Peak {
  float top, sum;
  int32_t index;
};

// Random numbers that are made at once.
constexpr int64_t kRandomBlock = 256;

// Which draw of a token: the seed of all, the row, and the step it is for.
struct Draw {
  uint64_t seed;
  uint32_t row, step;
  float scale;  // of logits, before they are perturbed
};
constexpr float kMostPerturbed = 23;

// What is read after a product, and can be on its way meanwhile.
struct Soon {
  const void* first = nullptr;
  int64_t bytes = 0;
};

// Places of a source, of which the scores are v tanh(query + key + projection features). All rows
// of features are padded with zeros to `width`, a multiple of kPadPlaces.
constexpr int64_t kPadPlaces = 2 * kPad;
template <typename A>
struct PlacesOf {
  int64_t count, width, N;
  const A* query;  // (width,)
  const A* keys;   // (count, width), rows ld apart
  int64_t ld;
  const A* features;  // (N, count filled up to a multiple of kPad)
  int64_t ld_features;
  const A *projection, *v;  // (N, width), (width,)
};
using Places = PlacesOf<float>;
// What gradients of the scores, filled up with zeros, come to: all of it is added to but for
// `features`.
template <typename A>
struct PlaceGradientsOf {
  A *query, *v, *projection;  // (width,), (width,), (N, width)
  A* keys;                    // as the keys lie
  A* features;                // (N, as many as there are features)
  int64_t ld_features;
  const A* projected;  // the projection again, (width, N) with rows of whole kPad
  int64_t ld_projected;
  A* before;  // room for kPad rows of the width
};
using PlaceGradients = PlaceGradientsOf<float>;

// Where sums go: out = init + sum, rows of them. init may be out, or one row with an ld_init of 0.
struct Sums {
  const float* init;
  int64_t ld_init;
  float* out;
  int64_t ld;
  Soon soon = {};
  Sums from(int64_t row, int64_t column) const {
    return {init + row * ld_init + column, ld_init, out + row * ld + column, ld};
  }
};

// What an instruction set has for products of bytes.
struct Bytes {
  // As `packed_panel` of Loops, of kInt8.
  void (*panel)(const QuantisedRows& x, int64_t first, int64_t rows, const uint8_t* w,
                int64_t width, const float* scale, const Sums& to);
  // Of kInt6, and of numbers of one digit.
  void (*panel_of_six)(const QuantisedRows& x, int64_t first, int64_t rows, const uint8_t* w,
                       const float* scale, const Sums& to);
  bool pairs;   // whether it takes numbers of two digits as whole ones, see QuantisedRows
  float digit;  // the largest where numbers have one: two products must fit where they are added
  bool seek;    // whether products with one digit are quick enough to seek with, see readout.h
  // Of kInt16, and whether that is quicker than products of floats.
  void (*panel_of_sixteen)(const SixteenRows& x, int64_t first, int64_t rows, const int16_t* w,
                           int64_t width, const float* scale, const Sums& to);
  bool sixteen;
};

// Units of a cell in some rows, see cells.h: of gates before their nonlinearities, in blocks kBlock
// apart, are made gates after them, in blocks H apart, and the states after the step. Rows of raw,
// of gates and of states are so far apart. What a cell does not have is not looked at.
template <typename A>
struct CellRows {
  int64_t rows, units;
  const A* raw;
  int64_t ld_raw;
  A* gates;
  int64_t ld_gates, H;
  const A *hidden_before, *cell_before;
  A *hidden, *memory;
  int64_t ld;
};

struct Loops {
  const char* name;

  // Scores of queries [t, t + n), n <= kQueries, with a block of `count` keys, into out (n, kRows),
  // ld apart. q (groups, T, kStreams, width); K is the block's powers, for Mode::kExact the keys
  // themselves; minus_one: K holds exp(2k) - 1.
  void (*scores)(Mode mode, bool minus_one, const float* q, int64_t T, int64_t t, int64_t n,
                 const float* K, int64_t count, const float* v, int64_t Hp, float* out, int64_t ld);

  // One group of `width` features, n <= kQueries queries, `count` keys; with e = 4 g x / (x + 1)^2
  //   dq[t][h] += e;  dk[s][h] += e;  dv[h] += g tanh
  // q (n, kStreams, width), K and dk (count, width), g (n, ldg), dq (n, width), dv (width,). In
  // Mode::kExact e = w[h] g (1 - tanh^2), else w is not read. Where dk is null, dq alone is made.
  void (*gradients)(Mode mode, bool minus_one, const float* q, int64_t n, const float* K,
                    int64_t count, const float* g, int64_t ldg, const float* w, int64_t width,
                    float* dq, float* dk, float* dv);

  // exp(2x) and exp(2x) - 1 for |x| < 43; n is a multiple of kPad.
  void (*exp2x)(const float* x, int64_t n, float* out);
  void (*expm1_2x)(const float* x, int64_t n, float* out);
  // The largest magnitude, or NaN if there is one.
  float (*largest)(const float* x, int64_t n);

  // In place: x[s] = scale x[s] + bias[s], then softmax over the places that mask allows; masked
  // places, and rows masked everywhere, become zero. bias and mask may be null; mask has a stride.
  void (*softmax)(float* x, int64_t S, float scale, const float* bias, const bool* mask,
                  int64_t stride);
  // In place: the gradient of softmax's input from that of its output. dw, w (S,)
  void (*softmax_backward)(float* dw, const float* w, int64_t S);
  // x *= scale, and zero in place of what is so small (below 1e-30 and 1e-20 of the largest) that
  // its products would be subnormal numbers, on which arithmetic is many times slower.
  void (*scale_and_flush)(float* x, int64_t n, float scale);

  // out (m, D) = w (m, n) rows (n, D), m <= kTile; w[i][j] is at w + i * wi + j * wj, and at most 1
  void (*weighted_rows)(const float* w, int64_t wi, int64_t wj, const float* rows, int64_t ld,
                        int64_t m, int64_t n, int64_t D, float* out, int64_t ldo);
  // out[i][j] = sum_d a[i][d] rows[j][d], i < m, j < n
  void (*products)(const float* a, int64_t lda, const float* rows, int64_t ld, int64_t m, int64_t n,
                   int64_t D, float* out, int64_t ldo);

  // In place: x[i] = exp(x[i] + bias[i] - top). bias and w may be null.
  Exponentials (*exponentials)(float* x, const float* bias, const float* w, int64_t n);
  // In place: x[i] = factor x[i] - subtrahend[i], which is added to sums[i], or begins it if it is
  // the first. subtrahend and sums may be null.
  void (*logit_gradients)(float* x, float factor, const float* subtrahend, int64_t n, bool first,
                          float* sums);

  // One panel's outputs of m rows: out = init + a (m, K) panel. Of block j, used[j] <= kBlock
  // outputs are there; blocks lie block_init and block_out apart. init may be null.
  void (*panel)(const float* a, int64_t lda, int64_t m, int64_t K, const float* panel,
                const float* init, int64_t ld_init, int64_t block_init, float* out, int64_t ldo,
                int64_t block_out, const int64_t* used);
  void (*panel_double)(const double* a, int64_t lda, int64_t m, int64_t K, const double* panel,
                       const double* init, int64_t ld_init, int64_t block_init, double* out,
                       int64_t ldo, int64_t block_out, const int64_t* used);

  // out (m, n), ldo apart, = init + a b. a is (m, K), lda apart, or strips of kStrip of its rows,
  // (K, kStrip), lda apart; b (K, n) has rows kPanel apart, whose last vector can be read to its
  // end. init may be null, or out.
  void (*product_panel)(const float* a, int64_t lda, bool strips, int64_t m, int64_t K,
                        const float* b, int64_t n, const float* init, int64_t ld_init, float* out,
                        int64_t ldo);
  // To strips, ld_strip apart, = n rows (n, m), ld apart, of their columns. Two numbers behind each
  // strip are written too.
  void (*pack_strips)(const float* rows, int64_t ld, int64_t n, int64_t m, float* strips,
                      int64_t ld_strip);
  // out (m,), = the sums of n numbers of each row of strips, or += them.
  void (*sum_strips)(const float* strips, int64_t ld_strip, int64_t n, int64_t m, bool add,
                     float* out);
  // to (N, M), ld_to apart, = from (M, N) transposed
  void (*transpose)(const float* from, int64_t ld, int64_t M, int64_t N, float* to, int64_t ld_to);

  // out[i][s] = sum_{c,j} w[i][c][j] x[c][s + j], i < N, s < n, a multiple of kPad
  void (*convolve)(const float* x, int64_t ldx, int64_t C, int64_t K, const float* w, int64_t N,
                   int64_t n, float* out, int64_t ldo);
  // out[i][j] += sum_s d[i][s] x[s + j], i < N, j < K, s < n, a multiple of kPad; x is read to
  // three numbers behind what it takes.
  void (*correlate)(const float* d, int64_t ld, int64_t N, const float* x, int64_t K, int64_t n,
                    float* out, int64_t ldo);
  void (*place_scores)(const Places& places, float* out);
  void (*place_gradients)(const Places& places, const float* g, const PlaceGradients& d);

  // n factors of dropout from a block of them on: `kept`, or zero where the random number, 32 bits,
  // is below the threshold.
  void (*dropout)(uint64_t key, int64_t block, int64_t n, uint64_t threshold, float kept,
                  float* out);
  // out = scale x + g for the n numbers of a block, kRandomBlock at most; each has a g of its own,
  // of Gumbel's distribution, below kMostPerturbed. What is below `least` may be -inf. Returns the
  // largest.
  float (*perturb)(const Draw& draw, int64_t block, const float* x, int64_t n, float least,
                   float* out);
  // The same of the logits x of some tokens.
  void (*perturb_some)(const Draw& draw, const int32_t* tokens, const float* x, int64_t n,
                       float* out);

  void (*advance)(Cell cell, const CellRows<float>& rows);
  // Backward, given what `advance` left; dh and dc in place.
  void (*retreat)(Cell cell, const float* gates, int64_t H, const float* hidden_before,
                  const float* cell_before, const float* memory, int64_t n, float* dh, float* dc,
                  float* dgates);

  // (rows, width) = [operands side by side] w, from their row `first` on; w is a panel of floats,
  // of bfloat16 or of kInt8.
  void (*packed_panel)(const Operand* operands, int64_t first, int64_t rows, const float* w,
                       int64_t width, const Sums& to);
  void (*packed_panel_half)(const Operand* operands, int64_t first, int64_t rows, const uint16_t* w,
                            int64_t width, const Sums& to);
  Bytes bytes;
  // One row of [operands side by side], into the same row of x.
  void (*quantise)(const Operand* operands, int64_t row, const QuantisedRows& x);
  void (*quantise_sixteen)(const Operand* operands, int64_t row, const SixteenRows& x);
  // Columns of x (n, width) as a panel of kInt8 has them, n filled up, and the scale of each; the
  // Euclidean norms of what rounding has taken from a column, and of its bytes times their scale.
  void (*to_bytes)(const float* x, int64_t n, int64_t width, uint8_t* out, float* scales,
                   float* taken, float* norms);
  // A panel of kInt6 as one of kInt8; so many times four rows
  void (*six_to_eight)(const uint8_t* w, int64_t fours, uint8_t* out);
  // n weights of bfloat16, a multiple of kBlock, as floats
  void (*unpack)(const uint16_t* w, int64_t n, float* out);
  // out[i] = bias[i] + [operands side by side] rows[i] of one row, i < n: the bits that
  // `packed_panel` makes. Row i is places[i] of w, rows that are ld apart.
  void (*dots)(const Operand* operands, int64_t row, const float* w, int64_t ld,
               const int32_t* places, int64_t n, const float* bias, float* out);
  void (*dots_half)(const Operand* operands, int64_t row, const uint16_t* w, int64_t ld,
                    const int32_t* places, int64_t n, const float* bias, float* out);
  // sum_i exp(near - top) (exp(exact - near) - 1): what a sum of exponentials lacks where `near`,
  // logits of all tokens, are in place of exact ones, as above but for their last bits.
  float (*excess)(const Operand* operands, int64_t row, const float* w, int64_t ld,
                  const int32_t* places, int64_t n, const float* bias, const float* near,
                  float top);
  float (*excess_half)(const Operand* operands, int64_t row, const uint16_t* w, int64_t ld,
                       const int32_t* places, int64_t n, const float* bias, const float* near,
                       float top);
  // A NaN, if there is one, is the largest.
  Peak (*peak)(const float* x, int64_t n);
  // The largest of x, of which none is NaN.
  float (*top)(const float* x, int64_t n);
  // The places of what is above the threshold, ascending; `out` holds n.
  int64_t (*above)(const float* x, int64_t n, float threshold, int32_t* out);
};

// The fastest that this processor has. ATEN_CPU_CAPABILITY=avx512, =avx2 (both without VNNI) or
// =default lowers it, as it does PyTorch's own kernels; =avx2_vnni lowers this alone.
extern const Loops loops;

}  // namespace seq2seq_fast
