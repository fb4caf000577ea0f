// See decode_step.h.
#include "decode_step.h"

#include <atomic>

#include "cells.h"
#include "decoder.h"

namespace seq2seq_fast {
namespace {

constexpr size_t kBehindLayers = 8 + PackedReadout::kTensors;  // tensors
// Chunks of the readout that one thread may be left alone with for a while.
constexpr int64_t kManyChunks = 16;

}  // namespace

static std::vector<PackedDecoder::Layer> layers_of(const std::vector<PackedTensor>& x) {
  std::vector<PackedDecoder::Layer> layers;
  for (size_t i = 1; i + kBehindLayers < x.size(); i += 5)
    layers.push_back({Matrix(x[i], x[i + 1]), Matrix(x[i + 2], x[i + 3]), floats(x[i + 4])});
  return layers;
}

PackedDecoder::PackedDecoder(const std::vector<PackedTensor>& x, const std::string& cell_type,
                             bool after, const std::vector<int64_t>& vector_)
    : cell(cell_of(cell_type)),
      query_after(after),
      V(x.at(0).sizes[0]),
      E(x[0].dim == 2 ? x[0].sizes[1] : 0),
      embedding(floats(x[0])),
      gates_of_tokens(x[0].dim == 3 ? embedding : nullptr),
      panels_of_tokens(x[0].dim == 3 ? x[0].sizes[1] : 0),
      layers(layers_of(x)),
      query(x.at(x.size() - kBehindLayers), x.at(x.size() - kBehindLayers + 1)),
      b_query(floats(x.at(x.size() - kBehindLayers + 2))),
      context(x.at(x.size() - kBehindLayers + 3), x.at(x.size() - kBehindLayers + 4)),
      vector(x.at(x.size() - kBehindLayers + 5), x.at(x.size() - kBehindLayers + 6)),
      b_vector(floats(x.at(x.size() - kBehindLayers + 7))),
      O(vector_.empty() ? 0 : vector_.at(0)),
      tanh(O > 0 && vector_.at(1) != 0),
      readout(x.data() + x.size() - PackedReadout::kTensors, V) {}

static bool over(const Matrix& matrix, int64_t K, int64_t panels) {
  if (K == 0) return matrix.panels == 0;
  return matrix.K == (matrix.type == Weights::kInt8 ? round_up(K, 4) : K) &&
         matrix.panels == panels;
}

bool PackedDecoder::fits(int64_t H, int64_t D, int64_t A, bool attends) const {
  const int64_t unit = cell == Cell::kRnn ? kPanel : kBlock, panels = (H + unit - 1) / unit;
  const auto plain = [](int64_t N) { return (N + kPanel - 1) / kPanel; };
  if (gates_of_tokens && panels_of_tokens != panels) return false;
  for (size_t l = 0; l < layers.size(); ++l) {
    const bool apart = layers[l].hidden.panels > 0;
    const int64_t from_below = l > 0 ? H : E + (context.panels > 0 ? 0 : O > 0 ? O : D);
    if (!over(layers[l].input, from_below + (apart ? 0 : H), panels)) return false;
    if (apart && !over(layers[l].hidden, H, panels)) return false;
  }
  if (context.panels > 0 && !over(context, D, panels)) return false;
  if (attends ? !over(query, H, plain(A)) : query.panels > 0) return false;
  if (O == 0) return vector.panels == 0 && over(readout.matrix, H + D, plain(V));
  return attends && query_after && context.panels == 0 && over(vector, H + D, plain(O)) &&
         over(readout.matrix, O, plain(V));
}

DecoderSource::DecoderSource(const std::vector<Tensor>& x, const std::optional<Tensor>& mask_,
                             const std::optional<Tensor>& context, int64_t B,
                             const std::vector<int64_t>& accumulates_)
    : v(x.size() < 4 ? 0 : round_up(x[3].size(0), kPad)),
      D(context ? context->size(1) : 0),
      accumulates(accumulates_) {
  STD_TORCH_CHECK(!context || (context->dim() == 2 && context->size(0) == B),
                  "expected a context of each row");
  if (x.empty()) return;
  STD_TORCH_CHECK((x.size() == 4 || x.size() == 7) && x[0].dim() == 3 && x[0].size(1) > 0 &&
                      x[2].dim() == 3 && x[3].dim() == 1 &&
                      x[0].scalar_type() == ScalarType::Float &&
                      (!mask_ || (mask_->dim() == 2 && mask_->scalar_type() == ScalarType::Bool)),
                  "expected float32 keys, powers, values and v, and a mask of bool");
  if (x.size() == 4) {
    STD_TORCH_CHECK(x[1].dim() == 2 || x[1].numel() == 0, "expected powers of two dimensions");
    keys.emplace(x[0], x[1].dim() == 2 ? std::optional(x[1]) : std::nullopt);
  }
  values = x[2], v_ = x[3];
  S = x[0].size(1), A = x[0].size(2), D = values.size(2);
  STD_TORCH_CHECK(x[0].size(0) == B && values.size(0) == B && values.size(1) == S &&
                      v_.size(0) == A && (!context || context->size(1) == D) &&
                      (!mask_ || (mask_->size(0) == B && mask_->size(1) == S)),
                  "expected keys (B, S, A), values (B, S, D), v (A,), context (B, D), mask (B, S)");
  floats(values);
  std::fill(std::copy_n(floats(v_), A, +v), v + round_up(A, kPad), 0.f);
  max_v = loops.largest(v, A);
  if (x.size() == 7) {
    place = x[6];
    STD_TORCH_CHECK(x[4].dim() == 3 && x[5].dim() == 2 && place.dim() == 3 && place.size(0) == B &&
                        place.size(1) == x[4].size(1) && place.size(2) == S,
                    "expected conv (N, C, K), projection (A, N) and location (B, C, S)");
    for (size_t i = 4; i < 7; ++i) floats(x[i]);
    location.emplace(std::vector<Tensor>{x[4], x[5]}, accumulates, x[0], values, v_, mask_);
  }
  lengths.assign(values.size(0), S);
  if (!mask_) return;
  mask = static_cast<const bool*>(mask_->data_ptr());
  for (int i = 0; i < 2; ++i) mask_stride[i] = mask_->stride(i);
  for (size_t b = 0; b < lengths.size(); ++b)
    while (lengths[b] > 0 && !attended(static_cast<int64_t>(b), lengths[b] - 1)) --lengths[b];
}

DecoderStep::DecoderStep(const PackedDecoder& model, const DecoderSource& source,
                         const Tensor& hidden_state, const Tensor& cell_state,
                         const std::optional<Tensor>& context, int64_t most, bool cover,
                         Project project)
    : model_(model),
      source_(source),
      most_(most),
      L_(hidden_state.size(0)),
      H_(hidden_state.size(2)),
      unit_(model.cell == Cell::kRnn ? kPanel : kBlock),
      Hp_(round_up(H_, unit_)),
      lstm_(model.cell == Cell::kLstm),
      cover_(cover),
      query_ld_(model.query.panels * model.query.width),
      weights_ld_(round_up(source.S, kRows)),
      vectors_ld_(model.vector.panels * model.vector.width),
      of_location_(source.location ? source.location->state_numbers() : 0),
      tokens_(most),
      sources_(most),
      inputs_(most * model.E),
      queries_(most * query_ld_),
      weights_{Buffer<float>(most * weights_ld_), Buffer<float>(most * weights_ld_)},
      of_gates_(model.context, 0, project.gates ? &source.values : nullptr, source.lengths),
      of_logits_(model.readout.matrix, hidden_state.size(2),
                 project.logits ? &source.values : nullptr, source.lengths),
      readout_(model.readout, most, source.attends() ? &source.values : nullptr, of_logits_),
      hidden_{Buffer<float>(L_ * most * Hp_), Buffer<float>(L_ * most * Hp_)},
      cell_{Buffer<float>(lstm_ ? L_ * most * Hp_ : 0), Buffer<float>(lstm_ ? L_ * most * Hp_ : 0)},
      contexts_{Buffer<float>(most * source.D), Buffer<float>(most * source.D)},
      vectors_{Buffer<float>(most * vectors_ld_), Buffer<float>(most * vectors_ld_)},
      covered_{Buffer<float>(cover ? most * source.S : 0),
               Buffer<float>(cover ? most * source.S : 0)},
      located_{Buffer<float>(most * of_location_), Buffer<float>(most * of_location_)} {
  const int64_t B = hidden_state.size(1);
  const bool alike = cell_state.dim() == 3 && cell_state.size(0) == L_ && cell_state.size(1) == B &&
                     cell_state.size(2) == H_;
  STD_TORCH_CHECK(static_cast<size_t>(L_) == model.layers.size() && hidden_state.dim() == 3 &&
                      B > 0 && B <= most && (lstm_ ? alike : cell_state.numel() == 0),
                  "expected hidden (L, B, H) of the decoder's layers, and cell of an LSTM");
  const auto load = [&](const Tensor& from, float* to) {
    for (int64_t i = 0; i < L_; ++i)
      for (int64_t b = 0; b < B; ++b) {
        float* row = to + (i * most_ + b) * Hp_;
        std::fill(std::copy_n(floats(from) + (i * B + b) * H_, H_, row), row + Hp_, 0.f);
      }
  };
  load(hidden_state, hidden_[now_]);
  if (lstm_) load(cell_state, cell_[now_]);
  if (model.O > 0) {
    STD_TORCH_CHECK(
        !context || (context->dim() == 2 && context->size(0) == B && context->size(1) == model.O),
        "expected an attentional vector (B, O) of each row");
    for (int64_t b = 0; b < B; ++b) {
      float* row = vectors_[kept_] + b * vectors_ld_;
      std::fill_n(row, vectors_ld_, 0.f);
      if (context) std::copy_n(floats(*context) + b * model.O, model.O, row);
    }
  } else if (context) {
    std::copy_n(floats(*context), B * source_.D, +contexts_[kept_]);
  } else {
    std::fill_n(+contexts_[kept_], B * source_.D, 0.f);
  }
  if (cover_) std::fill_n(+covered_[kept_], B * source_.S, 0.f);
  if (source_.location) std::copy_n(floats(source_.place), B * of_location_, +located_[kept_]);
  if (source_.attends() && !model_.query_after) query_all(B);
}

void DecoderStep::run(const std::vector<Live>& live, const StepsLeft& left, Made wanted) {
  const auto rows = static_cast<int64_t>(live.size());
  const bool attended = ahead_;
  follow(live);
  if (source_.attends() && !model_.query_after && !attended) attend(live);
  for (int64_t l = 0; l < L_; ++l) advance(l, rows);
  now_ = 1 - now_;
  backwards_ = rows == 1 && !backwards_;
  if (source_.attends() && model_.query_after) {
    query_all(rows);
    attend(live);
    if (model_.O > 0) make_vectors(rows);
  }
  read_out(rows, left, wanted);
}

void DecoderStep::copy_states(int64_t rows, float* to_hidden, float* to_cell) const {
  for (int64_t l = 0; l < L_; ++l)
    for (int64_t m = 0; m < rows; ++m) {
      to_hidden = std::copy_n(hidden(now_, l) + m * Hp_, H_, to_hidden);
      if (lstm_) to_cell = std::copy_n(cell(now_, l) + m * Hp_, H_, to_cell);
    }
}

// Hypotheses take over the states of those they go on from, and the embeddings of their tokens.
void DecoderStep::follow(const std::vector<Live>& live) {
  const auto rows = static_cast<int64_t>(live.size());
  bool moved = false;
  for (int64_t m = 0; m < rows; ++m) moved |= live[m].parent != m;
  const bool context_moves = ahead_ || (model_.query_after && model_.O == 0) || !source_.attends();
  const int from = now_, to = moved ? 1 - now_ : now_;
  const int kept = ahead_ ? 1 - kept_ : kept_, keeps = moved ? 1 - kept : kept;
  const int64_t E = model_.E, D = source_.D, states = lstm_ ? 2 : 1;
  parallel(rows, E + (moved ? states * L_ * Hp_ + D : 0), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const auto [source, parent, token] = live[m];
      tokens_[m] = token;
      sources_[m] = source;
      std::copy_n(model_.embedding + token * E, E, inputs_ + m * E);
      if (!moved) continue;
      for (int64_t l = 0; l < L_; ++l) {
        std::copy_n(hidden(from, l) + parent * Hp_, Hp_, hidden(to, l) + m * Hp_);
        if (lstm_) std::copy_n(cell(from, l) + parent * Hp_, Hp_, cell(to, l) + m * Hp_);
      }
      if (context_moves) std::copy_n(contexts_[kept] + parent * D, D, contexts_[keeps] + m * D);
      std::copy_n(vectors_[kept] + parent * vectors_ld_, vectors_ld_,
                  vectors_[keeps] + m * vectors_ld_);
      if (ahead_)
        std::copy_n(weights_[kept] + parent * weights_ld_, source_.S,
                    weights_[keeps] + m * weights_ld_);
      if (cover_)
        std::copy_n(covered_[kept] + parent * source_.S, source_.S,
                    covered_[keeps] + m * source_.S);
      std::copy_n(located_[kept] + parent * of_location_, of_location_,
                  located_[keeps] + m * of_location_);
    }
  });
  now_ = to, kept_ = keeps, ahead_ = false;
}

