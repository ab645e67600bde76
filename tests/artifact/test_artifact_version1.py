"""A file of version 1 loads, and gives what the code that wrote it gave.

`version1.bitdial` and `version1.npz` (the input x and, per ratio and output, what the reference engine returned) were written by
the last code of version 1:

    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
            self.third, self.gate = nn.Conv2d(32, 16, 3, stride=2, groups=2), nn.Conv2d(16, 16, 1)
            self.query, self.head = nn.Linear(16, 16), nn.Linear(16, 6)

        def forward(self, x):
            x = torch.relu(self.first(x))
            y = torch.relu(self.second(x) + x)
            y = nn.functional.max_pool2d(torch.cat([nn.functional.silu(y), x], 1), 2)
            y = torch.relu(self.third(y))
            z = torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
            y = nn.functional.avg_pool2d(y, 2) * z + nn.functional.max_pool2d(y, 2)
            t = y.flatten(2).transpose(1, 2)
            q = self.query(t)
            return self.head(t + q @ (q.transpose(1, 2) @ t) * 0.01).amax(1).abs(), q

    torch.manual_seed(0)
    images = torch.randn(16, 3, 20, 20)
    config = QuantizeConfig(selector="random", calibration_images=16, search_images=4, batch_size=16, group_size=4,
                            shift_choice="value_error", ratios=(0.0, 0.5, 1.0))
    program = quantize_prepared(prepare(Tiny().eval(), [images], config), config)
    save_program(program, "version1.bitdial")
    x = torch.randn(3, 3, 20, 20).numpy()
    outputs = {f"ratio{i}_output{j}": out for i, ratio in enumerate(program.ratios)
               for j, out in enumerate(ReferenceEngine(program).run(x, ratio))}
    np.savez_compressed("version1.npz", x=x, **outputs)
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bitdial.artifact import from_bytes, inspect_file, load_program, to_bytes, verify_file
from bitdial.engines import create_engine
from bitdial.quantization.instructions import INSTRUCTIONS

OLD = Path(__file__).with_name("version1.bitdial")
STORED = sorted(Path(__file__).with_name("stored").glob("*.bitdial"))  # see stored/write.py


def test_it_holds_every_instruction():
    program = load_program(OLD)
    assert {type(step) for step in program.instructions} == set(INSTRUCTIONS)
    assert any(layer.low[-1].any() for layer in program.layers.values())
    assert verify_file(OLD) == []
    report = inspect_file(OLD)
    assert report["version"] == 1 and report["layers"] == len(program.layers) and report["ratios"] == program.ratios


@pytest.mark.parametrize("engine", ["reference", "cpu"])
@pytest.mark.parametrize("again", [False, True])
def test_it_gives_the_outputs_it_gave(assert_same, engine, again):
    program = load_program(OLD)
    if again:
        newer = from_bytes(to_bytes(program))
        assert_same(program, newer)
        program = newer
    stored = np.load(OLD.with_suffix(".npz"))
    running = create_engine(program, engine)
    for i, ratio in enumerate(program.ratios):
        for j, found in enumerate(running.run(stored["x"], ratio)):
            np.testing.assert_array_equal(np.asarray(found), stored[f"ratio{i}_output{j}"])


def test_ten_models_are_stored():
    assert len(STORED) == 10 and all(file.with_suffix(".npz").exists() for file in STORED)


@pytest.mark.parametrize("engine", ["reference", "cpu"])
@pytest.mark.parametrize("file", STORED, ids=lambda file: file.stem)
def test_ten_stored_models_give_the_bits_they_gave(file, engine):
    program = load_program(file)
    with np.load(file.with_suffix(".npz")) as stored:
        x = [stored[name] for name in stored if name.startswith("input")]
        running = create_engine(program, engine)
        for i, ratio in enumerate(program.ratios):
            found = running.run(x if len(x) > 1 else x[0], ratio)
            outputs = found if isinstance(found, tuple) else (found,)
            assert len(outputs) == sum(name.startswith(f"ratio{i}_") for name in stored)
            for j, out in enumerate(outputs):
                assert np.asarray(out).tobytes() == stored[f"ratio{i}_output{j}"].tobytes()


def test_damage_in_an_old_file_is_found_and_the_rest_shown(tmp_path):
    data = bytearray(OLD.read_bytes())
    data[-1] ^= 1
    broken = tmp_path / "broken.bitdial"
    broken.write_bytes(data)
    report = inspect_file(broken)
    assert not report["hashes_ok"] and report["layers"] == len(load_program(OLD).layers)
    assert "sha256" in verify_file(broken)[0]
