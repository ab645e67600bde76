// Instructions that make each element from at most two others, pools, depthwise convolutions, and rows in a fixed order.
#pragma once
#include "epilogue.h"

// Element (sample, place, channel) of a tensor. table: offset within a sample of every (place, channel), -1 for zero; or none.
struct Operand {
  Global<const uint8_t> bytes;
  Global<const float> floats;
  Global<const int64_t> wholes;
  Global<const int32_t> words;
  Global<const int32_t> table;
  int64_t sample, place, channel;
  int32_t type, offset;  // offset: added within every sample
};

enum PointwiseOp {
  OP_SCALE = 0, OP_LOOKUP = 1, OP_ADD = 2, OP_MUL = 3, OP_COPY = 4, OP_FADD = 5, OP_FSUB = 6, OP_FMUL = 7, OP_FDIV = 8, OP_ROOT = 9
};

struct PointwiseArgs {
  Operand a, b;
  Global<uint8_t> y8;
  Global<float> yf;
  Global<const uint8_t> lookup;
  int64_t y_sample, y_place, y_channel;
  int32_t samples, places, channels, op;
  float factor_a, factor_b, lo, hi;
};

// Where it lies, or -1 where it is zero.
DEVICE int64_t position(const Operand& v, int64_t n, int place, int channel, int channels) {
  const int64_t at = n * v.sample + v.offset;
  if (!v.table.there()) return at + place * v.place + channel * v.channel;
  const int found = v.table.get(static_cast<int64_t>(place) * channels + channel);
  return found < 0 ? -1 : at + found;
}

DEVICE float operand(const Operand& v, int64_t n, int place, int channel, int channels) {
  const int64_t at = position(v, n, place, channel, channels);
  if (at < 0) return 0.0f;
  if (v.type == TYPE_F32) return v.floats.get(at);
  if (v.type == TYPE_I64) return to_float(v.wholes.get(at));
  if (v.type == TYPE_I32) return to_float(v.words.get(at));
  const uint8_t q = v.bytes.get(at);
  return to_float(v.type == TYPE_S8 ? static_cast<int8_t>(q) : q);
}

DEVICE void pointwise(const PointwiseArgs& args) {
  const int64_t i = static_cast<int64_t>(block_x()) * 256 + thread_index();
  const int64_t per = static_cast<int64_t>(args.places) * args.channels;
  if (i >= per * args.samples) return;
  const int64_t n = i / per;
  const int place = static_cast<int>(i % per / args.channels), channel = static_cast<int>(i % args.channels);
  const float a = operand(args.a, n, place, channel, args.channels);
  float t = a;
  const int64_t at = n * args.y_sample + place * args.y_place + channel * args.y_channel;
  if (args.op == OP_LOOKUP) {
    args.y8.put(at, args.lookup.get(rounded(a) + (args.a.type == TYPE_S8 ? 128 : 0)));
    return;
  }
  if (args.op == OP_SCALE) t = times(a, args.factor_a);
  if (args.op == OP_ROOT) t = root(plus(a, 0.0f));
  if (args.op >= OP_ADD && args.op != OP_COPY && args.op != OP_ROOT) {
    const float b = operand(args.b, n, place, channel, args.channels);
    if (args.op == OP_ADD) t = plus(times(a, args.factor_a), times(b, args.factor_b));
    if (args.op == OP_MUL) t = times(times(a, b), args.factor_a);  // a * b is exact: below 2^16
    if (args.op == OP_FADD) t = plus(a, b);
    if (args.op == OP_FSUB) t = minus(a, b);
    if (args.op == OP_FMUL) t = times(a, b);
    if (args.op == OP_FDIV) t = over(a, b);
  }
  const float bounded = smaller(larger(t, args.lo), args.hi);
  if (args.yf.there()) args.yf.put(at, t == t ? bounded : t);  // float results keep what is not a number
  else args.y8.put(at, static_cast<uint8_t>(rounded(bounded)));
}

// ---- windows -----------------------------------------------------------------------------------------------------------------

struct WindowArgs {
  Global<const uint8_t> x;
  Global<uint8_t> y;
  Global<const uint8_t> weights;  // depthwise: [taps, outputs]
  Epilogue out;                   // depthwise
  int64_t x_sample, x_place, y_sample, y_place;
  int32_t samples, height, width, channels, out_height, out_width;
  int32_t kernel_y, kernel_x, stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x;
  int32_t x_signed, multiplicity, greatest, reserved;
  float factor, lo, hi, reserved_float;
};

template <bool DEPTHWISE>
DEVICE void over_window(const WindowArgs& args) {
  const int64_t i = static_cast<int64_t>(block_x()) * 256 + thread_index();
  const int64_t area = static_cast<int64_t>(args.out_height) * args.out_width;
  if (i >= args.samples * area * args.channels) return;
  const int channel = static_cast<int>(i % args.channels);
  const int place = static_cast<int>(i / args.channels % area), n = static_cast<int>(i / args.channels / area);
  const int y0 = place / args.out_width * args.stride_y - args.pad_y;
  const int x0 = place % args.out_width * args.stride_x - args.pad_x;
  const int source = DEPTHWISE ? channel / args.multiplicity : channel;
  int sum = 0, most = -128;
  for (int ky = 0; ky < args.kernel_y; ky++)
    for (int kx = 0; kx < args.kernel_x; kx++) {
      const int y = y0 + ky * args.dilation_y, x = x0 + kx * args.dilation_x;
      if (y < 0 || y >= args.height || x < 0 || x >= args.width) continue;
      const uint8_t q = args.x.get(n * args.x_sample + (static_cast<int64_t>(y) * args.width + x) * args.x_place + source);
      const int v = args.x_signed ? static_cast<int8_t>(q) : q;
      if (DEPTHWISE)
        sum += v * static_cast<int8_t>(args.weights.get((ky * args.kernel_x + kx) * static_cast<int64_t>(args.channels) + channel));
      else sum += v;
      most = v > most ? v : most;
    }
  if (DEPTHWISE) {
    finish(args.out, sum, scale_of(args.out, channel), n, place, channel);
    return;
  }
  const float t = smaller(larger(times(to_float(sum), args.factor), args.lo), args.hi);
  args.y.put(n * args.y_sample + place * args.y_place + channel, static_cast<uint8_t>(args.greatest ? most : rounded(t)));
}