void DecoderStep::attend(const std::vector<Live>& live) {
  const auto rows = static_cast<int64_t>(live.size());
  if (source_.location) {
    std::vector<Location<float>::Row> all;
    for (int64_t m = 0; m < rows; ++m)
      all.push_back(located(m, live[m].source, model_.query_after ? m : live[m].parent, kept_));
    source_.location->attend(all);
    for (int64_t m = 0; m < rows && cover_; ++m) cover(m);
    return;
  }
  parallel(rows, source_.S * (source_.A + source_.D) / 2, [&](int64_t begin, int64_t end) {
    const Buffer<float> scratch = attention_scratch();
    for (int64_t m = begin; m < end; ++m)
      attend_row(m, live[m].source, model_.query_after ? m : live[m].parent, kept_, scratch);
  });
}

Buffer<float> DecoderStep::attention_scratch() const {
  return Buffer<float>(kStreams * source_.keys->Hp + source_.keys->gather_floats());
}

void DecoderStep::attend_row(int64_t m, int32_t b, int64_t query_row, int into, float* scratch) {
  const Keys& keys = *source_.keys;
  const int64_t S = source_.S, D = source_.D;
  const float* q = queries_ + query_row * query_ld_;
  float *streams = scratch, *gathered = scratch + kStreams * keys.Hp;
  float* w = weights_[into] + m * weights_ld_;
  const float max_q = loops.largest(q, keys.Hp);
  for (int64_t h = 0; h < keys.Hp; h += kGroup)
    make_streams(q + h, std::min(kGroup, keys.Hp - h), max_q, streams + kStreams * h);
  for (int64_t i = 0; i < keys.blocks; ++i) {
    const Mode mode = choose(max_q, keys.max(b, i), source_.max_v);
    if (mode == Mode::kExact) keys.gather(b, i, gathered);
    loops.scores(mode, keys.minus_one(b, i), streams, 1, 0, 1,
                 mode == Mode::kExact ? gathered : keys.block(b, i), keys.count(i), source_.v,
                 keys.Hp, w + i * kRows, kRows);
  }
  const bool* mask = source_.mask ? source_.mask + b * source_.mask_stride[0] : nullptr;
  loops.softmax(w, S, 1.f, nullptr, mask, source_.mask_stride[1]);
  loops.weighted_rows(w, weights_ld_, 1, floats(source_.values) + b * S * D, D, 1, S, D,
                      contexts_[into] + m * D, D);
  if (cover_) cover(m);
}

