// See product.h. A task has some rows of the result and some panels of kPanel columns. It goes
// through k in pieces, so that the piece of a panel, copied together, stays in the first levels of
// the cache while all of the task's rows pass by. Rows whose numbers are not next to each other are
// copied too, in strips of as many as meet a panel at once.
#include "product.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>

#ifdef __x86_64__
#include <cpuid.h>
#endif

#include <algorithm>
#include <array>
#include <limits>
#include <numeric>
#include <string_view>
#include <vector>

#include "loops.h"

namespace seq2seq_fast {
namespace {

constexpr int64_t kPiece = 512;  // of k: 128 KiB of a panel
// Of a task: enough for what is copied to be little, but such that most of a piece of them stays in
// the cache's second level.
constexpr int64_t kLeastRows = 96, kMostRows = 512;
// What a task does beside multiplying, in multiply-adds: to copy a number, and to have one from the
// third level of the cache that another task has had already.
constexpr int64_t kOfCopy = 32, kOfReading = 3;
constexpr int64_t kLine = 16;   // of floats, by which strips do not begin in the same set
constexpr double kIdle = 0.03;  // of a task, in which threads wait for the last one
// Rows that meet a weight as it lies: at most kInPlace, and one for each kOfSums of k, beside which
// adding up lanes at the end is little.
constexpr int64_t kInPlace = 16, kOfSums = 32;

// Multiply-adds of a product up to which the loops here are faster than MKL, in float32. MKL makes
// no use of AMD's AVX-512. From Zen 5 (family 26) on that is half of what there is: 150 to 210
// GFLOP/s on two cores, where these loops have 350 to 460. On Zen 4 (of family 25 the only one that
// has AVX-512), whose vectors of 512 bits take two turns, it is 80 to 195 against 120 to 215,
// large ones from 165 on, of 230 that two cores can do; with AVX2 alone 30 to 190 against 55 to
// 205. On Intel's processors (measured on Emerald Rapids) these loops have the edge for small
// products, and where several have one factor; MKL, by a tenth, for large ones.
int64_t most_of_ours() {
  static const int64_t most = []() -> int64_t {
    const std::string_view name = loops.name;
    const bool wide = name.starts_with("avx512");
    if (!wide && !name.starts_with("avx2")) return 0;
#ifdef __x86_64__
    unsigned a, b, c, d;
    if (__get_cpuid(1, &a, &b, &c, &d) == 0) return 0;
    const unsigned family = (a >> 8 & 15) + (a >> 20 & 255);
    if (__builtin_cpu_is("amd") && family >= 25) return INT64_MAX;
    if (__builtin_cpu_is("intel") && wide) return int64_t{1} << 29;
#endif
    return 0;
  }();
  return most;
}

void by_blas(const Tensor& out, const Tensor& a, const Tensor& b, const Tensor* init) {
  STABLE_TORCH_ERROR_CODE_CHECK(
      init ? aoti_torch_cpu_addmm_out(out.get(), init->get(), a.get(), b.get(), 1.0, 1.0)
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

  // To strips (see loops.h), ld apart, = those rows from (i, j) on.
  void pack(int64_t i, int64_t j, int64_t rows, int64_t columns, float* strips, int64_t ld) const {
    const float* from = at(i, j);
    if (row == 1) return loops.pack_strips(from, column, columns, rows, strips, ld);
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t r = 0; r < rows; ++r)
        strips[r / kStrip * ld + c * kStrip + r % kStrip] = from[r * row + c * column];
  }
};

// Up to kPanel columns of a result, and what they are made of.
struct Panel {
  Strided b;
  int64_t first, n, ld_init, ldo;  // columns of b and out
  const float* init;
  float* out;
};
void add_panels(std::vector<Panel>& to, const Tensor& out, const Tensor& b, const Tensor* init) {
  const int64_t N = out.size(1);
  for (int64_t j = 0; j < N; j += kPanel)
    to.push_back({Strided(b), j, std::min(kPanel, N - j),
                  init && init->dim() == 2 ? init->stride(0) : 0, out.stride(0),
                  init ? static_cast<const float*>(init->data_ptr()) + j : nullptr,
                  static_cast<float*>(out.data_ptr()) + j});
}

// Of the rows that count, of `all` where none are named, those from the `begin`th to the `end`th:
// f(first, count, how many of them come before), run by run.
template <typename F>
void over_runs(const RowRuns& runs, int64_t begin, int64_t end, F f) {
  if (runs.empty()) return f(begin, end - begin, 0);
  int64_t before = 0;  // rows of the runs before
  for (const RowRun& run : runs) {
    const int64_t from = std::max(begin - before, int64_t{0});
    const int64_t count = std::min(run.count, end - before) - from;
    if (count > 0) f(run.first + from, count, before + from - begin);
    before += run.count;
  }
}
int64_t rows_of(const RowRuns& runs, int64_t all) {
  return runs.empty() ? all
                      : std::accumulate(runs.begin(), runs.end(), int64_t{0},
                                        [](int64_t n, RowRun run) { return n + run.count; });
}

int64_t parts(int64_t n, int64_t each) { return (n + each - 1) / each; }

struct Task {
  int64_t rows, panels;
};
// Of a (M, K), copied or not, by so many panels: such that all tasks together take the least time.
Task divide(int64_t M, int64_t panels, bool copied) {
  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t fewest = parts(M, kMostRows), most = std::max(fewest, M / kLeastRows);
  Task best = {};
  double least = std::numeric_limits<double>::infinity();
  for (int64_t chunks = fewest; chunks <= std::min(most, fewest + threads); ++chunks)
    for (int64_t turns = 1; turns <= 8; turns *= 2) {
      const int64_t groups = std::clamp<int64_t>(parts(turns * threads, chunks), 1, panels);
      const Task task = {parts(M, chunks), parts(panels, groups)};
      const int64_t tasks = parts(M, task.rows) * parts(panels, task.panels);
      const int64_t columns = task.panels * kPanel, of_row = copied ? kOfCopy : kOfReading;
      const int64_t operations = task.rows * columns + kOfCopy * columns + of_row * task.rows;
      const double time = (parts(tasks, threads) + kIdle) * static_cast<double>(operations);
      if (time < least) least = time, best = task;
    }
  return best;
}

// What a (M, K) is multiplied by may be columns of several matrices: a is read once for all, and
// for the sums (M,) of its rows. Those, and the choice of K's rows, can be had of an `a` that is
// copied, its columns not next to each other; the choice of M's of one that is not.
void by_loops(const Tensor& a_, const std::vector<Panel>& all, float* sums = nullptr,
              const RowRuns& of_m = {}, const RowRuns& of_k = {}) {
  const Strided a(a_);
  const int64_t M = rows_of(of_m, a_.size(0)), K = rows_of(of_k, a_.size(1));
  const int64_t panels = static_cast<int64_t>(all.size());
  if (M == 0 || panels == 0) return;
  const bool copies = a.column != 1;
  const Task each = divide(M, panels, copies);
  const int64_t chunks = parts(M, each.rows), groups = parts(panels, each.panels);
  // Pieces of one size: the results are read and written again for each.
  const int64_t piece = K == 0 ? 0 : parts(K, parts(K, kPiece));
  const int64_t ld_strip = piece * kStrip + kLine;
  parallel_in_turns(chunks * groups, each.rows * each.panels * K * kPanel / 16, [&](int64_t task) {
    const int64_t first = task % chunks * each.rows, m = std::min(each.rows, M - first);
    const int64_t first_panel = task / chunks * each.panels;
    Buffer<float> panel(piece * kPanel), strips(copies ? parts(m, kStrip) * ld_strip : 0);
    for (int64_t k = 0; k < K || k == 0; k += std::max<int64_t>(piece, 1)) {
      const int64_t n_k = std::min(piece, K - k);
      if (copies)
        over_runs(of_k, k, k + n_k, [&](int64_t from, int64_t n, int64_t before) {
          a.pack(first, from, m, n, strips + before * kStrip, ld_strip);
        });
      if (sums != nullptr && first_panel == 0)
        loops.sum_strips(strips, ld_strip, n_k, m, k > 0, sums + first);
      for (int64_t i = first_panel; i < std::min(panels, first_panel + each.panels); ++i) {
        const Panel& p = all[i];
        const int64_t filled = round_up(p.n, kBlock);
        over_runs(of_k, k, k + n_k, [&](int64_t from, int64_t n, int64_t before) {
          p.b.copy(from, p.first, n, p.n, panel + before * kPanel, kPanel);
        });
        for (int64_t r = 0; p.n < filled && r < n_k; ++r)
          std::fill_n(panel + r * kPanel + p.n, filled - p.n, 0.f);
        over_runs(of_m, first, first + m, [&](int64_t row, int64_t n, int64_t) {
          float* const out = p.out + row * p.ldo;
          const float* const init = k > 0 ? out : p.init ? p.init + row * p.ld_init : nullptr;
          loops.product_panel(copies ? strips : a.at(row, k), copies ? ld_strip : a.row, copies, n,
                              n_k, panel, p.n, init, k > 0 ? p.ldo : p.ld_init, out, p.ldo);
        });
      }
    }
  });
}
void by_loops(const Tensor& out, const Tensor& a, const Tensor& b, const Tensor* init,
              const RowRuns& rows = {}) {
  std::vector<Panel> panels;
  add_panels(panels, out, b, init);
  by_loops(a, panels, nullptr, a.stride(1) == 1 ? rows : RowRuns());
}

// Of few rows, with a weight's (N, K), of which a copy would take longer than the product.
void by_rows(const Tensor& out, const Tensor& a_, const Tensor& b_, const Tensor* init) {
  const Strided a(a_), w = Strided(b_).transposed();
  const int64_t M = a_.size(0), K = a_.size(1), N = b_.size(1), ldo = out.stride(0);
  const int64_t ld_init = init && init->dim() == 2 ? init->stride(0) : 0;
  auto* const to = static_cast<float*>(out.data_ptr());
  const auto* const from = init ? static_cast<const float*>(init->data_ptr()) : nullptr;
  parallel(parts(N, kBlock), std::max(M, kRowsOfReading) * K, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin * kBlock; j < std::min(N, end * kBlock); j += kBlock) {
      const int64_t n = std::min(kBlock, N - j);
      product_in_place(a.data, a.row, M, K, w.at(j, 0), w.row, n, from ? from + j : nullptr,
                       ld_init, to + j, ldo, n);
    }
  });
}
bool are_few(const Tensor& a, const Tensor& b) {
  return a.scalar_type() == ScalarType::Float && a.stride(1) == 1 && b.stride(0) == 1 &&
         b.size(1) > 1 && a.size(0) <= std::min(kInPlace, a.size(1) / kOfSums);
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
    by_blas(out, a, b, nullptr);
  } else {
    STD_TORCH_CHECK(a.scalar_type() == ScalarType::Float, "expected float32");
    by_loops(out, a, b, nullptr);
  }
  return out;
}

