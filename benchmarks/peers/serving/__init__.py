"""Servers that `serving_overhead.py` compares with: each answers a small JSON request as its documentation shows it."""
