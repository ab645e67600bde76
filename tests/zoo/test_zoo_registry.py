"""Models by name, and weights files of every kind, good and bad."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bitdial.errors import ConfigError, DataError
from bitdial.zoo.registry import build_model

needs_torchvision = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="NO TORCHVISION: pip install --no-deps torchvision"
)
needs_timm = pytest.mark.skipif(
    importlib.util.find_spec("timm") is None, reason="NO TIMM: pip install --no-deps timm torchvision"
)

USER_CODE = """
import torch
from torch import nn
from neighbour import WIDTH

class Net(nn.Module):
    def __init__(self, num_classes=5):
        super().__init__()
        self.fc = nn.Linear(WIDTH, num_classes)

    def forward(self, x):
        return self.fc(x)

def fixed():
    return Net()

def broken():
    raise RuntimeError("no such width")

def number():
    return 3

instance = Net(2)
constant = 4
"""


@pytest.fixture
def user_file(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("WIDTH = 12\n")
    path = tmp_path / "my_model.py"
    path.write_text(USER_CODE)
    return path


def test_user_file(user_file: Path) -> None:
    before = list(sys.path)
    model = build_model(f"{user_file}:Net", num_classes=9)
    assert model(torch.zeros(1, 12)).shape == (1, 9)
    assert not model.training
    assert build_model(f"{user_file}:fixed")(torch.zeros(1, 12)).shape == (1, 5)
    assert build_model(f"{user_file}:instance")(torch.zeros(1, 12)).shape == (1, 2)
    assert sys.path == before


def test_module_of_the_user() -> None:
    assert type(build_model("bitdial.zoo.vgg:CifarVGG", num_classes=3)).__name__ == "CifarVGG"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet20", "not of the form"),
        (":x", "not of the form"),
        ("zoo:", "not of the form"),
        ("zoo:resnet21", "choose one of resnet20"),
        ("no_such_module_here:f", "cannot be imported"),
        ("missing_file.py:f", "does not exist"),
        ("math:pi", "name a function or class"),
        ("math:no_such_name", "has no 'no_such_name'"),
    ],
)
def test_bad_spec(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(spec)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", "no such width"),
        ("number", "returned a int"),
        ("constant", "is a int"),
        ("absent", "has no 'absent'"),
    ],
)
def test_bad_user_code(user_file: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(f"{user_file}:{name}")


def test_num_classes(user_file: Path) -> None:
    with pytest.raises(ConfigError, match="takes no num_classes"):
        build_model(f"{user_file}:fixed", num_classes=4)
    with pytest.raises(ConfigError, match="at least 1"):
        build_model("zoo:vgg", num_classes=0)


@needs_torchvision
def test_torchvision_model() -> None:
    assert build_model("torchvision:squeezenet1_1", num_classes=4)(torch.zeros(1, 3, 64, 64)).shape == (1, 4)
    with pytest.raises(ConfigError, match="did you mean .*resnet18"):
        build_model("torchvision:resnet118")


@needs_timm
def test_timm_model() -> None:
    assert sum(p.numel() for p in build_model("timm:resnet18", num_classes=4).parameters()) > 11e6
    with pytest.raises(ConfigError, match="did you mean"):
        build_model("timm:resnet181")


@needs_torchvision
def test_torchvision_imports_after_the_schemas_are_defined() -> None:
    code = (
        "from bitdial.zoo.registry import torchvision_compat as c\n"
        "c(); c()\n"
        "import torchvision, torch\n"
        "assert hasattr(torch.ops.torchvision, 'nms')\n"
        "print(torchvision.models.get_model('alexnet').__class__.__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "AlexNet"), done.stderr


def _state(classes: int = 10) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {n: t.clone() for n, t in build_model("zoo:resnet20", num_classes=classes).state_dict().items()}


@pytest.mark.parametrize("wrap", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_torch_weights(tmp_path: Path, wrap: str | None, prefix: str) -> None:
    state = _state()
    stored: dict[str, object] = {prefix + n: t for n, t in state.items()}
    path = tmp_path / "w.pth"
    torch.save({wrap: stored, "epoch": 3} if wrap else stored, path)
    loaded = build_model("zoo:resnet20", path).state_dict()
    assert all(torch.equal(loaded[n], t) for n, t in state.items())


def test_classes_are_read_from_the_weights(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(_state(37), path)
    assert build_model("zoo:resnet20", path)(torch.zeros(1, 3, 32, 32)).shape == (1, 37)
    with pytest.raises(DataError, match=r"linear.weight \[37, 64\] instead of \[10, 64\]"):
        build_model("zoo:resnet20", path, num_classes=10)


class _Opaque(nn.Linear):
    """A class that only unpickling could bring back."""


def test_bad_weights(tmp_path: Path) -> None:
    def check(name: str, message: str) -> None:
        with pytest.raises(DataError, match=message):
            build_model("zoo:resnet20", tmp_path / name)

    check("absent.safetensors", "does not exist")
    (tmp_path / "w.bin").write_bytes(b"x")
    check("w.bin", "unknown ending '.bin'")
    (tmp_path / "text.safetensors").write_bytes(b"not a safetensors file")
    check("text.safetensors", "not a readable safetensors")
    (tmp_path / "text.pt").write_bytes(b"not a torch file")
    check("text.pt", "pickled objects")
    torch.save(_Opaque(2, 2), tmp_path / "object.pt")
    check("object.pt", "safetensors.torch.save_file")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    check("list.pt", "holds no state dict")

    state = _state()
    save_file({n: t for n, t in state.items() if n != "layer2.1.bn1.weight"}, tmp_path / "missing.safetensors")
    check("missing.safetensors", "missing: layer2.1.bn1.weight")
    save_file({**state, "extra": torch.zeros(1)}, tmp_path / "extra.safetensors")
    check("extra.safetensors", "unexpected: extra")
    save_file({**state, "conv1.weight": state["conv1.weight"] / 0}, tmp_path / "infinite.safetensors")
    check("infinite.safetensors", "conv1.weight holds NaN")
    whole = tmp_path / "whole.safetensors"
    save_file(state, whole)
    (tmp_path / "short.safetensors").write_bytes(whole.read_bytes()[:-100])
    check("short.safetensors", "not a readable safetensors")