// Whether a (M, K) and N columns are multiplied here.
bool by_ours(const Tensor& a, int64_t N) {
  return a.scalar_type() == ScalarType::Float && a.numel() * N < most_of_ours();
}

Tensor sums_of_rows(const Tensor& a) {
  constexpr std::array<int64_t, 1> kColumns = {1};
  return torch::stable::sum(a, kColumns);
}

// The rows of x (K, N) that count, one behind the other.
Tensor gathered(const Tensor& x, const RowRuns& runs) {
  const int64_t N = x.size(1);
  const Tensor out = empty(x, {rows_of(runs, 0), N});
  int64_t before = 0;
  for (const auto& [first, count] : runs) {
    copy(view(out, {count, N}, {N, 1}, before * N),
         view(x, {count, N}, {x.stride(0), x.stride(1)}, first * x.stride(0)));
    before += count;
  }
  return out;
}

// Of each b, and then, where `sums` asks for it, of ones. Of K rows, a multiple of how many
// batch_sizes there are, others than the first of each part are zeros in a, whatever b has there.
std::vector<Tensor> products_op(Tensor a, std::vector<Tensor> b, bool sums,
                                std::vector<int64_t> batch_sizes) {
  std::vector<Tensor> outs;
  for (const Tensor& x : b) {
    STD_TORCH_CHECK(a.dim() == 2 && x.dim() == 2 && a.size(1) == x.size(0) &&
                        a.scalar_type() == x.scalar_type(),
                    "expected a (M, K) and each of b (K, N) of one dtype");
    outs.push_back(empty(a, {a.size(0), x.size(1)}));
  }
  int64_t columns = 0;
  for (const Tensor& x : b) columns += x.size(1);
  RowRuns rows;
  if (const auto steps = static_cast<int64_t>(batch_sizes.size()); steps > 0) {
    const int64_t each = a.size(1) / steps;
    const auto fits = [&](int64_t n) { return 0 <= n && n <= each; };
    STD_TORCH_CHECK(each * steps == a.size(1) && std::ranges::all_of(batch_sizes, fits),
                    "expected batch_sizes of as many equal parts of K");
    rows = runs_of(batch_sizes, each);
  }
  const bool ours = by_ours(a, columns);
  if (!rows.empty() && !(ours && a.stride(1) != 1)) {
    a = transposed(gathered(transposed(a), rows));
    for (Tensor& x : b) x = gathered(x, rows);
    rows.clear();
  }
  if (ours) {
    std::vector<Panel> panels;
    for (size_t i = 0; i < b.size(); ++i) add_panels(panels, outs[i], b[i], nullptr);
    const bool with_sums = sums && !panels.empty() && a.stride(1) != 1;
    Tensor of_rows = empty(a, {with_sums ? a.size(0) : 0});
    by_loops(a, panels, with_sums ? static_cast<float*>(of_rows.data_ptr()) : nullptr, {}, rows);
    if (sums) outs.push_back(with_sums ? of_rows : sums_of_rows(a));
  } else {
    for (size_t i = 0; i < b.size(); ++i) by_blas(outs[i], a, b[i], nullptr);
    if (sums) outs.push_back(sums_of_rows(a));
  }
  return outs;
}

}  // namespace

