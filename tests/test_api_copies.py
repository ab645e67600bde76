"""Copies and pickles of quantized models: through the file's bytes, with engine, options and dial."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bitdial
from bitdial import QuantizeConfig, QuantizedModel
from bitdial.engines.base import available_engines
from bitdial.errors import ArtifactError, EngineError

needs_cpu = pytest.mark.skipif(bool(available_engines()["cpu"]), reason="the CPU engine is not built")
ENGINES = [("reference", {"check_finite": False}), pytest.param("cpu", {"threads": 2, "kernels": "fixed"}, marks=needs_cpu)]


@pytest.fixture(scope="module")
def images(helpers: Any) -> Tensor:
    data: Tensor = helpers.images(32, seed=5)
    return data


@pytest.fixture(scope="module")
def program(conv_net: nn.Module, images: Tensor) -> Any:
    config = QuantizeConfig(target="paper", selector="greedy", calibration_images=32, search_images=8, group_size=8)
    quantized = bitdial.quantize(conv_net, images, config, evaluation=[(images, torch.arange(32) % 10)])
    return quantized.program


def unpickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))  # noqa: S301


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, unpickled])
@pytest.mark.parametrize(("engine", "options"), ENGINES)
def test_copies_are_the_same_model_of_its_own(
    engine: str, options: dict[str, Any], copied: Any, program: Any, images: Tensor
) -> None:
    model = QuantizedModel(program, engine, **options)
    model.set_ratio(0.5)
    twin = copied({"nested": [model]})["nested"][0] if copied is not copy.copy else copied(model)
    assert type(twin) is QuantizedModel and twin.program is not program
    assert twin.engine_name == engine and twin.ratio == 0.5
    assert all(getattr(twin.engine, name) == value for name, value in options.items())
    assert all(torch.equal(twin(images, r), model(images, r)) for r in [None, *model.ratios])
    assert twin.describe() == model.describe() and twin.program.curve == program.curve
    assert twin.program.provenance == json.loads(json.dumps(program.provenance))  # tuples are lists in a file
    twin.set_ratio(1.0)
    assert model.ratio == 0.5  # a dial of its own


class Named(QuantizedModel):
    """A user's class, with an attribute."""

    name = ""


def test_subclasses_and_attributes_are_kept(program: Any, images: Tensor) -> None:
    model = Named(program, "reference")
    model.name = "first"
    twin = copy.deepcopy(nn.ModuleDict({"a": nn.Linear(1, 1)})), copy.deepcopy(model)
    assert type(twin[1]) is Named and twin[1].name == "first" and torch.equal(twin[1](images), model(images))


@needs_cpu
def test_pickles_are_read_by_another_process_without_torch(program: Any, images: Tensor, tmp_path: Path) -> None:
    model = QuantizedModel(program, "cpu", kernels="fixed")
    model.set_ratio(0.75)
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(model))
    np.save(tmp_path / "images.npy", images[:4].numpy())
    code = (
        "import pickle, sys, numpy as np\n"
        "model = pickle.load(open('model.pkl', 'rb'))\n"
        "np.save('answers.npy', model(np.load('images.npy')))\n"
        "print(model.ratio, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["0.75", "False"], done.stderr
    assert np.array_equal(np.load(tmp_path / "answers.npy"), model(images[:4]).numpy())


def test_what_is_unpickled_is_checked(program: Any) -> None:
    rebuild, (kind, data, engine, options, ratio), _ = QuantizedModel(program, "reference").__reduce__()
    damaged = bytearray(data)
    damaged[-20] ^= 1
    for bad in (bytes(damaged), data[:-1], b""):
        with pytest.raises(ArtifactError, match="the copied model"):
            rebuild(kind, bad, engine, options, ratio)
    with pytest.raises(EngineError, match="unknown engine"):
        rebuild(kind, data, "gpu", options, ratio)
