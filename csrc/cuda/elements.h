// Integers and masks, and choices by them: elements of up to three others, in float32 or in 64-bit integers; rows of integers.
#pragma once
#include "pointwise.h"

enum ElementOp {
  ELEMENT_COPY = 0, ELEMENT_ADD = 1, ELEMENT_SUB = 2, ELEMENT_MUL = 3, ELEMENT_MAX = 4, ELEMENT_MIN = 5, ELEMENT_EQ = 6, ELEMENT_NE = 7,
  ELEMENT_LT = 8, ELEMENT_LE = 9, ELEMENT_AND = 10, ELEMENT_OR = 11, ELEMENT_XOR = 12, ELEMENT_WHERE = 13, ELEMENT_LOOK_UP = 14
};

struct ElementsArgs {
  Operand a, b, c;             // c: what ELEMENT_WHERE goes by
  Global<const float> rows;    // ELEMENT_LOOK_UP: [n_rows, channels], a is the number of the row
  Global<float> yf;            // the one that is there is written; y8: 0 or 1
  Global<int64_t> y64;
  Global<uint8_t> y8;
  int64_t n_rows, y_sample, y_place, y_channel;
  int32_t samples, places, channels, op, real, reserved;  // real: computed in float32, else in integers
};

DEVICE int64_t whole(const Operand& v, int64_t n, int place, int channel, int channels) {
  const int64_t at = position(v, n, place, channel, channels);
  if (at < 0) return 0;
  if (v.type == TYPE_I64) return v.wholes.get(at);
  if (v.type == TYPE_I32) return v.words.get(at);
  return v.bytes.get(at) != 0;
}

// Integers wrap around, as those of the processor do; a greatest of real numbers is not one where either is not.
DEVICE int64_t computed(int op, int64_t a, int64_t b) {
  const uint64_t u = static_cast<uint64_t>(a), v = static_cast<uint64_t>(b);
  if (op == ELEMENT_ADD) return static_cast<int64_t>(u + v);
  if (op == ELEMENT_SUB) return static_cast<int64_t>(u - v);
  if (op == ELEMENT_MUL) return static_cast<int64_t>(u * v);
  if (op == ELEMENT_MAX) return a > b ? a : b;
  return op == ELEMENT_MIN && b < a ? b : a;
}
DEVICE float computed(int op, float a, float b) {
  if (op == ELEMENT_ADD) return plus(a, b);
  if (op == ELEMENT_SUB) return minus(a, b);
  if (op == ELEMENT_MUL) return times(a, b);
  if (op == ELEMENT_COPY || a != a) return a;
  if (b != b) return b;
  return op == ELEMENT_MAX ? larger(a, b) : smaller(a, b);
}

template <class T>
DEVICE bool judged(int op, T a, T b) {
  if (op == ELEMENT_EQ) return a == b;
  if (op == ELEMENT_NE) return a != b;
  if (op == ELEMENT_LT) return a < b;
  if (op == ELEMENT_LE) return a <= b;
  const bool p = a != T(0), q = b != T(0);
  if (op == ELEMENT_AND) return p && q;
  if (op == ELEMENT_OR) return p || q;
  return op == ELEMENT_XOR ? p != q : p;
}

DEVICE float operand_of(const ElementsArgs& args, bool other, int64_t n, int place, int channel) {
  if (other) return operand(args.b, n, place, channel, args.channels);
  return operand(args.a, n, place, channel, args.channels);
}

DEVICE int64_t whole_of(const ElementsArgs& args, bool other, int64_t n, int place, int channel) {
  if (other) return whole(args.b, n, place, channel, args.channels);
  return whole(args.a, n, place, channel, args.channels);
}

DEVICE void elements(const ElementsArgs& args) {
  const int64_t i = static_cast<int64_t>(block_x()) * 256 + thread_index();
  const int64_t per = static_cast<int64_t>(args.places) * args.channels;
  if (i >= per * args.samples) return;
  const int64_t n = i / per;
  const int place = static_cast<int>(i % per / args.channels), channel = static_cast<int>(i % args.channels);
  const int64_t y = n * args.y_sample + place * args.y_place + channel * args.y_channel;
  int op = args.op;
  if (op == ELEMENT_LOOK_UP) {
    const int64_t row = whole(args.a, n, place, channel, args.channels);
    const bool there = row >= 0 && row < args.n_rows;  // the host refuses the batch otherwise
    args.yf.put(y, there ? args.rows.get(row * args.channels + channel) : 0.0f);
    return;
  }
  // A choice is a copy of one of two operands.
  const bool other = op == ELEMENT_WHERE && whole(args.c, n, place, channel, args.channels) == 0;
  if (op == ELEMENT_WHERE) op = ELEMENT_COPY;
  if (args.real) {
    const float a = operand_of(args, other, n, place, channel);
    const float b = op == ELEMENT_COPY ? 0.0f : operand(args.b, n, place, channel, args.channels);
    if (args.y8.there()) args.y8.put(y, judged(op, a, b));
    else args.yf.put(y, computed(op, a, b));
  } else {
    const int64_t a = whole_of(args, other, n, place, channel);
    const int64_t b = op == ELEMENT_COPY ? 0 : whole(args.b, n, place, channel, args.channels);
    if (args.y8.there()) args.y8.put(y, judged(op, a, b));
    else args.y64.put(y, computed(op, a, b));
  }
}

// ---- rows of integers --------------------------------------------------------------------------------------------------------

struct WholeRowsArgs {
  Global<const int64_t> x;
  Global<int64_t> y;
  int64_t rows, length, inner;  // as in RowsArgs
  int32_t running, reserved;    // running: the sum so far in every place, else one sum a row
};

DEVICE void sum_whole_rows(const WholeRowsArgs& args) {
  const int64_t row = static_cast<int64_t>(block_x()) * 128 + thread_index();
  if (row >= args.rows) return;
  const int64_t start = row / args.inner * args.length * args.inner + row % args.inner;
  uint64_t sum = 0;
  for (int64_t k = 0; k < args.length; k++) {
    sum += static_cast<uint64_t>(args.x.get(start + k * args.inner));
    if (args.running) args.y.put(start + k * args.inner, static_cast<int64_t>(sum));
  }
  if (!args.running) args.y.put(row, static_cast<int64_t>(sum));
}
