// scores[b,t,s] = sum_h v[h] tanh(q[b,t,h] + k[b,s,h]) and its gradients, on the CPU.
//
// With r = 1 / (1 + exp(2q) exp(2k)), tanh(q + k) = 1 - 2 r and 1 - tanh^2 = 4 r (1 - r).
// Buffers beyond inputs and outputs: float32 copies of q and k, their exponentials, and in backward
// the gradients of both; never (B, T, S, H). float64 is computed with tanh in double.
// Threads own (b, block of s, t) in forward and (b, group of h) in backward, so that no result
// depends on how many there are.
#include "additive_scores.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

namespace seq2seq_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename F>
auto dispatch(ScalarType dtype, F f) {
  switch (dtype) {
    case ScalarType::Float:
      return f.template operator()<float>();
    case ScalarType::Double:
      return f.template operator()<double>();
    case ScalarType::BFloat16:
      return f.template operator()<torch::headeronly::BFloat16>();
    case ScalarType::Half:
      return f.template operator()<torch::headeronly::Half>();
    default:
      STD_TORCH_CHECK(false, "expected a float32, float64, bfloat16 or float16 tensor");
  }
}

// A strided view of up to three axes.
template <typename T>
struct View {
  T* data;
  int64_t stride[3];
  explicit View(const Tensor& x) : data(static_cast<T*>(x.data_ptr())), stride{} {
    for (int64_t i = 0; i < x.dim(); ++i) stride[i] = x.stride(i);
  }
  T& operator()(int64_t i, int64_t j = 0, int64_t k = 0) const {
    return data[i * stride[0] + j * stride[1] + k * stride[2]];
  }
};

void check(const Tensor& query, const Tensor& keys, const Tensor& v) {
  STD_TORCH_CHECK(query.dim() == 3 && keys.dim() == 3 && v.dim() == 1 &&
                      query.size(0) == keys.size(0) && query.size(2) == keys.size(2) &&
                      query.size(2) == v.size(0),
                  "expected query (B, T, H), keys (B, S, H) and v (H,)");
  STD_TORCH_CHECK(
      query.scalar_type() == keys.scalar_type() && query.scalar_type() == v.scalar_type(),
      "expected query, keys and v of one dtype");
}

// float32 inputs in kernel layout: queries (B, T, H4), keys (B, blocks, H4, kLanes), v (H4,), where
// H4 is H padded with zeros to whole groups.
struct Prepared {
  int64_t B, T, S, H, H4, blocks;
  std::vector<float> q, k, v, half_v, Q, K, max_q, max_k;
  Path path(int64_t b, int64_t t, int64_t block) const {
    return choose(max_q[b * T + t], max_k[b * blocks + block]);
  }
};

template <typename T>
Prepared prepare(const Tensor& query, const Tensor& keys, const Tensor& v) {
  Prepared p;
  p.B = query.size(0), p.T = query.size(1), p.S = keys.size(1), p.H = query.size(2);
  p.H4 = (p.H + kGroup - 1) / kGroup * kGroup;
  p.blocks = (p.S + kLanes - 1) / kLanes;
  const View<T> vq(query), vk(keys), vv(v);
  p.q.resize(p.B * p.T * p.H4), p.Q.resize(p.q.size()), p.max_q.resize(p.B * p.T);
  p.k.resize(p.B * p.blocks * p.H4 * kLanes), p.K.resize(p.k.size());
  p.max_k.resize(p.B * p.blocks), p.v.resize(p.H4);
  p.half_v.resize(p.H4 / kGroup);
  for (int64_t h = 0; h < p.H; ++h) {
    p.v[h] = static_cast<float>(vv(h));
    p.half_v[h / kGroup] += 0.5f * p.v[h];
  }
  torch::stable::parallel_for(0, p.B * p.T, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* row = &p.q[i * p.H4];
      for (int64_t h = 0; h < p.H; ++h) row[h] = static_cast<float>(vq(i / p.T, i % p.T, h));
      exp2x(row, p.H4, &p.Q[i * p.H4]);
      p.max_q[i] = largest(row, p.H4);
    }
  });
  torch::stable::parallel_for(0, p.B * p.blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / p.blocks, s0 = i % p.blocks * kLanes, size = p.H4 * kLanes;
      float* block = &p.k[i * size];
      for (int64_t h = 0; h < p.H; ++h)
        for (int64_t s = 0; s < std::min(kLanes, p.S - s0); ++s)
          block[h * kLanes + s] = static_cast<float>(vk(b, s0 + s, h));
      exp2x(block, size, &p.K[i * size]);
      p.max_k[i] = largest(block, size);
    }
  });
  return p;
}

