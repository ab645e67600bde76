"""Shared fixtures: one thread, the slow oracle, small networks, the optional data folder."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bitdial.zoo.registry import torchvision_compat

sys.path.insert(0, str(Path(__file__).parent))  # for hand_built
torch.set_num_threads(1)
# The same examples every time, so that a run says something about the change at hand; ./test --slow looks for new ones, and for
# more of them where a test does not say how many.
hypothesis.settings.register_profile("bitdial", deadline=None, print_blob=True, derandomize=True, max_examples=30)
hypothesis.settings.register_profile("explore", deadline=None, print_blob=True)
hypothesis.settings.register_profile("sanitized", hypothesis.settings.get_profile("bitdial"), max_examples=12)  # each is slow
hypothesis.settings.load_profile(
    "explore" if os.environ.get("BITDIAL_EXPLORE") == "1"
    else "sanitized" if "BITDIAL_SANITIZED_NATIVE" in os.environ else "bitdial"
)  # fmt: skip
if importlib.util.find_spec("torchvision") is not None:
    torchvision_compat()  # before anything imports torchvision or timm


def _data_folder() -> Path:
    root = Path(__file__).resolve().parent.parent
    return Path(os.environ.get("BITDIAL_DATA", root.parent / "shared" / "data"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs_data: needs the data folder (BITDIAL_DATA); skipped where it is absent")


# Files that keep a process busy for long, longest first: with several processes they are begun before the others, so that none
# of them is left to one process at the end (./test says --no-loadscope-reorder). The list is only about speed.
LONG = (
    "packaging/test_packaging_sanitizers.py",
    "test_demo.py",
    "serving/test_serving_ray.py",
    "serving/test_serving_faults.py",
    "test_architectures.py",
    "graph/test_graph_capture.py",
    "export/test_export_onnx.py",
    "test_api.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).resolve().parent
    place = {tests / name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path, len(LONG)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("needs_data") is not None and not _data_folder().is_dir():
        pytest.skip(f"DATA FOLDER MISSING: {_data_folder()} does not exist; set BITDIAL_DATA to run this test")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of trained networks and images; the test is skipped, with the reason, where it is absent."""
    folder = _data_folder()
    if not folder.is_dir():
        pytest.skip(f"DATA FOLDER MISSING: {folder} does not exist; set BITDIAL_DATA to run this test")
    return folder


@pytest.fixture(scope="session")
def oracle() -> ModuleType:
    """tests/oracle.py: slow definitions that share no code with bitdial."""
    name = "bitdial_test_oracle"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("oracle.py"))
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


class SmallConvNet(nn.Module):
    """A conv net with a residual block, a strided projection, a grouped and a depthwise conv, and a linear head."""

    def __init__(self, channels: int = 24, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.down = nn.Sequential(nn.Conv2d(channels, 2 * channels, 1, stride=2), nn.BatchNorm2d(2 * channels))
        self.grouped = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels)
        self.head1 = nn.Linear(2 * channels, 40)
        self.head2 = nn.Linear(40, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(y)) + x)
        x = torch.relu(self.down(x))
        x = torch.nn.functional.relu6(self.depthwise(torch.relu(self.grouped(x))))
        x = x.mean(dim=(2, 3))
        out: Tensor = self.head2(torch.relu(self.head1(x)))
        return out


class SmallTransformer(nn.Module):
    """Two pre-norm blocks over 4x4 patches of an 8x8 image, class token, GELU."""

    def __init__(self, width: int = 32, heads: int = 4, depth: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.5)
        self.position = nn.Parameter(torch.randn(1, 17, width) * 0.5)
        self.heads = heads
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(width),
                    "qkv": nn.Linear(width, 3 * width),
                    "proj": nn.Linear(width, width),
                    "norm2": nn.LayerNorm(width),
                    "up": nn.Linear(width, 2 * width),
                    "down": nn.Linear(2 * width, width),
                }
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        n, t, c = x.shape
        for block in self.blocks:
            qkv = block["qkv"](block["norm1"](x)).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
            y = torch.nn.functional.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
            x = x + block["proj"](y.transpose(1, 2).reshape(n, t, c))
            x = x + block["down"](torch.nn.functional.gelu(block["up"](block["norm2"](x))))
        out: Tensor = self.head(self.norm(x)[:, 0])
        return out


def estimate_batch_norm(model: nn.Module, *batches: Tensor) -> nn.Module:
    """Re-estimate BatchNorm statistics on data (momentum None: a plain average), so that random networks stay sane."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    if norms:
        model.train()
        for module in model.modules():
            if isinstance(module, (nn.Dropout, nn.Dropout2d)):
                module.eval()
        with torch.no_grad():
            for batch in batches:
                model(batch)
    return model.eval()


def snr_db(exact: Tensor, approximate: Tensor) -> float:
    """Signal-to-noise ratio in dB: 10 log10(sum x^2 / sum (x - y)^2)."""
    noise = float((exact.double() - approximate.double()).pow(2).sum())
    return float("inf") if noise == 0.0 else 10.0 * float(np.log10(float(exact.double().pow(2).sum()) / noise))


@pytest.fixture(scope="session")
def helpers() -> Any:
    """The functions and networks of this file."""

    class Helpers:
        conv_net: Callable[..., nn.Module] = SmallConvNet
        transformer: Callable[..., nn.Module] = SmallTransformer
        estimate = staticmethod(estimate_batch_norm)
        snr = staticmethod(snr_db)

        @staticmethod
        def images(n: int, size: int = 8, seed: int = 0, channels: int = 3) -> Tensor:
            """Smooth random images, float32 [n, channels, size, size]."""
            generator = torch.Generator().manual_seed(seed)
            coarse = torch.randn(n, channels, max(2, size // 4), max(2, size // 4), generator=generator)
            fine = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)
            return fine + 0.3 * torch.randn(n, channels, size, size, generator=generator)

    return Helpers


@pytest.fixture(scope="session")
def conv_net(helpers: Any) -> nn.Module:
    """A SmallConvNet with sane BatchNorm statistics (do not change it)."""
    torch.manual_seed(1)
    return estimate_batch_norm(SmallConvNet(), helpers.images(64, seed=1))


@pytest.fixture(scope="session")
def transformer() -> nn.Module:
    """A SmallTransformer in evaluation mode (do not change it)."""
    torch.manual_seed(2)
    return SmallTransformer().eval()