// Adds a row's weights to those of the steps before.
void DecoderStep::cover(int64_t m) {
  const float* w = weights_[kept_] + m * weights_ld_;
  float* covered = covered_[kept_] + m * source_.S;
  for (int64_t s = 0; s < source_.S; ++s) covered[s] += w[s];
}

Location<float>::Row DecoderStep::located(int64_t m, int32_t b, int64_t query_row, int into) const {
  return {b,
          queries_ + query_row * query_ld_,
          located_[kept_] + m * of_location_,
          contexts_[into] + m * source_.D,
          weights_[into] + m * weights_ld_,
          located_[into] + m * of_location_};
}

// Hidden and cell states of a layer after the step, a panel of units at a time.
void DecoderStep::advance(int64_t l, int64_t rows) {
  const auto& layer = model_.layers[l];
  const int now = now_, next = 1 - now_, blocks = blocks_of(model_.cell);
  const bool apart = layer.hidden.panels > 0, projected = l == 0 && of_gates_;
  const Operand state = {hidden(now, l), Hp_, H_};
  const Factor input =
      l == 0 ? Factor(layer.input, rows, {inputs_, model_.E, model_.E},
                      projected      ? Operand()
                      : model_.O > 0 ? vectors()
                                     : contexts(),
                      apart ? Operand() : state)
             : Factor(layer.input, rows, {hidden(next, l - 1), Hp_, H_}, apart ? Operand() : state);
  const Factor hidden_part(layer.hidden, apart ? rows : 0, state);
  const int64_t width = blocks * unit_;
  const int64_t work = layer.input.operations(rows) + layer.hidden.operations(rows);
  const int64_t panels = Hp_ / unit_;
  over_pieces(panels, work, rows, backwards_, [&](int64_t p) {
    alignas(64) float gates[kRowsTogether * kPanel];
    for (int64_t first = 0; first < rows; first += kRowsTogether) {
      const int64_t n = std::min(kRowsTogether, rows - first);
      Sums to = {layer.bias + p * width, 0, gates, width};
      const bool of_tokens = l == 0 && model_.gates_of_tokens != nullptr;
      // Rows begin differently, or there are several parts.
      if (of_tokens || apart || projected) {
        for (int64_t m = 0; m < n; ++m) {
          const float* from =
              of_tokens ? model_.gates_of_tokens + tokens_[first + m] * panels * width : layer.bias;
          std::copy_n(from + p * width, width, gates + m * width);
        }
        to = {gates, width, gates, width};
      }
      if (projected) of_gates_.add(attended(), p, first, n, to);
      if (layer.input.panels > 0) input.multiply(p, first, n, to);
      float* last = gates + width - layer.hidden.width;
      if (apart) hidden_part.multiply(p, first, n, {last, width, last, width});
      const int64_t at = first * Hp_ + p * unit_;
      loops.advance(model_.cell, {n, unit_, gates, width, gates, width, kBlock, hidden(now, l) + at,
                                  lstm_ ? cell(now, l) + at : nullptr, hidden(next, l) + at,
                                  lstm_ ? cell(next, l) + at : nullptr, Hp_});
    }
  });
}

