"""Architectures and data sets used by examples, tests and benchmarks.

This package imports nothing by itself: `zoo.datasets` and `zoo.preprocessing` need NumPy (and Pillow for images), the
other modules need torch.
"""
