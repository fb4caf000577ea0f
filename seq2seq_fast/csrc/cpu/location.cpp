#include "location.h"

#include <cmath>
#include <type_traits>

namespace seq2seq_fast {
namespace {

constexpr int64_t kPart = 128;  // of D, where a context is shared out

// float64 in plain loops; see loops.h.
void convolve(const double* x, int64_t ldx, int64_t C, int64_t K, const double* w, int64_t N,
              int64_t n, double* out, int64_t ldo) {
  for (int64_t i = 0; i < N; ++i)
    for (int64_t s = 0; s < n; ++s) {
      double sum = 0;
      for (int64_t c = 0; c < C; ++c)
        for (int64_t j = 0; j < K; ++j) sum += w[(i * C + c) * K + j] * x[c * ldx + s + j];
      out[i * ldo + s] = sum;
    }
}
void correlate(const double* d, int64_t ld, int64_t N, const double* x, int64_t K, int64_t n,
               double* out, int64_t ldo) {
  for (int64_t i = 0; i < N; ++i)
    for (int64_t j = 0; j < K; ++j)
      for (int64_t s = 0; s < n; ++s) out[i * ldo + j] += d[i * ld + s] * x[s + j];
}
double tanh_at(const PlacesOf<double>& p, int64_t s, int64_t a) {
  double x = p.query[a] + p.keys[s * p.ld + a];
  for (int64_t n = 0; n < p.N; ++n)
    x += p.features[n * p.ld_features + s] * p.projection[n * p.width + a];
  return std::tanh(x);
}
void place_scores(const PlacesOf<double>& p, double* out) {
  for (int64_t s = 0; s < p.count; ++s) {
    out[s] = 0;
    for (int64_t a = 0; a < p.width; ++a) out[s] += p.v[a] * tanh_at(p, s, a);
  }
}
void place_gradients(const PlacesOf<double>& p, const double* g,
                     const PlaceGradientsOf<double>& d) {
  for (int64_t n = 0; n < p.N; ++n)
    std::fill_n(d.features + n * d.ld_features, round_up(p.count, kPad), 0.);
  for (int64_t s = 0; s < p.count; ++s)
    for (int64_t a = 0; g[s] != 0 && a < p.width; ++a) {
      const double y = tanh_at(p, s, a), before = g[s] * p.v[a] * ((1 - y) * (1 + y));
      d.query[a] += before, d.v[a] += g[s] * y;
      d.keys[s * p.ld + a] += before;
      for (int64_t n = 0; n < p.N; ++n) {
        d.projection[n * p.width + a] += before * p.features[n * p.ld_features + s];
        d.features[n * d.ld_features + s] += before * p.projection[n * p.width + a];
      }
    }
}

void convolve(const float* x, int64_t ldx, int64_t C, int64_t K, const float* w, int64_t N,
              int64_t n, float* out, int64_t ldo) {
  loops.convolve(x, ldx, C, K, w, N, n, out, ldo);
}
void correlate(const float* d, int64_t ld, int64_t N, const float* x, int64_t K, int64_t n,
               float* out, int64_t ldo) {
  loops.correlate(d, ld, N, x, K, n, out, ldo);
}
void place_scores(const Places& p, float* out) { loops.place_scores(p, out); }
void place_gradients(const Places& p, const float* g, const PlaceGradients& d) {
  loops.place_gradients(p, g, d);
}

// Softmax over the places that are attended to; its gradient, in place.
void softmax_of(double* x, int64_t S, const bool* mask, int64_t stride) {
  double top = -INFINITY, total = 0;
  for (int64_t s = 0; s < S; ++s)
    if ((!mask || mask[s * stride]) && x[s] > top) top = x[s];
  for (int64_t s = 0; s < S; ++s) {
    x[s] = !mask || mask[s * stride] ? std::exp(x[s] - top) : 0;
    total += x[s];
  }
  for (int64_t s = 0; s < S; ++s) x[s] = !mask || mask[s * stride] ? x[s] / total : 0;
}
void softmax_of(float* x, int64_t S, const bool* mask, int64_t stride) {
  loops.softmax(x, S, 1.f, nullptr, mask, stride);
}
void softmax_backward(double* dw, const double* w, int64_t S) {
  double dot = 0;
  for (int64_t s = 0; s < S; ++s) dot += dw[s] * w[s];
  for (int64_t s = 0; s < S; ++s) dw[s] = w[s] * (dw[s] - dot);
}
void softmax_backward(float* dw, const float* w, int64_t S) { loops.softmax_backward(dw, w, S); }

// to (n, m), rows ld apart and filled up with zeros, = x (n, m) of any strides, or its transpose
template <typename A>
void copy_padded(const Tensor& x, int64_t sn, int64_t sm, int64_t n, int64_t m, A* to, int64_t ld) {
  const A* from = data<A>(x);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < m; ++j) to[i * ld + j] = from[i * sn + j * sm];
    std::fill_n(to + i * ld + m, ld - m, A(0));
  }
}

}  // namespace

