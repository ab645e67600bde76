// From accumulators to stored values, every float operation rounded once (bitdial.quantization.instructions.Contract).
#pragma once
#include "device.h"

enum ValueType { TYPE_U8 = 0, TYPE_S8 = 1, TYPE_F32 = 2, TYPE_I64 = 3, TYPE_I32 = 4, TYPE_BOOL = 5 };

struct Epilogue {
  Global<uint8_t> y8;
  Global<float> yf;
  Global<const uint8_t> r8;  // residual, 8-bit or float; neither: none
  Global<const float> rf;
  Global<const int32_t> bias;        // [outputs], of the ratio; none for products of two activations
  Global<const float> multipliers;   // [outputs], or [1]
  int64_t y_sample, y_place, y_channel;  // in elements
  int64_t r_sample, r_place, r_channel;
  float residual_factor, lo, hi;
  int32_t r_signed, one_multiplier, accumulators;  // accumulators: store the sums themselves, for tests
  int32_t fours;  // 8-bit results lie side by side in words of four channels, and so does the residual, if there is one
};

// What a channel brings to each of its sums.
struct Scale {
  int bias;
  float multiplier;
};

DEVICE Scale scale_of(const Epilogue& out, int channel) {
  Scale s = {0, 1.0f};
  if (out.bias.there()) s.bias = out.bias.get(channel);
  if (out.multipliers.there()) s.multiplier = out.multipliers.get(out.one_multiplier ? 0 : channel);
  return s;
}

DEVICE void finish_at(const Epilogue& out, int acc, const Scale& scale, int64_t y_at, int64_t r_at) {
  if (out.accumulators) {
    out.yf.put(y_at, from_bits(acc));
    return;
  }
  float t = times(to_float(acc + scale.bias), scale.multiplier);
  if (out.r8.there()) {
    const uint8_t r = out.r8.get(r_at);
    t = plus(t, times(to_float(out.r_signed ? static_cast<int8_t>(r) : r), out.residual_factor));
  } else if (out.rf.there()) {
    const float r = out.rf.get(r_at);
    t = plus(t, out.yf.there() ? r : times(r, out.residual_factor));
  }
  t = smaller(larger(t, out.lo), out.hi);
  if (out.yf.there()) out.yf.put(y_at, t);
  else out.y8.put(y_at, static_cast<uint8_t>(rounded(t)));
}

// Four channels at once, where `fours` says so: the same operations, in one word.
DEVICE void finish_word(const Epilogue& out, const Words4& acc, const Scale (&scale)[4], int64_t y_at, int64_t r_at) {
  const uint32_t r = out.r8.there() ? out.r8.get_word(r_at) : 0;
  uint32_t word = 0;
#pragma unroll
  for (int e = 0; e < 4; e++) {
    float t = times(to_float(static_cast<int>(acc.v[e]) + scale[e].bias), scale[e].multiplier);
    if (out.r8.there()) {
      const uint8_t q = static_cast<uint8_t>(r >> (8 * e));
      t = plus(t, times(to_float(out.r_signed ? static_cast<int8_t>(q) : q), out.residual_factor));
    }
    word |= static_cast<uint32_t>(rounded(smaller(larger(t, out.lo), out.hi)) & 255) << (8 * e);
  }
  out.y8.put_word(y_at, word);
}

DEVICE void finish(const Epilogue& out, int acc, const Scale& scale, int sample, int place, int channel) {
  finish_at(out, acc, scale, sample * out.y_sample + place * out.y_place + channel * out.y_channel,
            sample * out.r_sample + place * out.r_place + channel * out.r_channel);
}
