// Low activations from 8-bit ones, four in a register: clamp(rne(v / 2^shift)), as bitdial.quantization.effective_bits.extract.
#pragma once
#include "device.h"

// Two values in 16-bit halves, made non-negative by adding an even multiple of 2^shift, so that halves still round to even. low,
// high: limits of the result, that multiple counted in.
DEVICE uint32_t extract_halves(uint32_t v, int shift, uint32_t low, uint32_t high) {
  if (shift > 0) {  // (v + 2^(s-1) - 1 + (bit s of v)) >> s rounds half to even
    const uint32_t odd = (v >> shift) & 0x00010001u;
    v = ((v + ((1u << (shift - 1)) - 1u) * 0x00010001u + odd) >> shift) & ((0xffffu >> shift) * 0x00010001u);
  }
  const uint32_t above = ((v + (0x7fffu - high) * 0x00010001u) >> 15) & 0x00010001u;  // v > high, for v below 2^15
  const uint32_t above_mask = above * 0xffffu;
  v = (v & ~above_mask) | (high * 0x00010001u & above_mask);
  const uint32_t enough = ((v + (0x8000u - low) * 0x00010001u) >> 15) & 0x00010001u;  // v >= low
  const uint32_t enough_mask = enough * 0xffffu;
  v = (v & enough_mask) | (low * 0x00010001u & ~enough_mask);
  return v;
}

// Four bytes to four low values in bytes (two's complement where signed).
template <bool SIGNED>
DEVICE uint32_t extract_bytes(uint32_t v, int shift, int amax) {
  uint32_t even, odd;
  if (SIGNED) {
    v ^= 0x80808080u;  // + 128, and 128 more: 256 / 2^7 is even
    even = (v & 0x00ff00ffu) + 0x00800080u;
    odd = ((v >> 8) & 0x00ff00ffu) + 0x00800080u;
    const uint32_t base = 256u >> shift, a = static_cast<uint32_t>(amax);
    const uint32_t least = base > a ? base - a : 0u;
    // Subtracting in halves: add 256 first so that no half borrows from its neighbour.
    even = extract_halves(even, shift, least, base + a) + 0x01000100u - base * 0x00010001u;
    odd = extract_halves(odd, shift, least, base + a) + 0x01000100u - base * 0x00010001u;
  } else {
    even = extract_halves(v & 0x00ff00ffu, shift, 0u, static_cast<uint32_t>(amax));
    odd = extract_halves((v >> 8) & 0x00ff00ffu, shift, 0u, static_cast<uint32_t>(amax));
  }
  return (even & 0x00ff00ffu) | ((odd & 0x00ff00ffu) << 8);
}

// Eight low values of 4 bits in one register: those of the first chunk in the low halves of the bytes.
DEVICE uint32_t join_nibbles(uint32_t first, uint32_t second) {
  return (first & 0x0f0f0f0fu) | ((second & 0x0f0f0f0fu) << 4);
}
