"""The .bitdial file: a quantized model with its dial in one file that loads without torch (NumPy only).

The format, version 1:

- A safetensors file; any safetensors reader lists and reads its tensors. All numbers are little endian.
- `__metadata__` holds "format" ("bitdial"), "version" ("1"), "manifest" (canonical JSON: sorted keys, no spaces,
  ASCII) and "manifest_sha256" (of the manifest's text).
- The manifest holds the graph (nodes, attributes, types, inputs, outputs; the dimension "k times the batch" is ["N",
  k]), the ratios, each layer's scalars, the names that go with bundled vectors, why nodes run in float, provenance,
  the measured curve, and under "tensors" the dtype, shape and sha256 of every tensor.
- "layers/<node>/weight": int8 [O, I / groups, *kernel], never -128. Quantized layers have no float copy: the
  constants that node.weight and node.bias name are left out unless something else reads them, and
  then the node no longer names them.
- "tables/<kind>": what all layers have of bias rows, shifts, low masks, group widths and scales, in graph order, one
  DEFLATE stream per kind; `bitdial.artifact.tables` gives the order of values. Sizes follow from the manifest and are
  checked before and after unpacking.
- Nested low masks are one byte per group: the first ratio index at which the group is low. So a file cannot claim
  nesting and lack it.
- "scalars/...": scales of values and residual factors (float64, so that any Python float reads back exactly), factors
  of 8-bit operators (float32), 256-entry tables (bytes).
- "constants/<name>": what float operators read, in its own dtype. NaN nowhere; infinity only as -inf in constants,
  where attention masks have it. Weights of bfloat16 layers are safetensors' BF16, uint16 bit patterns in NumPy, finite;
  no other tensor has that dtype.
- A band (two ratios) keeps only the ratios within it. Groups low at all of them are "layers/<node>/weight_low":
  signed values of 1 + bit_length(wmax) bits, lowest bit first, no gaps, beside "weight_high" (int8, the other
  weights), both in C order. Loading gives 8-bit weights `low << shift`, which lower to the same values;
  provenance["band"] says so.
- A reader refuses newer versions and converts older ones step by step (`bitdial.artifact.migrate`). It checks
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
