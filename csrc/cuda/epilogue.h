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

DEVICE void finish(const Epilogue& out, int acc, const Scale& scale, int sample, int place, int channel) {
  finish_at(out, acc, scale, sample * out.y_sample + place * out.y_place + channel * out.y_channel,
            sample * out.r_sample + place * out.r_place + channel * out.r_channel);
}
