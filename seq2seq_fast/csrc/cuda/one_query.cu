// Launches of one_query.cuh.
#include "additive_scores.h"
#include "one_query.cuh"
#include "one_query.h"

namespace seq2seq_fast {
namespace {

// Sets the parts of the source. It is split where blocks would leave half of the GPU idle, into
// parts that are worth the joining, and where its scores would not fit shared memory.
void choose_ranges(OneQueryArguments& a, int64_t rows, int multiprocessors) {
  constexpr int64_t kLeast = 16384;  // elements, 64 KiB
  const int64_t idle = multiprocessors / std::max<int64_t>(1, rows);
  const int64_t ranges = std::min(idle, int64_t{a.S} * a.H / kLeast);
  const int64_t wanted = std::max({ranges, int64_t{1}, ceil_div(a.S, kMostKeysInShared)});
  a.keys_of_range = static_cast<int>(round_up(ceil_div(a.S, wanted), kRowsOfBlock));
  a.ranges = static_cast<int>(ceil_div(a.S, a.keys_of_range));
}

OneQueryArguments arguments(const Device& device, const Tensor& query, const Tensor& keys,
                            const Tensor& v) {
  STD_TORCH_CHECK(keys.size(1) > 0, "expected keys of at least one position");
  OneQueryArguments a{view_of(query), view_of(keys)};
  a.v = view_of(v);
  a.keys_by_four = by_four(keys);
  a.type = a.query.type;
  a.T = size_of(query, 1), a.S = size_of(keys, 1), a.H = size_of(query, 2);
  choose_ranges(a, query.size(0) * a.T, device.multiprocessors);
  return a;
}

void launch(const Device& device, const OneQueryArguments& a, int64_t rows) {
  const auto kernel = a.type == Type::kFloat  ? one_query<float>
                      : a.type == Type::kHalf ? one_query<Half>
                                              : one_query<BFloat16>;
  device.launch(kernel, rows * a.ranges, dim3(kOneQueryThreads),
                one_query_shared_floats(a.H, a.keys_of_range), a);
}

}  // namespace

OneQueryArguments attention_arguments(const Device& device, const Tensor& query, const Tensor& keys,
                                      const Tensor& values, const Tensor& v, const Softmax& softmax,
                                      const std::optional<Tensor>& powers) {
  OneQueryArguments a = arguments(device, query, keys, v);
  a.values = view_of(values);
  a.values_by_four = by_four(values);
  if (powers) a.powers = powers_of(*powers, keys);
  a.softmax = softmax;
  a.D = size_of(values, 2);
  return a;
}

Tensor share_parts(const Device& device, OneQueryArguments& a, const Tensor& query,
                   const std::optional<Tensor>& made) {
  if (a.ranges == 1) return empty(query, {0}, ScalarType::Float);
  const int64_t rows = query.size(0) * a.T, of_parts = rows * a.ranges * (2 + a.D);
  Tensor memory = made ? *made : empty(query, {rows * a.S + of_parts + rows}, ScalarType::Float);
  a.exponentials = floats_of(memory);
  a.parts = a.exponentials + rows * a.S;
  a.arrived = reinterpret_cast<unsigned*>(a.parts + of_parts);
  if (!made) device.zero(a.arrived, rows * static_cast<int64_t>(sizeof(unsigned)));
  return memory;
}

void one_query_attention(const Device& device, const Tensor& query, const Tensor& keys,
                         const Tensor& values, const Tensor& v, const Softmax& softmax,
                         const std::optional<Tensor>& powers, const Tensor& context,
                         const Tensor& weights, const OneQueryOptions& options) {
  OneQueryArguments a = attention_arguments(device, query, keys, values, v, softmax, powers);
  const int64_t rows = query.size(0) * a.T;
  a.context = context.data_ptr(), a.weights = weights.data_ptr();
  a.also = options.also, a.ld_also = options.ld_also, a.live = options.live;
  a.keys_of_queries = options.keys_of_queries;
  std::optional<Tensor> parts, &kept = options.parts == nullptr ? parts : *options.parts;
  kept = share_parts(device, a, query, kept);
  launch(device, a, rows);
}

void one_query_scores(const Device& device, const Tensor& query, const Tensor& keys,
                      const Tensor& v, const Tensor& scores) {
  OneQueryArguments a = arguments(device, query, keys, v);
  a.weights = scores.data_ptr();
  launch(device, a, query.size(0) * a.T);
}

}  // namespace seq2seq_fast
