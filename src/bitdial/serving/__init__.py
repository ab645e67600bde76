"""The Open Inference Protocol v2 server, its batching and the controller that turns the dial will live here."""