void product_in_place(const float* a, int64_t lda, int64_t m, int64_t K, const float* w, int64_t ld,
                      int64_t n, const float* init, int64_t ld_init, float* out, int64_t ldo,
                      int64_t used) {
  float sums[kBlock * kBlock];
  for (int64_t first = 0; first < m; first += kBlock) {
    const int64_t rows = std::min(kBlock, m - first);
    loops.products(a + first * lda, lda, w, ld, rows, n, K, sums, kBlock);
    for (int64_t i = 0; i < rows; ++i) {
      const float* from = init ? init + (first + i) * ld_init : nullptr;
      float* to = out + (first + i) * ldo;
      for (int64_t j = 0; j < used; ++j)
        to[j] = (from ? from[j] : 0.f) + (j < n ? sums[i * kBlock + j] : 0.f);
    }
  }
}

RowRuns runs_of(const std::vector<int64_t>& sizes, int64_t B) {
  RowRuns runs;
  for (size_t t = 0; t < sizes.size(); ++t) {
    const int64_t first = static_cast<int64_t>(t) * B;
    if (!runs.empty() && runs.back().first + runs.back().count == first)
      runs.back().count += sizes[t];
    else
      runs.push_back({first, sizes[t]});
  }
  return runs;
}

void product(const Tensor& out, const Tensor& a, const Tensor& b, const Tensor* init,
             const RowRuns& rows) {
  if (are_few(a, b))
    by_rows(out, a, b, init);
  else if (by_ours(a, b.size(1)))
    by_loops(out, a, b, init, rows);
  else
    by_blas(out, a, b, init);
}

}  // namespace seq2seq_fast

STABLE_TORCH_LIBRARY_IMPL(seq2seq_fast, CPU, m) {
  m.impl("product", TORCH_BOX(&seq2seq_fast::product_op));
  m.impl("products", TORCH_BOX(&seq2seq_fast::products_op));
}