// The left factor of the query's projection: the hidden states that the last step left.
Factor DecoderStep::query_factor(int64_t rows) const {
  return Factor(model_.query, rows, outputs());
}

void DecoderStep::query_all(int64_t rows) {
  const Factor states = query_factor(rows);
  parallel(model_.query.panels, model_.query.operations(rows), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) query(states, i, rows);
  });
}

void DecoderStep::query(const Factor& states, int64_t panel, int64_t rows) {
  const int64_t width = model_.query.width;
  states.multiply(panel, 0, rows,
                  {model_.b_query + panel * width, 0, queries_ + panel * width, query_ld_});
}

// The attentional vectors after the step: those of tanh are a cell that has no state.
void DecoderStep::make_vectors(int64_t rows) {
  const Factor features(model_.vector, rows, outputs(), contexts());
  const int64_t width = model_.vector.width;
  parallel(model_.vector.panels, model_.vector.operations(rows), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      float* out = vectors_[kept_] + p * width;
      features.multiply(p, 0, rows, {model_.b_vector + p * width, 0, out, vectors_ld_});
      if (model_.tanh)
        loops.advance(Cell::kRnn, {rows, width, out, vectors_ld_, out, vectors_ld_, kBlock, nullptr,
                                   nullptr, out, nullptr, vectors_ld_});
    }
  });
}

