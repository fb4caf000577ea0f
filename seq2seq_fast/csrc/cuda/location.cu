// Launches of location.cuh.
#include "location.cuh"
#include "location.h"

namespace seq2seq_fast {

Place::Place(const Device& device, const std::vector<Tensor>& location,
             const std::vector<int64_t>& accumulates, const Tensor& keys)
    : conv(torch::stable::contiguous(location[0])),
      projection(torch::stable::contiguous(transposed(location[1]))),
      filters{floats_of(conv),  floats_of(projection), size_of(conv, 0), size_of(conv, 1),
              size_of(conv, 2), size_of(keys, 2),      size_of(keys, 1), 0} {
  for (const Tensor& x : {conv, projection, keys, location[2]})
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "expected float32");
  const int64_t C = conv.size(1);
  STD_TORCH_CHECK(C == static_cast<int64_t>(accumulates.size()) && C <= 32 && filters.K % 2 == 1,
                  "expected conv (N, C, K) with an odd K, and whether each of C accumulates");
  STD_TORCH_CHECK(projection.size(0) == filters.N && projection.size(1) == filters.A,
                  "expected projection (A, N)");
  for (int64_t c = 0; c < C; ++c)
    if (accumulates[c] != 0) filters.accumulates |= 1u << c;
  check_room(device, filters.floats());
}

void Place::check_room(const Device& device, int64_t floats) const {
  STD_TORCH_CHECK(floats <= device.shared_floats_of_block, filters.N, " filters of width ",
                  filters.K, " take ", 4 * floats,
                  " bytes of a block's shared memory, expected at most ",
                  4 * device.shared_floats_of_block);
}

void launch_place_keys(const Device& device, const PlaceKeysArguments& a, int64_t rows) {
  device.launch(place_keys, rows * a.filters.blocks(), dim3(kPlaceThreads), a.filters.floats(), a);
}

void launch_place_keys(const Device& device, const Place& place, int64_t t, const Tensor& states,
                       const Tensor& weights, const Tensor& keys,
                       const std::optional<Tensor>& placed) {
  PlaceKeysArguments a{place.filters};
  const auto of = [](const Tensor& x, int64_t i) { return floats_of(x) + i * x.stride(0); };
  a.before = of(states, std::max<int64_t>(t - 1, 0));
  if (t > 0) a.weights = of(weights, t - 1), a.state = of(states, t);
  a.keys = view_of(keys);
  if (placed) a.placed = floats_of(*placed);
  a.rows_of_source = 1;
  launch_place_keys(device, a, keys.size(0));
}

PlaceBackward::PlaceBackward(const Device& device, const Place& place, const Source& source,
                             const Tensor& states, const Tensor& dstate, bool detach)
    : device_(device),
      place_(place),
      source_(source),
      states_(states),
      T_(states.size(0) - 1),
      B_(states.size(1)),
      detach_(detach),
      parts_(empty(states, {B_ * place.filters.blocks(), place.filters.A})),
      features_(empty(states, {B_, place.filters.N, place.filters.S})),
      of_weights_(empty(states, {B_, place.filters.S})),
      dconv_(empty(states, {B_, place.filters.N, place.filters.C * place.filters.K})),
      dstate_(empty(states, dstate.sizes())) {
  place.check_room(device, std::max(PlaceSlopesArguments{place.filters}.floats(),
                                    PlaceSumsArguments{place.filters}.floats()));
  copy(dstate_, dstate);
  torch::stable::zero_(dconv_);
}

void PlaceBackward::attend(int64_t t, const OneQueryBackwardArguments& of_step) {
  const Filters& f = place_.filters;
  OneQueryBackwardArguments attention = of_step;
  share_rows(attention, B_, device_.multiprocessors, 0);
  attention.of_weights = float_rows(of_weights_);
  const WeightsBackwardArguments weights{attention, detach_ ? nullptr : floats_of(dstate_), f.C};
  device_.launch(weights_backward, B_ * attention.ranges, dim3(kQueryBackwardThreads), attention.D,
                 weights);
  PlaceSlopesArguments slopes{f, attention, state(t)};
  slopes.query_parts = floats_of(parts_), slopes.features = floats_of(features_);
  const dim3 threads(kPlaceThreads);
  device_.launch(place_slopes, B_ * f.blocks(), threads, slopes.floats(), slopes);
  PlaceBackArguments back{f, floats_of(features_), state(t), floats_of(parts_)};
  back.of_state = floats_of(dstate_), back.of_conv = floats_of(dconv_);
  back.of_query = attention.to_query.data, back.B = static_cast<int>(B_);
  device_.launch(place_back, back.blocks(), threads, kPlaceThreads, back);
}

std::array<Tensor, 5> PlaceBackward::results(const Tensor& queries, const Tensor& dscores) const {
  const Filters& f = place_.filters;
  const int64_t blocks = B_ * f.blocks();
  const auto like = [&](std::initializer_list<int64_t> sizes) { return empty(states_, sizes); };
  const Tensor dkeys = like({B_, f.S, f.A}), dv = like({f.A}), dconv = like({f.N, f.C, f.K}),
               dprojection = like({f.A, f.N}), turned = like({f.N, f.A}),
               of_v = like({blocks, f.A}), of_projection = like({blocks, f.N * f.A});
  PlaceSumsArguments a{f, floats_of(states_), floats_of(queries), floats_of(dscores)};
  a.keys = view_of(source_.keys), a.v = view_of(source_.v);
  a.of_keys = floats_of(dkeys), a.of_v = floats_of(of_v);
  a.of_projection = floats_of(of_projection);
  a.T = static_cast<int>(T_), a.B = static_cast<int>(B_);
  const dim3 threads(kPlaceThreads);
  device_.launch(place_sums, blocks * a.tiles(), threads, a.floats(), a);
  const auto sum = [&](const Tensor& parts, int64_t count, const Tensor& out) {
    const int64_t n = out.numel();
    device_.launch(sum_parts, ceil_div(n, kWarp), dim3(kSumThreads), kSumThreads, floats_of(parts),
                   count, n, floats_of(out));
  };
  sum(of_v, blocks, dv);
  sum(of_projection, blocks, turned);
  sum(dconv_, B_, dconv);
  copy(dprojection, transposed(turned));
  return {dkeys, dv, dconv, dprojection, dstate_};
}

}  // namespace seq2seq_fast
