// GEMM and implicit-GEMM convolution over low and 8-bit groups in one launch, and the product of two activations.
//
// A block makes 64 rows (positions of the result) by COLUMNS columns (output channels), each of its warps 32 by 32: four warps for 64
// columns, eight for 128, which share what is loaded and extracted. The reduction goes in steps of 64: four chunks of 16 channels of
// one filter tap, as the layer's table lists them. Activations come through registers, where low chunks are extracted on the way;
// weights lie packed in the order of the fragments and are copied beside it. Both have two buffers, so that a step's products cover
// the next one's loads.
#pragma once
#include "epilogue.h"
#include "extract.h"

enum StepKind { STEP_BYTES = 0, STEP_NIBBLES = 1, STEP_LOW_BYTES = 2 };
enum { ROW_BYTES = 80, A_BYTES = 64 * ROW_BYTES, B_START = 2 * A_BYTES };  // rows of 80: no bank conflicts

// Of a block: its threads, the chunks of a step that each of them loads, bytes of a buffer of weights, words of a row of sums.
template <int COLUMNS>
struct Block {
  enum { THREADS = 2 * COLUMNS, CHUNKS = 128 / COLUMNS, B_BYTES = 64 * COLUMNS, SUMS = COLUMNS + 4, ACROSS = COLUMNS / 32 };
  DEVICE int warp_row() { return thread_index() / 32 / ACROSS * 32; }
  DEVICE int warp_column() { return thread_index() / 32 % ACROSS * 32; }
};

struct ConvArgs {
  Global<const uint8_t> x;
  Global<const uint8_t> weights;
  Global<const int32_t> steps;   // per step: kind, halves, first 16 bytes of its weights, row of shifts behind it or -1
  Global<const int32_t> places;  // per chunk (or element): dy, dx, channel or -1, how to extract (see extraction)
  Global<const int32_t> starts;  // per convolution group, its first step; and the end
  Global<const uint8_t> shifts;  // [rows, padded outputs]
  Epilogue out;
  int64_t x_sample;
  int32_t rows, height, width, pitch;          // of the input; rows: positions of the result in all samples
  int32_t out_height, out_width;
  int32_t stride_y, stride_x, pad_y, pad_x;
  int32_t outputs, padded;                     // of one convolution group
  uint32_t least, most;                        // limits of low activations, as in Extraction
};

// One kind of step alone, for counting the instructions of its loop (benchmarks/gpu_model.py).
#ifdef BITDIAL_ONLY_KIND
DEVICE int kind_of(const ConvArgs&, int) { return BITDIAL_ONLY_KIND; }
DEVICE int halves_of(const ConvArgs&, int) { return 2; }
DEVICE int shift_row_of(const ConvArgs&, int) { return BITDIAL_ONLY_BORDERS ? 0 : -1; }
DEVICE bool fours_of(const ConvArgs&) { return BITDIAL_ONLY_FOURS; }
#else
DEVICE int kind_of(const ConvArgs& args, int step) { return args.steps.get(step * 4); }
DEVICE int halves_of(const ConvArgs& args, int step) { return args.steps.get(step * 4 + 1); }
DEVICE int shift_row_of(const ConvArgs& args, int step) { return args.steps.get(step * 4 + 3); }
DEVICE bool fours_of(const ConvArgs& args) { return args.out.fours; }
#endif

// The byte position in the input of a chunk for a row, or -1 outside of it.
struct Row {
  int64_t sample;
  int y, x;
  bool there;
};

DEVICE Row row_of(const ConvArgs& args, int row) {
  Row r;
  r.there = row < args.rows;
  const int area = args.out_height * args.out_width;
  const int n = row / area, place = row % area;
  r.sample = n * args.x_sample;
  r.y = place / args.out_width * args.stride_y - args.pad_y;
  r.x = place % args.out_width * args.stride_x - args.pad_x;
  return r;
}

DEVICE int64_t place_in(const ConvArgs& args, const Row& row, int64_t place) {
  const Words4 p = args.places.get16(place * 4);
  const int y = row.y + static_cast<int>(p.v[0]), x = row.x + static_cast<int>(p.v[1]), c = static_cast<int>(p.v[2]);
  if (!row.there || c < 0 || y < 0 || y >= args.height || x < 0 || x >= args.width) return -1;
  return row.sample + (static_cast<int64_t>(y) * args.width + x) * args.pitch + c;
}

