"""A quantized network as C99 for embedded targets: one file pair without dependencies, and a self-test.

`export_c` makes the texts, `write_folder` puts them into a folder. Imports no torch (the expected outputs of the self-test
come from an engine).
"""

from bitdial.export.c.export import CExport, export_c, write_folder

__all__ = ["CExport", "export_c", "write_folder"]
