// Low activations from 8-bit ones, four in a register: clamp(rne(v / 2^shift)), as bitdial.quantization.effective_bits.extract.
#pragma once
#include "device.h"

// How bytes become low: halves (float16) twice in each word. scale: 2^-shift. offset: what makes one fused multiply-add of 1024 + v
// (1152 + v for signed bytes) give base + v / 2^shift, base 1024 (1536): there float16 has a step of 1, so that its rounding to
// nearest even is the rounding wanted, and the low byte of the sum is the integer. low, high: base plus the limits.
struct Extraction {
  uint32_t scale, offset, low, high;
};

// code: scale in the lower half, offset in the upper one (bitdial.engines.cuda.packing.extraction_code).
DEVICE Extraction extraction(uint32_t code, uint32_t low, uint32_t high) {
  return {permute(code, code, 0x1010u), permute(code, code, 0x3232u), low, high};
}

// Four bytes to four low values in bytes (two's complement where signed).
template <bool SIGNED>
DEVICE uint32_t extract_bytes(uint32_t v, const Extraction& how) {
  if (SIGNED) v ^= 0x80808080u;  // + 128
  const uint32_t exponent = 0x64646464u;  // 0x64vv is the float16 number 1024 + vv
  uint32_t even = fused_halves(permute(v, exponent, 0x4140u), how.scale, how.offset);
  uint32_t odd = fused_halves(permute(v, exponent, 0x4342u), how.scale, how.offset);
  even = smaller_halves(even, how.high);
  odd = smaller_halves(odd, how.high);
  if (SIGNED) {
    even = larger_halves(even, how.low);
    odd = larger_halves(odd, how.low);
  }
  return permute(even, odd, 0x6420u);
}

// Eight low values of 4 bits in one register: the first four in the low halves of the bytes.
DEVICE uint32_t join_nibbles(uint32_t first, uint32_t second) {
  return (first & 0x0f0f0f0fu) | ((second & 0x0f0f0f0fu) << 4);
}