// ---- rows in the order of bitdial.engines.reference.ordered: 16 lanes each -----------------------------------------------------

struct RowsArgs {
  Global<const float> x;
  Global<float> y;
  Global<const float> weight;
  Global<const float> bias;
  int64_t rows, length, inner;  // element k of row (o, i) lies at (o * length + k) * inner + i
  float eps, mean;              // mean: divide sums by the length
  int32_t square, take_root;    // of what is summed, of the sum
};

// Lane i adds lane i + 8, then i + 4, i + 2, i + 1; every lane gets the sum.
DEVICE float sum_of_lanes(float v) {
  const int lane = thread_index() % 32;
  for (int width = 8; width; width /= 2) v = plus(v, from_lane(v, lane + width));
  return from_lane(v, lane & 16);
}

DEVICE float largest_of_lanes(float v) {
  const int lane = thread_index() % 32;
  for (int width = 8; width; width /= 2) v = larger(v, from_lane(v, lane ^ width));
  return v;
}

// exp of x <= 0 as bitdial.engines.reference.ordered_softmax.exp32.
DEVICE float exponential(float x) {
  if (!(x >= -72.0f)) return 0.0f;
  const int n = rounded(times(x, 1.4426950216293335f));
  const float r = minus(minus(x, times(to_float(n), 0.693359375f)), times(to_float(n), -2.1219444e-4f));
  float y = 0.008290272206068039f;
  y = plus(times(y, r), 0.04189816117286682f);
  y = plus(times(y, r), 0.1666763871908188f);
  y = plus(times(y, r), 0.4999914765357971f);
  y = plus(times(y, r), 0.9999997019767761f);
  y = plus(times(y, r), 1.0f);
  return from_bits(bits_of(y) + n * (1 << 23));
}

struct RowLane {
  int64_t start, step;
  int first;
  bool there;
};

DEVICE RowLane row_lane(const RowsArgs& args) {
  const int64_t row = static_cast<int64_t>(block_x()) * 8 + thread_index() / 16;
  RowLane r;
  r.there = row < args.rows;  // lanes without a row go along, for the exchange between lanes
  r.first = r.there ? thread_index() % 16 : static_cast<int>(args.length);
  r.start = row / args.inner * args.length * args.inner + row % args.inner;
  r.step = args.inner;
  return r;
}

DEVICE void softmax_rows(const RowsArgs& args) {
  const RowLane row = row_lane(args);
  float top = from_bits(static_cast<int>(0xff800000u));
  for (int64_t k = row.first; k < args.length; k += 16) top = larger(top, args.x.get(row.start + k * row.step));
  top = largest_of_lanes(top);
  if (bits_of(top) == static_cast<int>(0xff800000u)) top = 0.0f;
  float sum = 0.0f;
  for (int64_t k = row.first; k < args.length; k += 16)
    sum = plus(sum, exponential(minus(args.x.get(row.start + k * row.step), top)));
  sum = sum_of_lanes(sum);
  const float inverse = sum == 0.0f ? 0.0f : over(1.0f, sum);
  for (int64_t k = row.first; k < args.length; k += 16)
    args.y.put(row.start + k * row.step, times(exponential(minus(args.x.get(row.start + k * row.step), top)), inverse));
}

DEVICE void normalize_rows(const RowsArgs& args) {
  const RowLane row = row_lane(args);
  const float count = static_cast<float>(args.length);
  float sum = 0.0f;
  for (int64_t k = row.first; k < args.length; k += 16) sum = plus(sum, args.x.get(row.start + k));
  const float mean = over(sum_of_lanes(sum), count);
  float squares = 0.0f;
  for (int64_t k = row.first; k < args.length; k += 16) {
    const float d = minus(args.x.get(row.start + k), mean);
    squares = plus(squares, times(d, d));
  }
  const float inverse = over(1.0f, root(plus(over(sum_of_lanes(squares), count), args.eps)));
  for (int64_t k = row.first; k < args.length; k += 16) {
    float t = times(minus(args.x.get(row.start + k), mean), inverse);
    if (args.weight.there()) t = times(t, args.weight.get(k));
    if (args.bias.there()) t = plus(t, args.bias.get(k));
    args.y.put(row.start + k, t);
  }
}

DEVICE void sum_rows(const RowsArgs& args) {
  const RowLane row = row_lane(args);
  float sum = 0.0f;
  for (int64_t k = row.first; k < args.length; k += 16) {
    const float v = args.x.get(row.start + k * row.step);
    sum = plus(sum, args.square ? times(v, v) : v);
  }
  sum = sum_of_lanes(sum);
  if (args.mean != 0.0f) sum = over(sum, args.mean);
  if (args.take_root) sum = root(sum);
  if (row.there && thread_index() % 16 == 0) args.y.put(static_cast<int64_t>(block_x()) * 8 + thread_index() / 16, sum);
}