template <typename A>
Location<A>::Location(const std::vector<Tensor>& filters, const std::vector<int64_t>& accumulates,
                      const Tensor& keys, const Tensor& values, const Tensor& v,
                      const std::optional<Tensor>& mask)
    : accumulates_(accumulates),
      values_(values),
      B_(keys.size(0)),
      S_(keys.size(1)),
      A_(keys.size(2)),
      Ap_(round_up(A_, kPadPlaces)),
      Sp_(round_up(S_, kPad)),
      N_(filters[0].size(0)),
      Np_(round_up(N_, kPad)),
      C_(filters[0].size(1)),
      K_(filters[0].size(2)),
      D_(values.size(2)),
      like_(keys),
      mask_(mask ? data<const bool>(*mask) : nullptr),
      mask_stride_{mask ? mask->stride(0) : 0, mask ? mask->stride(1) : 0},
      conv_(N_ * C_ * K_),
      flipped_(N_ * C_ * K_),
      projection_(N_ * Ap_),
      transposed_(Ap_ * Np_),
      v_(Ap_),
      own_keys_(keys.is_contiguous() && A_ == Ap_ ? 0 : B_ * S_ * Ap_) {
  const Tensor &conv = filters[0], &projection = filters[1];
  for (const Tensor& x : {conv, projection, v})
    STD_TORCH_CHECK(x.scalar_type() == keys.scalar_type(), "expected tensors of one dtype");
  STD_TORCH_CHECK(static_cast<int64_t>(accumulates.size()) == C_ && K_ % 2 == 1,
                  "expected conv (N, C, K) with an odd K, and whether each of C accumulates");
  STD_TORCH_CHECK(projection.size(0) == A_ && projection.size(1) == N_,
                  "expected projection (A, N)");
  for (int64_t n = 0; n < N_; ++n)
    for (int64_t c = 0; c < C_; ++c)
      for (int64_t j = 0; j < K_; ++j) {
        const A w = data<A>(conv)[n * conv.stride(0) + c * conv.stride(1) + j * conv.stride(2)];
        conv_[(n * C_ + c) * K_ + j] = w;
        flipped_[(c * N_ + n) * K_ + K_ - 1 - j] = w;
      }
  const int64_t sa = projection.stride(0), sn = projection.stride(1);
  copy_padded<A>(projection, sn, sa, N_, A_, projection_, Ap_);
  copy_padded<A>(projection, sa, sn, A_, N_, transposed_, Np_);
  std::fill_n(transposed_ + A_ * Np_, (Ap_ - A_) * Np_, A(0));
  copy_padded<A>(v, 0, v.stride(0), 1, A_, v_, Ap_);
  if (keys.is_contiguous() && A_ == Ap_) {
    keys_ = data<A>(keys);
    return;
  }
  keys_ = own_keys_;
  parallel(B_, S_ * A_, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      copy_padded<A>(view(keys, {S_, A_}, {keys.stride(1), keys.stride(2)}, b * keys.stride(0)),
                     keys.stride(1), keys.stride(2), S_, A_, own_keys_ + b * S_ * Ap_, Ap_);
  });
}

// The state with zeros around it, as filters read it, (C, padded_width()); the query, filled up.
template <typename A>
void Location<A>::prepare(const Row& row, const Room& room) const {
  const int64_t ld = padded_width(), before = K_ / 2;
  A* to = room.padded;
  for (int64_t c = 0; c < C_; ++c, to += ld) {
    std::fill_n(to, before, A(0));
    std::copy_n(row.state + c * S_, S_, to + before);
    std::fill(to + before + S_, to + ld, A(0));
  }
  std::fill(std::copy_n(row.query, A_, +room.query), room.query + Ap_, A(0));
}

// A chunk of them from s on, and the features of what `prepare` has left.
template <typename A>
PlacesOf<A> Location<A>::places(int64_t b, int64_t s, const Room& room) const {
  const int64_t n = std::min(kChunk, S_ - s);
  convolve(room.padded + s, padded_width(), C_, K_, conv_, N_, round_up(n, kPad), room.features,
           kChunk);
  return {n,   Ap_,           N_,     room.query,  keys_ + (b * S_ + s) * Ap_,
          Ap_, room.features, kChunk, projection_, v_};
}

