"""Calibration, 8-bit quantization and effective bits. Submodules are imported by name; some need torch, some do not."""
