"""The HTTP server: models on an event loop, the inference protocol, limits and keys, start and stop."""