// Chunks of a row, from the one of number `first` in the step.
template <bool ELEMENTS, int CHUNKS>
DEVICE void fetch(const ConvArgs& args, const Row& row, int step, int first, Words4 (&v)[CHUNKS]) {
#pragma unroll
  for (int i = 0; i < CHUNKS; i++) {
    const int64_t chunk = static_cast<int64_t>(step) * 4 + first + i;
    v[i] = Words4{{0, 0, 0, 0}};
    if (ELEMENTS) {
#pragma unroll
      for (int e = 0; e < 16; e++) {
        const int64_t at = place_in(args, row, chunk * 16 + e);
        if (at >= 0) v[i].v[e / 4] |= static_cast<uint32_t>(args.x.get(at)) << (8 * (e % 4));
      }
    } else {
      const int64_t at = place_in(args, row, chunk);
      if (at >= 0) v[i] = args.x.get16(at);
    }
  }
}

// Extract chunks where their step is low and store them for ldmatrix: in half bytes, a chunk is eight bytes, its channels 0 to 7 in
// the low halves (`pack_nibbles` lays the weights out alike).
template <bool SIGNED, bool ELEMENTS, bool NATIVE, int CHUNKS>
DEVICE void keep(const ConvArgs& args, int step, int kind, int row, int first, int buffer, Words4 (&v)[CHUNKS]) {
  if (kind != STEP_BYTES) {
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) {
      const int64_t chunk = static_cast<int64_t>(step) * 4 + first + i;
      const int32_t code = args.places.get((ELEMENTS ? chunk * 16 : chunk) * 4 + 3);  // one for all elements of a chunk
      const Extraction how = extraction(static_cast<uint32_t>(code), args.least, args.most);
#pragma unroll
      for (int w = 0; w < 4; w++) v[i].v[w] = extract_bytes<SIGNED>(v[i].v[w], how);
    }
  }
  const int at = buffer * A_BYTES + row * ROW_BYTES;
#pragma unroll
  for (int i = 0; i < CHUNKS; i++) {
    if (NATIVE && kind == STEP_NIBBLES)
      Shared::put8(at + (first + i) * 8, join_nibbles(v[i].v[0], v[i].v[2]), join_nibbles(v[i].v[1], v[i].v[3]));
    else Shared::put16(at + (first + i) * 16, v[i]);
  }
}

template <int COLUMNS>
DEVICE void copy_weights(const ConvArgs& args, int step, int kind, int column, int buffer) {
  const int tile_bytes = kind == STEP_NIBBLES ? 256 : 512;  // of eight columns
  const int64_t from = static_cast<int64_t>(args.steps.get(step * 4 + 2)) * 16 + column / 8 * tile_bytes;
#pragma unroll 1
  for (int i = thread_index() * 16; i < COLUMNS / 8 * tile_bytes; i += Block<COLUMNS>::THREADS * 16)
    copy16_later(B_START + buffer * Block<COLUMNS>::B_BYTES + i, args.weights, from + i);
}

// Eight low weights, times 16, in the high halves of two registers of bytes: three instructions for what the compiler's emulation
// of a 4-bit product takes two hundred.
DEVICE void unpack_nibbles(uint32_t word, uint32_t (&b)[2]) {
  b[0] = (word << 4) & 0xf0f0f0f0u;
  b[1] = word & 0xf0f0f0f0u;
}

