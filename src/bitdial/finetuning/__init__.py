"""Dual-forward training of the 8-bit and the low-precision model at once will live here."""
