"""The engine for NVIDIA GPUs, with kernels compiled at run time, will live here."""