template <bool SIGNED, bool NATIVE, int COLUMNS>
DEVICE void multiply_step(int kind, int halves, int buffer, int (&acc)[2][4][4]) {
  const int lane = thread_index() % 32, warp_row = Block<COLUMNS>::warp_row(), warp_column = Block<COLUMNS>::warp_column();
  const int a_row = buffer * A_BYTES + (warp_row + lane % 16) * ROW_BYTES + lane / 16 * 16;
  const int b_start = B_START + buffer * Block<COLUMNS>::B_BYTES;
  if (NATIVE && kind == STEP_NIBBLES) {
    uint32_t a[2][4];
    for (int i = 0; i < 2; i++) load_fragment(a[i], a_row + i * 16 * ROW_BYTES);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int at = b_start + (warp_column / 8 + j) * 256 + lane * 4;
      const uint32_t b[2] = {Shared::word(at), Shared::word(at + 128)};
#pragma unroll
      for (int i = 0; i < 2; i++) {
        if (halves == 2) {
          multiply_nibbles<SIGNED>(acc[i][j], a[i], b);
        } else {
          const uint32_t half[2] = {a[i][0], a[i][1]};
          multiply_nibbles_half<SIGNED>(acc[i][j], half, b[0]);
        }
      }
    }
    return;
  }
#pragma unroll 1
  for (int half = 0; half < halves; half++) {
    uint32_t a[2][4];
#pragma unroll
    for (int i = 0; i < 2; i++) load_fragment(a[i], a_row + i * 16 * ROW_BYTES + half * 32);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      uint32_t b[2];
      if (kind == STEP_NIBBLES) {
        unpack_nibbles(Shared::word(b_start + (warp_column / 8 + j) * 256 + half * 128 + lane * 4), b);
      } else {
        const int at = b_start + (warp_column / 8 + j) * 512 + half * 256 + lane * 8;
        b[0] = Shared::word(at);
        b[1] = Shared::word(at + 4);
      }
#pragma unroll
      for (int i = 0; i < 2; i++) multiply_bytes<SIGNED, true>(acc[i][j], a[i], b);
    }
  }
}

// acc += part << shift, the shift of each column; part starts anew. On unpacked nibbles part is 16 times too large.
template <bool NATIVE>
DEVICE void add_shifted(const ConvArgs& args, int kind, int shift_row, int column, int (&acc)[2][4][4], int (&part)[2][4][4]) {
  const int lane = thread_index() % 32;
  const int less = !NATIVE && kind == STEP_NIBBLES ? 4 : 0;
#pragma unroll
  for (int j = 0; j < 4; j++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int at = column + j * 8 + lane % 4 * 2 + e;
      const int shift = args.shifts.get(static_cast<int64_t>(shift_row) * args.padded + at);
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int h = 0; h < 4; h += 2) {
          int& p = part[i][j][h + e];
          acc[i][j][h + e] += static_cast<int>(static_cast<uint32_t>(p >> less) << shift);
          p = 0;
        }
    }
}

// The sums of a block in shared memory, row by row: whatever order the fragments have, results are then written side by side. All
// reads of shared memory lie before the last barrier.
template <int COLUMNS>
DEVICE void lay_out(const int (&acc)[2][4][4]) {
  const int lane = thread_index() % 32, warp_row = Block<COLUMNS>::warp_row(), warp_column = Block<COLUMNS>::warp_column();
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int h = 0; h < 4; h++) {
        const int row = warp_row + i * 16 + lane / 4 + h / 2 * 8, column = warp_column + j * 8 + lane % 4 * 2 + h % 2;
        Shared::put_word((row * Block<COLUMNS>::SUMS + column) * 4, static_cast<uint32_t>(acc[i][j][h]));
      }
  barrier();
}

// A walk over a block's results, two rows (or two columns in 64) of it at a time: neighbours in memory at the same time.
template <int COLUMNS>
struct Walk {
  int row, column;
  bool along_rows;

  DEVICE Walk begin(const Epilogue& out) {
    const bool along_rows = out.y_channel == 1;
    const int length = along_rows ? COLUMNS : 64, fast = thread_index() % length, slow = thread_index() / length;
    return {along_rows ? slow : fast, along_rows ? fast : slow, along_rows};
  }
  DEVICE void advance(Walk& w) {
    if (w.along_rows) w.row += 2;
    else w.column += COLUMNS / 32;
  }
  DEVICE int sum_at(const Walk& w) { return static_cast<int>(Shared::word((w.row * Block<COLUMNS>::SUMS + w.column) * 4)); }
};

