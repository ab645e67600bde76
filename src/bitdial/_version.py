"""The version of this package, read by the build and stored in every artifact."""

__version__ = "0.1.0.dev0"
