// How weights of kInt8 and kInt6 are read: a vector of lanes has four rows of a column in each. See
// loops.h.
#pragma once
#include "loops.h"
#include "vec.h"

namespace seq2seq_fast {
namespace {

typedef int32_t FourBytes __attribute__((vector_size(4 * S2S_LANES), aligned(1), may_alias));

S2S_INLINE VecInt four_bytes(const uint8_t* w) { return *reinterpret_cast<const FourBytes*>(w); }

// The same byte in all places of a lane's four.
constexpr int32_t four_times(uint32_t byte) { return static_cast<int32_t>(byte * 0x01010101u); }

// NEON's dot products want signed bytes: the 128 that int8 are too large by goes first, and not
// with the offsets.
#ifdef S2S_DOT
constexpr bool kSigned = true;
#else
constexpr bool kSigned = false;
#endif

struct EightBits {
  static int64_t at(int64_t j) { return j * kVec; }          // the j-th vector's first column
  static int64_t bytes(int64_t width) { return 4 * width; }  // of four rows
  static int32_t offset(int32_t of_128) { return kSigned ? 0 : of_128; }
  template <int N>
  S2S_INLINE static void load(const uint8_t* w, VecInt (&b)[N]) {
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j)
      b[j] = four_bytes(w + 4 * j * kVec) ^ (kSigned ? four_times(128) : 0);
  }
};

struct SixBits {
  static int64_t at(int64_t j) { return j % kBlocks * kBlock + j / kBlocks * kVec; }
  static int64_t bytes(int64_t) { return 3 * kPanel; }
  static int32_t offset(int32_t of_128) { return of_128 / 4; }  // they are 32 too large
  S2S_INLINE static void load(const uint8_t* w, VecInt (&b)[kBlocks]) {
    const VecInt parts[3] = {four_bytes(w), four_bytes(w + kPanel), four_bytes(w + 2 * kPanel)};
    b[3] = (parts[0] >> 6 & four_times(3)) | (parts[1] >> 4 & four_times(3 << 2)) |
           (parts[2] >> 2 & four_times(3 << 4));
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) b[j] = parts[j] & four_times(63);
  }
  S2S_INLINE static void load(const uint8_t* w, VecInt (&b)[2 * kBlocks]) {
    VecInt half[kBlocks];
#pragma GCC unroll 2
    for (int at = 0; at < 2; ++at) {
      load(w + 4 * at * kVec, half);
#pragma GCC unroll 4
      for (int j = 0; j < kBlocks; ++j) b[at * kBlocks + j] = half[j];
    }
  }
};

}  // namespace
}  // namespace seq2seq_fast