template <typename T>
void forward(const Tensor& query, const Tensor& keys, const Tensor& v, T* out) {
  const Prepared p = prepare<T>(query, keys, v);
  torch::stable::parallel_for(0, p.B * p.blocks * p.T, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / (p.blocks * p.T), block = i / p.T % p.blocks, t = i % p.T;
      const int64_t row = b * p.T + t, at = (b * p.blocks + block) * p.H4 * kLanes;
      const int64_t width = std::min(kLanes, p.S - block * kLanes);
      const Path path = p.path(b, t, block);
      float tile[kLanes];
      if (path == Path::kExact) {
        for (int64_t s = 0; s < width; ++s) {
          float sum = 0.f;
          for (int64_t h = 0; h < p.H; ++h)
            sum += p.v[h] * std::tanh(p.q[row * p.H4 + h] + p.k[at + h * kLanes + s]);
          tile[s] = sum;
        }
      } else {
        scores_tile(&p.Q[row * p.H4], &p.K[at], p.v.data(), p.half_v.data(), p.H4,
                    path != Path::kFast, tile);
      }
      T* o = out + row * p.S + block * kLanes;
      for (int64_t s = 0; s < width; ++s) o[s] = static_cast<T>(tile[s]);
    }
  });
}

template <>
void forward<double>(const Tensor& query, const Tensor& keys, const Tensor& v, double* out) {
  const View<double> q(query), k(keys), w(v);
  const int64_t B = query.size(0), T = query.size(1), S = keys.size(1), H = query.size(2);
  torch::stable::parallel_for(0, B * T * S, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / (T * S), t = i / S % T, s = i % S;
      double sum = 0;
      for (int64_t h = 0; h < H; ++h) sum += w(h) * std::tanh(q(b, t, h) + k(b, s, h));
      out[i] = sum;
    }
  });
}

template <typename T>
void backward(const Tensor& grad, const Tensor& query, const Tensor& keys, const Tensor& v, T* dq,
              T* dk, T* dv) {
  const Prepared p = prepare<T>(query, keys, v);
  const View<T> vg(grad);
  const int64_t width = p.blocks * kLanes, size = p.H4 * kLanes, groups = p.H4 / kGroup;
  std::vector<float> g(p.B * p.T * width), dK(p.k.size()), partial_v(p.B * p.H4);
  torch::stable::parallel_for(0, p.B * p.T, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t s = 0; s < p.S; ++s)
        g[i * width + s] = static_cast<float>(vg(i / p.T, i % p.T, s));
  });
  torch::stable::parallel_for(0, p.B * groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / groups, h = i % groups * kGroup, used = std::min(kGroup, p.H - h);
      const int64_t at = b * p.blocks * size + h * kLanes;
      float sum_v[kGroup] = {};
      for (int64_t t = 0; t < p.T; ++t) {
        const int64_t row = b * p.T + t;
        float sum_q[kGroup] = {};
        for (int64_t first = 0, last; first < p.blocks; first = last) {  // runs of one path
          const Path path = p.path(b, t, first);
          for (last = first + 1; last < p.blocks && p.path(b, t, last) == path;) ++last;
          const float* g0 = &g[row * width + first * kLanes];
          if (path != Path::kExact) {
            float part[kGroup];
            backward_row(&p.Q[row * p.H4 + h], &p.K[at + first * size], g0, last - first, size,
                         path != Path::kFast, part, &dK[at + first * size], sum_v);
            for (int64_t j = 0; j < kGroup; ++j) sum_q[j] += 4.f * part[j];
            continue;
          }
          for (int64_t s = 0; s < (last - first) * kLanes; ++s) {
            if (first * kLanes + s >= p.S) break;
            const int64_t block = first + s / kLanes, lane = s % kLanes;
            for (int64_t j = 0; j < used; ++j) {
              const int64_t o = at + block * size + j * kLanes + lane;
              const float y = std::tanh(p.q[row * p.H4 + h + j] + p.k[o]);
              const float e = g0[s] * (1.f - y) * (1.f + y);
              sum_q[j] += e;
              dK[o] += 0.25f * e;
              sum_v[j] += g0[s] * y;
            }
          }
        }
        for (int64_t j = 0; j < used; ++j)
          dq[row * p.H + h + j] = static_cast<T>(p.v[h + j] * sum_q[j]);
      }
      for (int64_t j = 0; j < used; ++j) {
        partial_v[b * p.H4 + h + j] = sum_v[j];
        for (int64_t s = 0; s < p.S; ++s)
          dk[(b * p.S + s) * p.H + h + j] = static_cast<T>(
              4.f * p.v[h + j] * dK[at + s / kLanes * size + j * kLanes + s % kLanes]);
      }
    }
  });
  for (int64_t h = 0; h < p.H; ++h) {
    float sum = 0.f;
    for (int64_t b = 0; b < p.B; ++b) sum += partial_v[b * p.H4 + h];
    dv[h] = static_cast<T>(sum);
  }
}

