"""Accuracy and latency curves of a user's model on a user's machine."""
