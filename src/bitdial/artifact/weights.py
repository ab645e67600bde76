"""The weights of a layer in a file: 8-bit ones, and low ones packed at `signed_bits(wmax)` bits.

  weight       int8, the weight's shape
  weight_high  int8: the 8-bit weights of a "packed" layer, whose groups low at every ratio have none: these are `low << shift`
  weight_low   packed: the low weights of those groups
  low_plane    packed: low weights that are integers of their own ("plane"), of the groups low at some ratio; a packed layer
               then has no weight_low, for they are among these

Values are in C order. Low weights of other groups are what extraction derives from the 8-bit ones.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.artifact.instruction_json import LayerHead
from bitdial.artifact.packing import extract_weights, pack_signed, packed_size, read_back, signed_bits, unpack_signed
from bitdial.artifact.tensors import Tensors
from bitdial.errors import ArtifactError
from bitdial.quantization.layer import QuantizedLayer
from bitdial.quantization.weights import per_weight

Array = npt.NDArray[Any]


def weight_mask(layer: QuantizedLayer, groups: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """bool, shape of the layer's weight: weights of the groups of `groups` (bool [n_groups])."""
    assert layer.weight is not None
    return np.broadcast_to(per_weight(layer, np.asarray(groups)), layer.weight.shape)


def weight_shifts(layer: QuantizedLayer) -> npt.NDArray[np.uint8]:
    """uint8, shape of the layer's weight: the shift of each."""
    assert layer.weight is not None
    return np.broadcast_to(per_weight(layer, layer.weight_shift), layer.weight.shape)


def low_of(layer: QuantizedLayer, mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int8]:
    """int8 [count]: low weights under a mask, stored or derived, as `quantization.weights.low_integers` but bounded in memory."""
    assert layer.weight is not None
    if layer.low_weight is not None:
        return layer.low_weight[mask]
    return extract_weights(layer.weight[mask], weight_shifts(layer)[mask], layer.wmax)


def settled(layer: QuantizedLayer) -> QuantizedLayer:
    """The layer as a file gives it back: low weights of groups never low are derived, and all are where no group ever is."""
    if layer.weight is None or layer.low_weight is None:
        return layer
    mask = weight_mask(layer, layer.low.any(axis=0))
    derived = replace(layer, low_weight=None)
    if not mask.any():
        return derived
    low = layer.low_weight.copy()
    low[~mask] = low_of(derived, ~mask)
    return replace(layer, low_weight=low)


def weight_tensors(layer: QuantizedLayer, banded: bool) -> dict[str, Array]:
    """The tensors of a layer's weights by name. banded: groups low at every ratio need no 8-bit weights."""
    if layer.weight is None:
        return {}
    bits, always = signed_bits(layer.wmax), weight_mask(layer, layer.low.all(axis=0))
    tensors: dict[str, Array] = {}
    if layer.low_weight is not None and layer.low.any():
        tensors["low_plane"] = pack_signed(layer.low_weight[weight_mask(layer, layer.low.any(axis=0))], bits)
    if banded and always.any():
        low = low_of(layer, always)
        if (read_back(low, weight_shifts(layer)[always]) == layer.weight[always]).all():  # else changed since it was banded
            own = {} if "low_plane" in tensors else {"weight_low": pack_signed(low, bits)}
            return {**tensors, **own, "weight_high": layer.weight[~always]}
    return {**tensors, "weight": layer.weight}


def check_weight_size(head: LayerHead, stock: Tensors, where: str) -> None:
    """The weights in the file must be as many as the shape says, before anything is sized by that shape."""
    layer, shape = head.layer, head.shape
    if shape is None:
        if head.packed or head.plane:
            raise ArtifactError.damaged(where, "a matmul has no weights")
        return
    if layer.wmax < 1:
        raise ArtifactError.damaged(where, "wmax is not positive")
    count, bits = math.prod(shape), signed_bits(layer.wmax)
    size = {key: stock.size(f"layers/{layer.name}/{key}") for key in ("weight", "weight_high", "weight_low", "low_plane")}
    low = count - size["weight_high"]
    if head.packed:
        fits = low > 0 and (head.plane or packed_size(low, bits) == size["weight_low"])
    else:
        fits = size["weight"] == count
    least = packed_size(low, bits) if head.packed else 1
    if not fits or (head.plane and not least <= size["low_plane"] <= packed_size(count, bits)):
        raise ArtifactError.damaged(where, f"the stored weights do not fill the shape {list(shape)}")


def read_weights(head: LayerHead, stock: Tensors, where: str) -> None:
    """Give a layer, whose other arrays it has, its weights: undo `weight_tensors`. Raises ArtifactError."""
    layer, shape, bits = head.layer, head.shape, signed_bits(head.layer.wmax)
    assert shape is not None
    broken = ArtifactError.damaged(where, "the packed weights do not fit the groups or limits")
    prefix = f"layers/{layer.name}/"
    if not head.packed and not head.plane:
        layer.weight = stock.take(prefix + "weight", np.int8, shape)
        return
    if layer.weight_shift.max() > 7:
        raise broken

    def unpacked(key: str, mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int8]:
        count = int(np.count_nonzero(mask))
        return unpack_signed(stock.take(prefix + key, np.uint8, (packed_size(count, bits),)), count, bits)

    layer.weight = np.zeros(shape, np.int8)  # masks are of its shape
    some = weight_mask(layer, layer.low.any(axis=0))
    plane = np.zeros(shape, np.int8)
    if head.plane:
        if not some.any():
            raise broken
        plane[some] = unpacked("low_plane", some)
    if head.packed:
        always = weight_mask(layer, layer.low.all(axis=0))
        low, shift = plane[always] if head.plane else unpacked("weight_low", always), weight_shifts(layer)[always]
        layer.weight[always] = read_back(low, shift)
        layer.weight[~always] = stock.take(prefix + "weight_high", np.int8, (always.size - len(low),))
        if not head.plane and not (extract_weights(layer.weight[always], shift, layer.wmax) == low).all():
            raise broken
    else:
        layer.weight = stock.take(prefix + "weight", np.int8, shape)
    if head.plane:
        plane[~some] = low_of(layer, ~some)
        layer.low_weight = plane
