#include <cstdlib>
#include <string_view>

#include "decoder_loop.cuh"
#include "decoder_loop.h"
#include "team.h"

namespace seq2seq_fast {

bool runs_together() {
  const char* const wanted = std::getenv("SEQ2SEQ_FAST_GPU_LOOP");
  return wanted != nullptr && std::string_view(wanted) == "together";
}

namespace {

class Launches : public TogetherForward {
 public:
  Launches(const Device& device, const std::vector<Tensor>& layers,
           const std::optional<Source>& source, const std::optional<Tensor>& dropout, Cell cell,
           bool query_after, const Run& run)
      : device_(device), like_(run.hiddens) {
    DecoderLoopArguments& a = a_;
    a.cell = cell;
    a.L = size_of(run.hiddens, 0), a.T = size_of(run.gates, 1), a.B = size_of(run.hiddens, 2);
    a.H = size_of(run.hiddens, 3), a.G = size_of(run.gates, 3);
    a.attends = source.has_value(), a.query_after = query_after;
    a.by_four = a.H % 4 == 0;
    a.hiddens = floats_of(run.hiddens), a.gates = floats_of(run.gates);
    if (cell == Cell::kLstm) a.cells = floats_of(run.cells);
    if (dropout) {
      dropout_ = torch::stable::contiguous(*dropout), a.dropout = floats_of(dropout_);
      a.by_four = a.by_four && aligned(dropout_);
    }
    std::vector<TeamProduct*> products;
    int64_t floats = 0;
    if (source) {
      a.A = size_of(source->keys, 2), a.D = size_of(source->values, 2);
      a.by_four = a.by_four && a.D % 4 == 0;
      a.queries = floats_of(run.queries), a.contexts = floats_of(run.contexts);
      const Tensor one = view(run.queries, {a.B, 1, a.A}, {a.A, int64_t{a.B} * a.A, 1});
      a.attention = attention_arguments(device, one, source->keys, source->values, source->v,
                                        source->softmax, source->powers);
      a.attention.context = floats_of(run.contexts) + int64_t{a.B} * a.D;
      a.attention.weights = run.weights.data_ptr();
      kept_.push_back(share_parts(device, a.attention, one));
      floats = one_query_shared_floats(a.A, a.attention.keys_of_range);
      kept_.push_back(side_by_side(nullptr, source->w_query, a.A, 4));
      a.query = team_product_of(kept_.back(), 1);
      a.b_query = floats_of(source->b_query);
      products.push_back(&a.query);
    }
    for (int l = 0; l < a.L; ++l) {
      const Tensor* w_x = l > 0 ? &layers[3 * l] : source ? &source->w_context : nullptr;
      kept_.push_back(side_by_side(w_x, layers[3 * l + 1], a.G, 4));
      a.layers[l] = team_product_of(kept_.back(), blocks_of(cell));
      products.push_back(&a.layers[l]);
      kept_.push_back(torch::stable::contiguous(layers[3 * l + 2]));
      const Tensor& bias = kept_.back();
      a.bias[l] = {floats_of(bias), bias.dim() == 1 ? 0 : bias.stride(0)};
    }
    possible_ =
        plan_teams(plan_, device, products, a.B, floats) &&
        device.fits_together(decoder_loop, plan_.blocks(), dim3(kTeamThreads), plan_.shared_floats);
  }

  bool possible() const { return possible_; }

  bool run(int64_t begin, int64_t end) override {
    if (begin == end) return true;
    const Tensor counts = counts_of(device_, plan_, like_);
    a_.team = plan_.team;
    a_.begin = static_cast<int>(begin), a_.end = static_cast<int>(end);
    return device_.launch_together(decoder_loop, plan_.blocks(), dim3(kTeamThreads),
                                   plan_.shared_floats, a_);
  }

 private:
  const Device& device_;
  const Tensor like_;
  DecoderLoopArguments a_{};
  TeamPlan plan_;
  Tensor dropout_;
  std::vector<Tensor> kept_;
  bool possible_;
};

}  // namespace

std::unique_ptr<TogetherForward> TogetherForward::make(
    const Device& device, const std::vector<Tensor>& layers, const std::optional<Source>& source,
    const std::optional<Tensor>& dropout, Cell cell, bool query_after, const Run& run) {
  const int64_t L = run.hiddens.size(0), B = run.hiddens.size(2);
  if (!runs_together() || L > kMostLoopLayers || B == 0 || run.gates.size(1) == 0) return nullptr;
  auto made = std::make_unique<Launches>(device, layers, source, dropout, cell, query_after, run);
  if (!made->possible()) return nullptr;
  return made;
}

}  // namespace seq2seq_fast