// A block's results in words of four channels, 8 rows at a time.
template <int COLUMNS>
DEVICE void write_words(const ConvArgs& args, int group, int column) {
  const int local = column + thread_index() % (COLUMNS / 4) * 4, channel = group * args.outputs + local;
  const int area = args.out_height * args.out_width;
  int row = thread_index() / (COLUMNS / 4);
  const int start = block_x() * 64 + row;
  if (local >= args.outputs) return;
  Scale scale[4];
#pragma unroll
  for (int e = 0; e < 4; e++) scale[e] = scale_of(args.out, channel + e);
  int sample = start / area, place = start % area;
#pragma unroll 2
  for (int i = 0; i < 8; i++, row += 8) {
    if (block_x() * 64 + row < args.rows)
      finish_word(args.out, Shared::get16((row * Block<COLUMNS>::SUMS + local - column) * 4), scale,
                  sample * args.out.y_sample + place * args.out.y_place + channel,
                  sample * args.out.r_sample + place * args.out.r_place + channel);
    for (place += 8; place >= area; place -= area) sample++;
  }
}

template <bool SIGNED, bool ELEMENTS, bool NATIVE, int COLUMNS>
DEVICE void convolve(const ConvArgs& args) {
  enum { CHUNKS = Block<COLUMNS>::CHUNKS };
  const int group = block_z(), column = block_y() * COLUMNS;
  const int own_row = thread_index() * CHUNKS / 4, own_chunk = thread_index() * CHUNKS % 4;
  const int warp_column = Block<COLUMNS>::warp_column();
  const Row row = row_of(args, block_x() * 64 + own_row);
  int acc[2][4][4], part[2][4][4];
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int h = 0; h < 4; h++) acc[i][j][h] = part[i][j][h] = 0;

  const int first = args.starts.get(group), end = args.starts.get(group + 1);
  Words4 next[CHUNKS];
  int kind = kind_of(args, first);
  copy_weights<COLUMNS>(args, first, kind, column, 0);
  fetch<ELEMENTS>(args, row, first, own_chunk, next);
  keep<SIGNED, ELEMENTS, NATIVE>(args, first, kind, own_row, own_chunk, 0, next);
  wait_for_copies();
  barrier();
#pragma unroll 1
  for (int step = first; step < end; step++) {
    const int buffer = (step - first) % 2;
    int next_kind = kind;
    if (step + 1 < end) {
      next_kind = kind_of(args, step + 1);
      copy_weights<COLUMNS>(args, step + 1, next_kind, column, 1 - buffer);
      fetch<ELEMENTS>(args, row, step + 1, own_chunk, next);
    }
    const int halves = halves_of(args, step);
    if (kind == STEP_BYTES) {
      multiply_step<SIGNED, NATIVE, COLUMNS>(kind, halves, buffer, acc);
    } else {
      multiply_step<SIGNED, NATIVE, COLUMNS>(kind, halves, buffer, part);
      const int shift_row = shift_row_of(args, step);
      if (shift_row >= 0) add_shifted<NATIVE>(args, kind, shift_row, column + warp_column, acc, part);
    }
    if (step + 1 < end) keep<SIGNED, ELEMENTS, NATIVE>(args, step + 1, next_kind, own_row, own_chunk, 1 - buffer, next);
    wait_for_copies();
    barrier();
    kind = next_kind;
  }
#if defined(BITDIAL_ONLY_KIND) && !BITDIAL_ONLY_BORDERS
  add_shifted<NATIVE>(args, kind, 0, column + warp_column, acc, part);  // else the compiler drops the products
#endif
  lay_out<COLUMNS>(acc);
  if (fours_of(args)) {
    write_words<COLUMNS>(args, group, column);
    return;
  }
  const int area = args.out_height * args.out_width;
  using Blocks = Walk<COLUMNS>;
  Blocks w = Blocks::begin(args.out);
  const int start = block_x() * 64 + w.row;
  int sample = start / area, place = start % area;
  Scale scale = {0, 1.0f};
#pragma unroll 2
  for (int i = 0; i < 32; i++, Blocks::advance(w)) {
    const int local = column + w.column, channel = group * args.outputs + local;
    if (block_x() * 64 + w.row < args.rows && local < args.outputs) {
      if (i == 0 || !w.along_rows) scale = scale_of(args.out, channel);
      finish(args.out, Blocks::sum_at(w), scale, sample, place, channel);
    }
    if (w.along_rows)
      for (place += 2; place >= area; place -= area) sample++;
  }
}

