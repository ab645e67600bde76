"""The .bitdial file: a quantized model with its dial in one file that loads without torch (NumPy only).

The format, version 2:

- A safetensors file; any safetensors reader lists and reads its tensors. All numbers are little endian.
- `__metadata__` holds "format" ("bitdial"), "version" ("2"), "manifest" (canonical JSON: sorted keys, no spaces,
  ASCII) and "manifest_sha256" (of the manifest's text).
- The manifest holds the instructions of the program, by class name with all their fields (`instruction_json`), inputs,
  outputs and types (the dimension "k times the batch" is ["N", k]), the ratios, which values are 8-bit and which of
  these are signed, provenance, the measured curve, and under "tensors" the dtype, shape and sha256 of every tensor.
- "layers/<name>/weight": int8 [O, I / groups, *kernel], never -128. Quantized layers have no float copy.
- "layers/<name>/low_plane": low weights that are integers of their own rather than derived from the 8-bit ones: of the
  groups low at some ratio, signed values of 1 + bit_length(wmax) bits, lowest bit first, no gaps, in C order.
- "tables/<kind>": what all layers have of bias rows, shifts, low masks, group widths and scales, in order, one
  DEFLATE stream per kind; `bitdial.artifact.tables` gives the order of values. Sizes follow from the manifest and are
  checked before and after unpacking.
- Nested low masks are one byte per group: the first ratio index at which the group is low. So a file cannot claim
  nesting and lack it.
- "scalars/...": scales of values and residual factors (float64, so that any Python float reads back exactly), 256-entry
  tables (bytes, in the order of the instructions).
- "constants/<name>": what float operators read, in its own dtype. NaN nowhere; infinity only as -inf in constants,
  where attention masks have it. Weights of bfloat16 layers are safetensors' BF16, uint16 bit patterns in NumPy, finite;
  no other tensor has that dtype.
- A band (two ratios) keeps only the ratios within it. Groups low at all of them are "layers/<name>/weight_low" (or, where
  there is one, part of the low plane), packed alike, beside "weight_high" (int8, the other weights). Loading gives 8-bit
  weights `low << shift`, from which extraction gets the same values; provenance["band"] says so.
- A reader refuses newer versions and converts older ones step by step (`bitdial.artifact.migrate`); version 1 held a graph
  and tables by node, from which `bitdial.artifact.version1` makes the instructions. A reader checks
  everything before use: sizes against the file, hashes, names, operators (a fixed list), shapes, ranges. Hashes find
  damage; they are no signature.
"""

from bitdial.artifact.band import restrict_to_band
from bitdial.artifact.store import (
    SaveSummary,
    from_bytes,
    inspect_file,
    load_program,
    save_program,
    to_bytes,
    verify_file,
)

__all__ = [
    "SaveSummary",
    "from_bytes",
    "inspect_file",
    "load_program",
    "restrict_to_band",
    "save_program",
    "to_bytes",
    "verify_file",
]
