// Attention in one kernel: products of queries and keys, what their scores meet, softmax in the order of
// bitdial.engines.reference.ordered_softmax, its rounding to bytes and the product with the values. Scores never leave shared memory.
//
// A block of 128 threads makes ROWS rows (queries) of one head. Its four warps share tiles of 64 keys, 16 of them each, then tiles of
// 64 features of the result. Queries, keys and values are signed bytes; the weights that softmax gives are unsigned ones.
#pragma once
#include "pointwise.h"
#include "product.h"

enum TermOp { TERM_ADD = 0, TERM_SUB = 1, TERM_MUL = 2, TERM_DIV = 3, TERM_FILL = 4, TERM_KEEP = 5 };

// What scores meet, by row and key: a number for arithmetic, or a truth value that says where `number` stands instead.
struct Term {
  Global<const float> floats;
  Global<const uint8_t> truths;
  Global<const int32_t> heads;  // offsets within a sample
  int64_t sample;
  int32_t row, key, op;
  float number;
};

struct AttentionArgs {
  Global<const uint8_t> q, k, v;
  Global<const int32_t> heads;  // per head: offsets of q, k and v within a sample; of the result
  Term terms[4];
  Epilogue out;                 // of the second product
  int64_t q_sample, k_sample, v_sample;
  int32_t rows, keys, depth, width, n_heads, n_terms;
  int32_t q_row, q_depth, k_key, k_depth, v_key, v_width;  // strides in bytes
  int32_t padded, pitch;  // keys in whole tiles; bytes of a row of queries, and later of weights
  float factor, weight_factor, weight_lo, weight_hi;
};

// ROWS x 64 bytes of an operand to shared memory, a row every `pitch` bytes, zeros where it ends. Along whichever axis its bytes
// adjoin they are read together: sixteen of a row's depth, or four rows of one depth, turned in registers.
template <int ROWS>
DEVICE void load_tile(
    const Global<const uint8_t>& x, int64_t start, int row_stride, int depth_stride, int rows, int depth, int at, int pitch) {
  if (row_stride == 1 && depth_stride % 4 == 0 && rows % 4 == 0 && x.aligned4(start)) {
#pragma unroll 1
    for (int i = thread_index(); i < ROWS * 4; i += 128) {
      const int row = i / 8 % (ROWS / 4) * 4, from = (i % 8 + i / (2 * ROWS) * 8) * 4;
      uint32_t w[4];
#pragma unroll
      for (int e = 0; e < 4; e++)
        w[e] = row < rows && from + e < depth ? x.get_word(start + static_cast<int64_t>(from + e) * depth_stride + row) : 0;
      const uint32_t low01 = permute(w[0], w[1], 0x5140u), high01 = permute(w[0], w[1], 0x7362u);
      const uint32_t low23 = permute(w[2], w[3], 0x5140u), high23 = permute(w[2], w[3], 0x7362u);
      Shared::put_word(at + row * pitch + from, permute(low01, low23, 0x5410u));
      Shared::put_word(at + (row + 1) * pitch + from, permute(low01, low23, 0x7632u));
      Shared::put_word(at + (row + 2) * pitch + from, permute(high01, high23, 0x5410u));
      Shared::put_word(at + (row + 3) * pitch + from, permute(high01, high23, 0x7632u));
    }
    return;
  }
#pragma unroll 1
  for (int i = thread_index(); i < ROWS * 4; i += 128) {
    const int row = i / 4, from = i % 4 * 16;
    gather16(x, start + static_cast<int64_t>(row) * row_stride + static_cast<int64_t>(from) * depth_stride, depth_stride,
             row < rows ? depth - from : 0, at + row * pitch + from);
  }
}

// acc += rows of a (from byte `a`, one every `pitch`) times the tile's columns of this warp, 64 deep.
template <int TILES, bool SIGNED>
DEVICE void multiply_tile(int a, int pitch, int tile, int (&acc)[TILES][2][4]) {
  const int lane = thread_index() % 32, warp = thread_index() / 32;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    uint32_t fragment[TILES][4];
#pragma unroll
    for (int i = 0; i < TILES; i++) load_fragment(fragment[i], a + (i * 16 + lane % 16) * pitch + half * 32 + lane / 16 * 16);
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int at = tile + (warp * 16 + j * 8 + lane / 4) * ROW_BYTES + half * 32 + lane % 4 * 4;
      const uint32_t b[2] = {Shared::word(at), Shared::word(at + 16)};
#pragma unroll
      for (int i = 0; i < TILES; i++) multiply_bytes<SIGNED, true>(acc[i][j], fragment[i], b);
    }
  }
}

DEVICE float met(const AttentionArgs& args, float score, int n, int head, int row, int key) {
  float t = score;
#pragma unroll 1
  for (int i = 0; i < args.n_terms; i++) {
    const Term& term = args.terms[i];
    const int64_t at = n * term.sample + term.heads.get(head) + static_cast<int64_t>(row) * term.row + static_cast<int64_t>(key) * term.key;
    if (term.op >= TERM_FILL) {
      if ((term.truths.get(at) != 0) == (term.op == TERM_FILL)) t = term.number;
      continue;
    }
    const float b = term.floats.get(at);
    if (term.op == TERM_ADD) t = plus(t, b);
    if (term.op == TERM_SUB) t = minus(t, b);
    if (term.op == TERM_MUL) t = times(t, b);
    if (term.op == TERM_DIV) t = over(t, b);
  }
  return t;
}