// ---- two activations -------------------------------------------------------------------------------------------------------

struct MatMulArgs {
  Global<const uint8_t> a;
  Global<const uint8_t> b;
  Global<const int32_t> heads;  // per head: offsets of a and b within a sample; of the result
  Epilogue out;                 // positions are rows, channels columns; `part` is the head
  int64_t a_sample, b_sample;
  int32_t rows, columns, depth, n_heads;
  int32_t a_row, a_depth, b_column, b_depth;  // strides in bytes
};

// Sixteen bytes along the depth of an operand to shared memory, zeros where it ends.
DEVICE void gather16(const Global<const uint8_t>& x, int64_t from, int stride, int count, int at) {
  if (stride == 1 && count >= 16 && x.aligned16(from)) {
    Shared::put16(at, x.get16(from));
    return;
  }
#pragma unroll 1
  for (int w = 0; w < 4; w++) {
    uint32_t word = 0;
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (w * 4 + e < count) word |= static_cast<uint32_t>(x.get(from + static_cast<int64_t>(w * 4 + e) * stride)) << (8 * e);
    Shared::put_word(at + 4 * w, word);
  }
}

template <bool A_SIGNED, bool B_SIGNED>
DEVICE void multiply_matrices(const MatMulArgs& args) {
  const int thread = thread_index(), lane = thread % 32;
  const int n = block_z() / args.n_heads, head = block_z() % args.n_heads;
  const int64_t a_start = n * args.a_sample + args.heads.get(head * 3);
  const int64_t b_start = n * args.b_sample + args.heads.get(head * 3 + 1);
  const int warp_row = Block<64>::warp_row(), warp_column = Block<64>::warp_column();
  int acc[2][4][4];
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int h = 0; h < 4; h++) acc[i][j][h] = 0;
#pragma unroll 1
  for (int k = 0; k < args.depth; k += 64) {
    const int row = block_x() * 64 + thread / 2, column = block_y() * 64 + thread / 2;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int from = k + thread % 2 * 32 + i * 16, left = args.depth - from;
      const int at = thread / 2 * ROW_BYTES + thread % 2 * 32 + i * 16;
      gather16(args.a, a_start + static_cast<int64_t>(row) * args.a_row + static_cast<int64_t>(from) * args.a_depth,
               args.a_depth, row < args.rows ? left : 0, at);
      gather16(args.b, b_start + static_cast<int64_t>(column) * args.b_column + static_cast<int64_t>(from) * args.b_depth,
               args.b_depth, column < args.columns ? left : 0, A_BYTES + at);
    }
    barrier();
#pragma unroll
    for (int half = 0; half < 2; half++) {
      uint32_t a[2][4];
#pragma unroll
      for (int i = 0; i < 2; i++)
        load_fragment(a[i], (warp_row + i * 16 + lane % 16) * ROW_BYTES + half * 32 + lane / 16 * 16);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int at = A_BYTES + (warp_column + j * 8 + lane / 4) * ROW_BYTES + half * 32 + lane % 4 * 4;
        const uint32_t b[2] = {Shared::word(at), Shared::word(at + 16)};
#pragma unroll
        for (int i = 0; i < 2; i++) multiply_bytes<A_SIGNED, B_SIGNED>(acc[i][j], a[i], b);
      }
    }
    barrier();
  }
  lay_out<64>(acc);
  using Blocks = Walk<64>;
  Blocks w = Blocks::begin(args.out);
  const Scale scale = scale_of(args.out, 0);
  const int64_t start = n * args.out.y_sample + args.heads.get(head * 3 + 2);
#pragma unroll 2
  for (int i = 0; i < 32; i++, Blocks::advance(w)) {
    const int r = block_x() * 64 + w.row, column = block_y() * 64 + w.column;
    if (r < args.rows && column < args.columns)
      finish_at(args.out, Blocks::sum_at(w), scale, start + r * args.out.y_place + column * args.out.y_channel, 0);
  }
}
