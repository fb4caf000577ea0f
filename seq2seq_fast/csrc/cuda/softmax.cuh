// What comes between scores and softmax: scale, score_bias, mask.
#pragma once
#include "device.cuh"

namespace seq2seq_fast {

// Places that mask and score_bias (B, T or 1, S) leave to a row of queries.
struct Softmax {
  const uint8_t* mask;  // null: all are attended to
  int64_t mask_stride[3];
  View bias;  // data null: none
  float scale;
  __device__ __forceinline__ bool attended(int b, int t, int s) const {
    return mask == nullptr ||
           mask[b * mask_stride[0] + t * mask_stride[1] + s * mask_stride[2]] != 0;
  }
  __device__ __forceinline__ float operator()(float score, int b, int t, int s) const {
    return scale * score + (bias.data == nullptr ? 0.f : bias(b, t, s));
  }
};

}  // namespace seq2seq_fast