template <typename A>
void Location<A>::score(const Row& row, int64_t s, const Room& room) const {
  const bool* mask = mask_ ? mask_ + row.b * mask_stride_[0] : nullptr;
  const int64_t end = std::min(s + kChunk, S_);
  bool attended = mask == nullptr;
  for (int64_t i = s; i < end && !attended; ++i) attended = mask[i * mask_stride_[1]];
  if (attended)
    place_scores(places(row.b, s, room), row.weights + s);
  else
    std::fill(row.weights + s, row.weights + end, A(0));
}

// From scores to weights, and to the next state.
template <typename A>
void Location<A>::weigh(const Row& row) const {
  softmax_of(row.weights, S_, mask_ ? mask_ + row.b * mask_stride_[0] : nullptr, mask_stride_[1]);
  for (int64_t c = 0; c < C_; ++c) {
    const A *from = row.state + c * S_, *w = row.weights;
    A* to = row.next + c * S_;
    for (int64_t s = 0; s < S_; ++s) to[s] = accumulates_[c] ? from[s] + w[s] : w[s];
  }
}

// n numbers of the context from d on.
template <typename A>
void Location<A>::read_values(const Row& row, int64_t d, int64_t n) const {
  const Rows<A> values(values_);
  const Buffer<A> scratch(values.scratch(S_));
  const auto rows = values.block(row.b, 0, S_, scratch);
  A* out = row.context + d;
  if constexpr (std::is_same_v<A, float>) {
    loops.weighted_rows(row.weights, S_, 1, rows.data + d, rows.ld, 1, S_, n, out, n);
  } else {
    std::fill_n(out, n, A(0));
    for (int64_t s = 0; s < S_; ++s)
      for (int64_t i = 0; i < n; ++i) out[i] += row.weights[s] * rows.data[s * rows.ld + d + i];
  }
}

template <typename A>
void Location<A>::attend(const Row& row, const Room& room) const {
  prepare(row, room);
  for (int64_t s = 0; s < S_; s += kChunk) score(row, s, room);
  weigh(row);
  read_values(row, 0, D_);
}

template <typename A>
void Location<A>::attend(const std::vector<Row>& rows) const {
  const auto n = static_cast<int64_t>(rows.size());
  const int64_t of_place = (C_ * K_ * N_ + Ap_ * (N_ + 20)) / 16;
  const int64_t threads = torch::stable::get_num_threads();
  if (n >= 4 * threads || is_small(n, S_ * of_place)) {
    parallel(n, S_ * (of_place + D_ / 4), [&](int64_t begin, int64_t end) {
      const Room room(*this);
      for (int64_t i = begin; i < end; ++i) attend(rows[i], room);
    });
    return;
  }
  const int64_t chunks = (S_ + kChunk - 1) / kChunk, parts = (D_ + kPart - 1) / kPart;
  parallel(n * chunks, kChunk * of_place, [&](int64_t begin, int64_t end) {
    const Room room(*this);
    for (int64_t i = begin; i < end; ++i) {
      const Row& row = rows[i / chunks];
      if (i == begin || i % chunks == 0) prepare(row, room);
      score(row, i % chunks * kChunk, room);
    }
  });
  parallel(n, 6 * S_, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) weigh(rows[i]);
  });
  parallel(n * parts, S_ * kPart / 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t d = i % parts * kPart;
      read_values(rows[i / parts], d, std::min(kPart, D_ - d));
    }
  });
}

template <typename A>
void Location<A>::begin_backward(const Tensor& dstate, bool detach) {
  detach_ = detach;
  const auto zeros = [](std::optional<Buffer<A>>& x, int64_t n) {
    x.emplace(n);
    std::fill_n(static_cast<A*>(*x), n, A(0));
  };
  const int64_t sources = std::max<int64_t>(B_, 1);  // a sum over none is zero
  dkeys_.emplace(empty(like_, {B_, S_, A_}));
  if (A_ == Ap_)
    std::fill_n(at_dkeys_ = data<A>(*dkeys_), B_ * S_ * A_, A(0));
  else
    zeros(padded_dkeys_, B_ * S_ * Ap_), at_dkeys_ = *padded_dkeys_;
  zeros(dv_, sources * Ap_);
  zeros(dprojection_, sources * N_ * Ap_);
  zeros(dconv_, sources * N_ * C_ * K_);
  dstate_.emplace(B_ * C_ * S_);
  const Tensor dense = torch::stable::contiguous(dstate);
  std::copy_n(data<A>(dense), B_ * C_ * S_, static_cast<A*>(*dstate_));
}

