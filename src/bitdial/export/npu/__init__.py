"""A quantized network for the NPU: instruction words, weight images and the schedule that a host works off. Needs no torch."""

from bitdial.export.npu.export import NpuExport, export_npu
from bitdial.export.npu.reading import read_folder

__all__ = ["NpuExport", "export_npu", "read_folder"]
