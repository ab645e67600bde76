"""The NPU in Amaranth: a weight-stationary array whose elements do one 8x8 or two 4x4 multiplies a cycle (docs/npu.md)."""