// The readout, and meanwhile what the next step has of the same hidden states: its queries, and of
// few rows its attention, which one thread makes while others read weights.
void DecoderStep::read_out(int64_t rows, const StepsLeft& left, Made wanted) {
  const bool asks = source_.attends() && !model_.query_after;
  const int64_t queries = asks ? model_.query.panels : 0, chunks = model_.readout.chunks;
  const bool ahead = asks && left.most > 1 && rows <= kFewRows && chunks >= kManyChunks && !cover_;
  const Factor states = query_factor(queries > 0 ? rows : 0);
  std::atomic<int64_t> to_make = queries;
  readout_.run({features(0), features(1), attended()}, rows, wanted, left, [&](int64_t chunk) {
    // Chunks are taken from both ends: queries come with the first of them.
    for (int64_t i = 0; i < queries; ++i) {
      const int64_t at = i / 2 % chunks;
      if ((i % 2 == 0 ? at : chunks - 1 - at) != chunk) continue;
      query(states, i, rows);
      if (to_make.fetch_sub(1, std::memory_order_acq_rel) > 1 || !ahead) continue;
      if (source_.location) {
        const Location<float>::Room room(*source_.location);
        for (int64_t m = 0; m < rows; ++m)
          source_.location->attend(located(m, sources_[m], m, 1 - kept_), room);
        continue;
      }
      const Buffer<float> scratch = attention_scratch();
      for (int64_t m = 0; m < rows; ++m) attend_row(m, sources_[m], m, 1 - kept_, scratch);
    }
  });
  ahead_ = ahead;
}

}  // namespace seq2seq_fast
