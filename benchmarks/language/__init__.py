"""A small character model on text, for the case study of language models."""
