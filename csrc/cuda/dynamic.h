// Dynamic extraction: how far the groups of each sample are shifted, and a layer's input with its low channels read back from low
// precision, which 8-bit products then take.
#pragma once
#include "device.h"

struct LowerArgs {
  Global<const uint8_t> x;
  Global<uint8_t> y;             // as x; the bytes between the channels of two positions stay as they are
  Global<uint8_t> shifts;        // [samples, n_groups], of low groups
  Global<const int32_t> bounds;  // [n_groups + 1]: first channel of each group
  Global<const int32_t> groups;  // [channels]: the group, -1 where it stays at 8 bits
  int64_t x_sample;
  int32_t samples, positions, pitch, channels, n_groups;  // positions: of a sample
  int32_t x_signed, amax, bits;                           // bits: of amax
};

// A block per sample and group: an OR over magnitudes has as many bits as the largest of them.
DEVICE void find_shifts(const LowerArgs& args) {
  const int n = block_x() / args.n_groups, group = block_x() % args.n_groups;
  const int first = args.bounds.get(group), end = args.bounds.get(group + 1);
  if (args.groups.get(first) < 0) return;
  uint32_t all = 0;
  for (int place = thread_index(); place < args.positions; place += 128)
    for (int channel = first; channel < end; channel++) {
      const uint8_t q = args.x.get(n * args.x_sample + static_cast<int64_t>(place) * args.pitch + channel);
      const int v = args.x_signed ? static_cast<int8_t>(q) : q;
      all |= static_cast<uint32_t>(v < 0 ? -v : v);
    }
  Shared::put_word(thread_index() * 4, all);
  barrier();
  if (thread_index()) return;
  for (int i = 1; i < 128; i++) all |= Shared::word(i * 4);
  int shift = -args.bits;
  for (; all; all >>= 1) shift++;
  args.shifts.put(static_cast<int64_t>(n) * args.n_groups + group, static_cast<uint8_t>(shift > 0 ? shift : 0));
}

DEVICE void lower(const LowerArgs& args) {
  const int64_t i = static_cast<int64_t>(block_x()) * 256 + thread_index();
  const int64_t per = static_cast<int64_t>(args.positions) * args.channels;
  if (i >= per * args.samples) return;
  const int64_t n = i / per;
  const int channel = static_cast<int>(i % args.channels), group = args.groups.get(channel);
  const int64_t at = n * args.x_sample + i % per / args.channels * args.pitch + channel;
  const uint8_t q = args.x.get(at);
  if (group < 0) {
    args.y.put(at, q);
    return;
  }
  const int shift = args.shifts.get(n * args.n_groups + group);
  const float v = to_float(args.x_signed ? static_cast<int8_t>(q) : q);
  const int low = rounded(times(v, from_bits((127 - shift) << 23)));  // a power of two: exact
  const int most = args.amax, least = args.x_signed ? -most : 0;
  args.y.put(at, static_cast<uint8_t>((low < least ? least : low > most ? most : low) * (1 << shift)));
}