// A row of sums to weights in bytes, by 16 lanes; zeros behind the last key. row: -1 where there is no query: its lanes go along, for
// the exchange between lanes.
DEVICE void weigh(const AttentionArgs& args, int n, int head, int row, int scores, int weights) {
  const int first = thread_index() % 16;
  float top = from_bits(static_cast<int>(0xff800000u));
  for (int k = first; k < args.keys; k += 16) {
    float t = times(to_float(static_cast<int>(Shared::word(scores + k * 4))), args.factor);
    if (row >= 0 && args.n_terms) t = met(args, t, n, head, row, k);
    Shared::put_word(scores + k * 4, static_cast<uint32_t>(bits_of(t)));
    top = larger(top, t);
  }
  top = largest_of_lanes(top);
  if (bits_of(top) == static_cast<int>(0xff800000u)) top = 0.0f;
  float sum = 0.0f;
  for (int k = first; k < args.keys; k += 16) {
    const float e = exponential(minus(from_bits(static_cast<int>(Shared::word(scores + k * 4))), top));
    Shared::put_word(scores + k * 4, static_cast<uint32_t>(bits_of(e)));
    sum = plus(sum, e);
  }
  sum = sum_of_lanes(sum);
  const float inverse = sum == 0.0f ? 0.0f : over(1.0f, sum);
  for (int k = first; k < args.padded; k += 16) {
    uint8_t weight = 0;
    if (k < args.keys) {
      const float p = times(from_bits(static_cast<int>(Shared::word(scores + k * 4))), inverse);
      weight = static_cast<uint8_t>(rounded(smaller(larger(times(p, args.weight_factor), args.weight_lo), args.weight_hi)));
    }
    Shared::put(weights + k, weight);
  }
}

// A warp's part of a tile of sums to rows of `row_bytes` in shared memory.
template <int TILES>
DEVICE void lay_tile(const int (&acc)[TILES][2][4], int at, int row_bytes) {
  const int lane = thread_index() % 32, warp = thread_index() / 32;
#pragma unroll
  for (int i = 0; i < TILES; i++)
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
      for (int h = 0; h < 4; h++) {
        const int row = i * 16 + lane / 4 + h / 2 * 8, column = warp * 16 + j * 8 + lane % 4 * 2 + h % 2;
        Shared::put_word(at + row * row_bytes + column * 4, static_cast<uint32_t>(acc[i][j][h]));
      }
}

template <int ROWS>
DEVICE void attend(const AttentionArgs& args) {
  enum { TILES = ROWS / 16 };
  const int n = block_z() / args.n_heads, head = block_z() % args.n_heads, first = block_x() * ROWS;
  const int64_t q = n * args.q_sample + args.heads.get(head * 4) + static_cast<int64_t>(first) * args.q_row;
  const int64_t k = n * args.k_sample + args.heads.get(head * 4 + 1), v = n * args.v_sample + args.heads.get(head * 4 + 2);
  // Shared memory: scores; queries, and in their place the weights; a tile of keys or values.
  const int score_bytes = (args.padded + 16) * 4, weights = ROWS * score_bytes, tile = weights + ROWS * args.pitch;
#pragma unroll 1
  for (int d = 0; d < args.depth; d += 64)
    load_tile<ROWS>(args.q, q + static_cast<int64_t>(d) * args.q_depth, args.q_row, args.q_depth, args.rows - first, args.depth - d,
                    weights + d, args.pitch);
#pragma unroll 1
  for (int from = 0; from < args.keys; from += 64) {
    int acc[TILES][2][4] = {};
#pragma unroll 1
    for (int d = 0; d < args.depth; d += 64) {
      barrier();  // the tile before has been read
      load_tile<64>(args.k, k + static_cast<int64_t>(from) * args.k_key + static_cast<int64_t>(d) * args.k_depth, args.k_key,
                    args.k_depth, args.keys - from, args.depth - d, tile, ROW_BYTES);
      barrier();
      multiply_tile<TILES, true>(weights + d, args.pitch, tile, acc);
    }
    lay_tile<TILES>(acc, from * 4, score_bytes);
  }
  barrier();
#pragma unroll 1
  for (int row = thread_index() / 16; row < ROWS; row += 8)
    weigh(args, n, head, first + row < args.rows ? first + row : -1, row * score_bytes, weights + row * args.pitch);
  const Scale scale = scale_of(args.out, 0);
  const int64_t y = n * args.out.y_sample + args.heads.get(head * 4 + 3) + static_cast<int64_t>(first) * args.out.y_place;
#pragma unroll 1
  for (int from = 0; from < args.width; from += 64) {
    int acc[TILES][2][4] = {};
#pragma unroll 1
    for (int d = 0; d < args.keys; d += 64) {
      barrier();
      load_tile<64>(args.v, v + static_cast<int64_t>(from) * args.v_width + static_cast<int64_t>(d) * args.v_key, args.v_width,
                    args.v_key, args.width - from, args.keys - d, tile, ROW_BYTES);
      barrier();
      multiply_tile<TILES, false>(weights + d, args.pitch, tile, acc);
    }
    lay_tile<TILES>(acc, 0, score_bytes);  // where scores were, so that neighbours in memory are written at the same time
    barrier();
    const int column = thread_index() % 64;
#pragma unroll 1
    for (int row = thread_index() / 64; row < ROWS; row += 2)
      if (first + row < args.rows && from + column < args.width)
        finish_at(args.out, static_cast<int>(Shared::word(row * score_bytes + column * 4)), scale,
                  y + row * args.out.y_place + (from + column) * args.out.y_channel, 0);
  }
}