// out (S,) = dcontext (D,) with each of the values
template <typename A>
void Location<A>::products_with_values(int64_t b, const A* dcontext, A* out) const {
  const Rows<A> values(values_);
  const Buffer<A> scratch(values.scratch(S_));
  const auto rows = values.block(b, 0, S_, scratch);
  if constexpr (std::is_same_v<A, float>) {
    loops.products(dcontext, D_, rows.data, rows.ld, 1, S_, D_, out, S_);
  } else {
    for (int64_t s = 0; s < S_; ++s) {
      out[s] = 0;
      for (int64_t d = 0; d < D_; ++d) out[s] += dcontext[d] * rows.data[s * rows.ld + d];
    }
  }
}

template <typename A>
void Location<A>::attend_backward(int64_t rows, const A* dcontext, const A* dweights,
                                  const A* query, const A* state, const A* weights, A* dscores,
                                  A* dquery) {
  const int64_t numbers = state_numbers(), before = K_ / 2, ld = padded_width();
  const int64_t of_place = D_ / 4 + (3 * C_ * K_ * N_ + Ap_ * (3 * N_ + 40)) / 16;
  parallel(rows, S_ * of_place, [&](int64_t begin, int64_t end) {
    const Room room(*this);
    const Buffer<A> dq(Ap_), g(Sp_), before_tanh(kPad * Ap_), dfeatures(N_ * ld), dx(C_ * Sp_);
    std::fill_n(+dfeatures, N_ * ld, A(0));
    std::fill_n(+g, Sp_, A(0));
    for (int64_t b = begin; b < end; ++b) {
      const A* w = weights + b * S_;
      A* carried = *dstate_ + b * numbers;
      products_with_values(b, dcontext + b * D_, g);
      for (int64_t s = 0; s < S_; ++s) g[s] += dweights[b * S_ + s];
      for (int64_t c = 0; c < C_ && !detach_; ++c)
        for (int64_t s = 0; s < S_; ++s) g[s] += carried[c * S_ + s];
      softmax_backward(g, w, S_);
      std::copy_n(+g, S_, dscores + b * S_);
      if constexpr (std::is_same_v<A, float>) loops.scale_and_flush(g, S_, 1.f);

      prepare({b, query + b * A_, state + b * numbers, nullptr, nullptr, nullptr}, room);
      std::fill_n(+dq, Ap_, A(0));
      for (int64_t s = 0; s < S_; s += kChunk)
        place_gradients(
            places(b, s, room), g + s,
            {dq, *dv_ + b * Ap_, *dprojection_ + b * N_ * Ap_, at_dkeys_ + (b * S_ + s) * Ap_,
             dfeatures + before + s, ld, transposed_, Np_, before_tanh});
      std::copy_n(+dq, A_, dquery + b * A_);
      for (int64_t c = 0; c < C_; ++c)
        correlate(dfeatures + before, ld, N_, room.padded + c * ld, K_, Sp_,
                  *dconv_ + (b * N_ * C_ + c) * K_, C_ * K_);
      // To the state: the filters backwards, over gradients with zeros around them.
      convolve(dfeatures, ld, N_, K_, flipped_, C_, Sp_, dx, Sp_);
      for (int64_t c = 0; c < C_; ++c)
        for (int64_t s = 0; s < S_; ++s) {
          A& to = carried[c * S_ + s];
          to = (accumulates_[c] ? to : A(0)) + dx[c * Sp_ + s];
        }
    }
  });
}

template <typename A>
std::array<Tensor, 5> Location<A>::results() const {
  const Tensor &dkeys = *dkeys_, dv = empty(like_, {A_});
  const Tensor dconv = empty(like_, {N_, C_, K_}), dprojection = empty(like_, {A_, N_});
  const Tensor dstate = empty(like_, {B_, C_, S_});
  parallel(A_ == Ap_ ? 0 : B_, S_ * A_ / 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * S_; i < end * S_; ++i)
      std::copy_n(at_dkeys_ + i * Ap_, A_, data<A>(dkeys) + i * A_);
  });
  std::copy_n(static_cast<A*>(*dstate_), B_ * C_ * S_, data<A>(dstate));
  // Sums over sources, in their order.
  const auto sum = [&](const std::optional<Buffer<A>>& x, int64_t n) {
    A* all = *x;
    for (int64_t b = 1; b < B_; ++b)
      for (int64_t i = 0; i < n; ++i) all[i] += all[b * n + i];
    return all;
  };
  std::copy_n(sum(dv_, Ap_), A_, data<A>(dv));
  std::copy_n(sum(dconv_, N_ * C_ * K_), N_ * C_ * K_, data<A>(dconv));
  const A* all = sum(dprojection_, N_ * Ap_);
  for (int64_t a = 0; a < A_; ++a)
    for (int64_t n = 0; n < N_; ++n) data<A>(dprojection)[a * N_ + n] = all[n * Ap_ + a];
  return {dkeys, dv, dconv, dprojection, dstate};
}

template class Location<float>;
template class Location<double>;

}  // namespace seq2seq_fast
