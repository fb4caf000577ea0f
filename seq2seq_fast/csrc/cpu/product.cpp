// See product.h. A task has some rows of the result and some panels of kPanel columns. It goes
// through k in pieces, so that the piece of a panel, copied together, stays in the first level of
// the cache while all of the task's rows pass by.
#include "product.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>

#ifdef __x86_64__
#include <cpuid.h>
#endif

#include <string_view>

#include "loops.h"

namespace seq2seq_fast {
namespace {

constexpr int64_t kPiece = 128;      // of k: 32 KiB of a panel
constexpr int64_t kRowsOfTask = 96;  // at least: enough for what is copied to be little

// MKL makes no use of AMD's AVX-512. From Zen 5 (family 26) on that is half of what there is: 150
// to 210 GFLOP/s on two cores, where these loops have 350 to 460. On Zen 4 (of family 25 the only
// one that has AVX-512), whose vectors of 512 bits take two turns, it is 100 to 175 against 120 to
// 195, and 1 to 6 % of a training step. On Intel's processors MKL has the edge.
bool ours_are_faster() {
#ifdef __x86_64__
  static const bool faster = [] {
    unsigned a, b, c, d;
    if (!__builtin_cpu_is("amd") || __get_cpuid(1, &a, &b, &c, &d) == 0) return false;
    const unsigned family = (a >> 8 & 15) + (a >> 20 & 255);
    return family >= 25 && std::string_view(loops.name).starts_with("avx512");
  }();
  return faster;
#else
  return false;
#endif
}

void by_blas(const Tensor& out, const Tensor& a, const Tensor& b, bool add) {
  STABLE_TORCH_ERROR_CODE_CHECK(
      add ? aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0)
          : aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

struct Strided {
  const float* data;
  int64_t row, column;
  Strided(const float* data_, int64_t row_, int64_t column_)
      : data(data_), row(row_), column(column_) {}
  explicit Strided(const Tensor& x)
      : data(static_cast<const float*>(x.data_ptr())), row(x.stride(0)), column(x.stride(1)) {}
  Strided transposed() const { return {data, column, row}; }
  const float* at(int64_t i, int64_t j) const { return data + i * row + j * column; }

  // to (rows, columns), ld apart, = those from (i, j) on
  void copy(int64_t i, int64_t j, int64_t rows, int64_t columns, float* to, int64_t ld) const {
    const float* from = at(i, j);
    if (column == 1) {
      for (int64_t r = 0; r < rows; ++r) std::copy_n(from + r * row, columns, to + r * ld);
    } else if (row == 1) {
      loops.transpose(from, column, columns, rows, to, ld);
    } else {
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; ++c) to[r * ld + c] = from[r * row + c * column];
    }
  }
};

void by_loops(const Tensor& out, const Tensor& a_, const Tensor& b_, bool add) {
  const Strided a(a_), b(b_);
  const int64_t M = out.size(0), N = out.size(1), K = a_.size(1), ldo = out.stride(0);
  float* const to = static_cast<float*>(out.data_ptr());
  if (M == 0 || N == 0) return;
  if (K == 0 && !add)
    for (int64_t i = 0; i < M; ++i) std::fill_n(to + i * ldo, N, 0.f);
  const int64_t panels = (N + kPanel - 1) / kPanel;
  const int64_t wanted = 4 * static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t chunks = std::clamp<int64_t>(M / kRowsOfTask, 1, std::max(wanted, M / 768));
  const int64_t groups = std::clamp<int64_t>(wanted / chunks, 1, panels);
  const int64_t rows = (M + chunks - 1) / chunks, each = (panels + groups - 1) / groups;
  parallel(chunks * groups, rows * each * K * kPanel / 16, [&](int64_t begin, int64_t end) {
    Buffer<float> panel(kPiece * kPanel), copied(a.column == 1 ? 0 : kPiece * rows);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % chunks * rows, m = std::min(rows, M - first);
      const int64_t first_panel = task / chunks * each;
      for (int64_t k = 0; k < K && m > 0; k += kPiece) {
        const int64_t piece = std::min(kPiece, K - k);
        const bool across = a.column != 1;
        if (across) a.transposed().copy(k, first, piece, m, copied, m);
        for (int64_t p = first_panel; p < std::min(panels, first_panel + each); ++p) {
          const int64_t column = p * kPanel, n = std::min(kPanel, N - column);
          const int64_t filled = round_up(n, kBlock);
          b.copy(k, column, piece, n, panel, kPanel);
          for (int64_t i = 0; n < filled && i < piece; ++i)
            std::fill_n(panel + i * kPanel + n, filled - n, 0.f);
          loops.product_panel(across ? copied : a.at(first, k), across ? m : a.row, across, m,
                              piece, panel, n, to + first * ldo + column, ldo, add || k > 0);
        }
      }
    }
  });
}

// blas: which of the two is taken; None for the faster one.
Tensor product_op(Tensor a, Tensor b, std::optional<bool> blas) {
  STD_TORCH_CHECK(
      a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0) && a.scalar_type() == b.scalar_type(),
      "expected a (M, K) and b (K, N) of one dtype");
  Tensor out = empty(a, {a.size(0), b.size(1)});
  if (!blas) {
    product(out, a, b);
  } else if (*blas) {
    by_blas(out, a, b, false);
  } else {
    STD_TORCH_CHECK(a.scalar_type() == ScalarType::Float, "expected float32");
    by_loops(out, a, b, false);
  }
  return out;
}

}  // namespace

void product(const Tensor& out, const Tensor& a, const Tensor& b, bool add) {
  if (out.scalar_type() == ScalarType::Float && ours_are_faster())
    by_loops(out, a, b, add);
  else
    by_blas(out, a, b, add);
}

}  // namespace seq2seq_fast

STABLE_TORCH_LIBRARY_IMPL(seq2seq_fast, CPU, m) {
  m.impl("product", TORCH_BOX(&seq2seq_fast::product_op));
}
