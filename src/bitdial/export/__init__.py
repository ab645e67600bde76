"""A fixed ratio or the whole dial for other runtimes: C99, ONNX and the NPU."""