template <>
void backward<double>(const Tensor& grad, const Tensor& query, const Tensor& keys, const Tensor& v,
                      double* dq, double* dk, double* dv) {
  const View<double> g(grad), q(query), k(keys), w(v);
  const int64_t B = query.size(0), T = query.size(1), S = keys.size(1), H = query.size(2);
  std::fill_n(dk, B * S * H, 0.0);
  torch::stable::parallel_for(0, H, 1, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h) {
      double sum_v = 0;
      for (int64_t b = 0; b < B; ++b)
        for (int64_t t = 0; t < T; ++t) {
          double sum_q = 0;
          for (int64_t s = 0; s < S; ++s) {
            const double y = std::tanh(q(b, t, h) + k(b, s, h));
            const double e = g(b, t, s) * w(h) * (1 - y) * (1 + y);
            sum_q += e, sum_v += g(b, t, s) * y;
            dk[(b * S + s) * H + h] += e;
          }
          dq[(b * T + t) * H + h] = sum_q;
        }
      dv[h] = sum_v;
    }
  });
}

Tensor additive_scores(Tensor query, Tensor keys, Tensor v) {
  check(query, keys, v);
  Tensor out = torch::stable::new_empty(query, {query.size(0), query.size(1), keys.size(1)});
  dispatch(query.scalar_type(),
           [&]<typename T>() { forward<T>(query, keys, v, static_cast<T*>(out.data_ptr())); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> additive_scores_backward(Tensor grad, Tensor query, Tensor keys,
                                                            Tensor v) {
  check(query, keys, v);
  STD_TORCH_CHECK(grad.dim() == 3 && grad.size(0) == query.size(0) &&
                      grad.size(1) == query.size(1) && grad.size(2) == keys.size(1) &&
                      grad.scalar_type() == query.scalar_type(),
                  "expected grad (B, T, S) of query's dtype");
  Tensor dq = torch::stable::new_empty(query, query.sizes());
  Tensor dk = torch::stable::new_empty(keys, keys.sizes());
  Tensor dv = torch::stable::new_empty(v, v.sizes());
  dispatch(query.scalar_type(), [&]<typename T>() {
    backward<T>(grad, query, keys, v, static_cast<T*>(dq.data_ptr()),
                static_cast<T*>(dk.data_ptr()), static_cast<T*>(dv.data_ptr()));
  });
  return {dq, dk, dv};
}

}  // namespace
}  // namespace seq2seq_fast

STABLE_TORCH_LIBRARY_IMPL(seq2seq_fast, CPU, m) {
  m.impl("additive_scores", TORCH_BOX(&seq2seq_fast::additive_scores));
  m.impl("additive_scores_backward", TORCH_BOX(&seq2seq_fast::additive_scores_backward));
}
