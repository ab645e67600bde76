"""Whole networks in ONNX files: equal to what they were exported from, with the layers that torch's own capture finds, and
quantized like them."""

from __future__ import annotations

import os
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

import bitdial
from bitdial.errors import CalibrationError, CaptureError
from bitdial.graph.capture import capture
from bitdial.graph.ir import Graph
from bitdial.graph.onnx import OnnxNetwork
from bitdial.graph.operators import OPERATORS, of_kind
from bitdial.graph.passes import optimize

onnxruntime = pytest.importorskip("onnxruntime")

# What the exporter of TorchScript cannot write down.
NOT_EXPORTED = {"torch channel shuffle", "encoder layer", "adaptive pools"}
# Captured as one torch operator, or with its parameter as a tensor; here in parts, or as a number.
OTHER_KINDS = {"attention mask at run time", "activations"}
KINDS = of_kind("contraction", "unary", "reduction", "normalization") | {"max_pool", "concat"}
GREEDY = bitdial.QuantizeConfig(target="paper", selector="greedy")


def export(model: nn.Module, inputs: Sequence[torch.Tensor], path: Path, *, fixed: bool, opset: int = 17, **more: Any) -> Path:
    names = [f"in{i}" for i in range(len(inputs))]
    axes = None if fixed else {name: {0: "n"} for name in names}
    inputs = tuple(x[:1] if fixed else torch.cat([x, x])[:2] for x in inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.eval(), inputs, path, dynamo=False, opset_version=opset, **{"input_names": names, "dynamic_axes": axes, **more}
        )
    return path


def kinds(graph: Graph) -> Counter[str]:
    """The operators that become layers or tables, by name, on the fused graph."""
    return Counter(n.op for n in optimize(graph).nodes if n.op in KINDS)


def check_equal(model: nn.Module, path: Path, inputs: Sequence[torch.Tensor]) -> Graph:
    network = OnnxNetwork(path)
    with torch.no_grad():
        wanted, got = tree_leaves(model(*inputs)), tree_leaves(network(*inputs))
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
    return network.graph(inputs)


@pytest.mark.parametrize("fixed", [False, True], ids=["open batch", "batch of one"])
def test_modules(case: str, fixed: bool, case_maker: Callable[[str], Any], tmp_path: Path) -> None:
    if case in NOT_EXPORTED:
        pytest.skip("torch.onnx.export(dynamo=False) cannot write it")
    torch.manual_seed(3)
    build, make = case_maker(case)
    model, inputs = build().eval(), make(3)
    graph = check_equal(model, export(model, inputs, tmp_path / "m.onnx", fixed=fixed), inputs)
    if not fixed and case not in OTHER_KINDS:
        expected = kinds(capture(model, inputs))
        assert kinds(graph) == expected


def tv(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision import models

        model: nn.Module = models.get_model(name, weights=None)
        return model

    return build


def timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm as library

        model: nn.Module = library.create_model(name, pretrained=False, **options)
        return model

    return build


SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4)}
SMALL = {
    "resnet18": (tv("resnet18"), 64),
    "vit": (timm("vit_tiny_patch16_224", img_size=64, depth=2), 64),
    "swin": (timm("swin_tiny_patch4_window7_224", **SWIN), 64),
}
LARGE = {
    **{
        name: (tv(name), 64)
        for name in "mobilenet_v2 mobilenet_v3_small squeezenet1_1 shufflenet_v2_x0_5 efficientnet_b0 regnet_y_400mf "
        "convnext_tiny".split()
    },
    "googlenet": (tv("googlenet"), 96),
    **{
        name: (timm(name), 64)
        for name in "mobilenetv4_conv_small efficientvit_b0 poolformer_s12 hrnet_w18_small tf_efficientnet_lite0 resnest14d "
        "nfnet_l0 mobilevit_xxs".split()
    },
    "levit": (timm("levit_128s"), 224),
    "coatnet": (timm("coatnet_nano_rw_224"), 224),
    "deit": (timm("deit_tiny_distilled_patch16_224", img_size=64), 64),
}


def check_architecture(build: Callable[[], nn.Module], size: int, path: Path, batches: Sequence[bool]) -> None:
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(2, 3, size, size)
    expected = kinds(capture(model, [x]))
    for fixed in batches:
        assert kinds(check_equal(model, export(model, [x], path, fixed=fixed), [x])) == expected


@pytest.mark.parametrize(("name", "fixed"), [("resnet18", True), ("vit", True), ("swin", False)])
def test_architectures(name: str, fixed: bool, tmp_path: Path) -> None:
    check_architecture(*SMALL[name], tmp_path / "m.onnx", [fixed])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SMALL, *LARGE])
def test_architectures_with_both_kinds_of_batch(name: str, tmp_path: Path) -> None:
    check_architecture(*(SMALL | LARGE)[name], tmp_path / "m.onnx", [True, False])


class Written(nn.Module):
    """Functions and norms that an older opset has to write in parts."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Conv1d(4, 6, 1)
        self.norm, self.groups = nn.LayerNorm(8), nn.GroupNorm(2, 6)
        nn.init.uniform_(self.norm.weight), nn.init.uniform_(self.groups.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(F.gelu(self.a(x)))
        y = F.gelu(self.b(y), approximate="tanh") + F.silu(y)
        y = self.groups(self.c(F.hardsigmoid(F.mish(F.hardswish(y)))))
        return y


@pytest.mark.parametrize("opset", [11, 13, 20])
def test_decomposed_operators_are_whole_again(opset: int, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model, x = Written(), torch.randn(2, 4, 8)
    graph = check_equal(model, export(model, [x], tmp_path / "m.onnx", fixed=False, opset=opset), [x])
    ops = Counter(n.op for n in graph.nodes)
    assert ops == {
        "linear": 2, "layer_norm": 1, "gelu": 2, "silu": 1, "hardswish": 1, "hardsigmoid": 1, "mish": 1, "conv": 1, "add": 1,
        "aten.group_norm.default": 1,
    }  # fmt: skip


def test_affine_operations_belong_to_the_layer_before(tmp_path: Path) -> None:
    class Affine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 4, 3, bias=False), nn.Linear(6, 5, bias=False)
            self.scale, self.shift = nn.Parameter(torch.rand(1, 4, 1, 1)), nn.Parameter(torch.rand(4, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x) * self.scale + self.shift - 0.5
            return torch.relu(self.linear(y) / 3 + self.scale.flatten()[0])

    model, x = Affine(), torch.randn(2, 3, 8, 8)
    graph = optimize(check_equal(model, export(model, [x], tmp_path / "m.onnx", fixed=False), [x]))
    assert [n.op for n in graph.nodes] == ["conv", "linear"] and graph.nodes[1].attrs["activation"] == {"kind": "relu"}


class Encoder(nn.Module):
    """A BERT-like block: token and position tables, attention with a mask of padding, mean over the tokens that count."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(50, width), nn.Embedding(16, width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.register_buffer("ids", torch.arange(16)[None])

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        n, t = input_ids.shape
        x = self.norms[0](self.tokens(input_ids) + self.places(self.ids[:, :t]))  # type: ignore[index]
        barred = (1.0 - attention_mask[:, None, None, :].float()) * -10000.0
        q, k, v = (layer(x).view(n, t, 4, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        weights = (q @ k.transpose(-1, -2) / 8**0.5 + barred).softmax(-1)
        x = self.norms[1](x + self.out((weights @ v).transpose(1, 2).reshape(n, t, -1)))
        x = self.norms[2](x + self.down(F.gelu(self.up(x))))
        counted = attention_mask[..., None].float()
        return F.normalize((x * counted).sum(1) / counted.sum(1).clamp(min=1e-9), dim=1)


@pytest.mark.parametrize("fixed", [False, True])
def test_a_sentence_encoder(fixed: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, ids, mask = Encoder().eval(), torch.randint(0, 50, (4, 12)), torch.ones(4, 12, dtype=torch.int64)
    mask[1, 7:] = 0
    axes = None if fixed else {"input_ids": {0: "n", 1: "t"}, "attention_mask": {0: "n", 1: "t"}}
    names = ["input_ids", "attention_mask"]
    path = export(model, [ids, mask], tmp_path / "m.onnx", fixed=fixed, opset=14, input_names=names, dynamic_axes=axes)
    found = kinds(check_equal(model, path, [ids, mask]))
    assert found == {"linear": 6, "matmul": 2, "layer_norm": 3, "softmax": 1, "gelu": 1}


# ---- quantization


def test_a_file_is_quantized_like_the_network_it_came_from(conv_net: nn.Module, helpers: Any, tmp_path: Path) -> None:
    calibration, x = helpers.images(32, seed=3), helpers.images(8, seed=4)
    path = export(conv_net, [calibration], tmp_path / "net.onnx", fixed=True, input_names=["images:0"])
    ours, theirs = bitdial.quantize(str(path), calibration, GREEDY), bitdial.quantize(conv_net, calibration, GREEDY)
    assert ours.program.graph.inputs == ["images_0"]
    shapes = [[layer.weight.shape for layer in q.program.layers.values() if layer.weight is not None] for q in (ours, theirs)]
    assert shapes[0] == shapes[1] and ours.ratios == theirs.ratios
    assert helpers.snr(torch.as_tensor(theirs(x, 0.0)).detach(), torch.as_tensor(ours(x, 0.0)).detach()) > 35.0
    ours.save(tmp_path / "net.bitdial")
    if ours.engine_name != "cpu":
        pytest.skip("the compiled engine is not built here")
    compiled, reference = (bitdial.load(tmp_path / "net.bitdial", engine=engine) for engine in ("cpu", "reference"))
    for ratio in ours.ratios:
        np.testing.assert_array_equal(np.asarray(compiled(x.numpy(), ratio)), np.asarray(reference(x.numpy(), ratio)))
    np.testing.assert_array_equal(np.asarray(compiled(x.numpy(), 0.0)), np.asarray(ours(x.numpy(), 0.0)))


def test_open_sizes_come_from_the_calibration_data_and_inputs_may_be_dicts(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.line = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(4, 8)

        def forward(self, picture: torch.Tensor, side: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = torch.relu(self.conv(picture)).mean((2, 3))
            return y + self.line(side), y

    model, inputs = Two().eval(), (torch.randn(8, 3, 6, 10), torch.randn(8, 4))
    axes = {"picture": {0: "n", 2: "h", 3: "w"}, "side": {0: "n"}}
    path = export(model, inputs, tmp_path / "m.onnx", fixed=False, input_names=list(axes), dynamic_axes=axes)
    batches = [{"side": inputs[1], "picture": inputs[0]}]
    for calibration in (batches, [inputs]):
        quantized = bitdial.quantize(path, calibration, GREEDY)
        graph = quantized.program.graph
        assert [str(graph.types[v]) for v in graph.inputs] == ["float32[N, 3, 6, 10]", "float32[N, 4]"]
        first, second = quantized(inputs, 0.0)
        torch.testing.assert_close(torch.as_tensor(second), model(*inputs)[1], rtol=0.05, atol=0.05)
    with pytest.raises(CaptureError, match="takes the inputs picture, side"):
        bitdial.quantize(path, [{"picture": inputs[0]}], GREEDY)


def test_calibration_data_that_do_not_fit_are_told(conv_net: nn.Module, helpers: Any, tmp_path: Path) -> None:
    x = helpers.images(4)
    path = export(conv_net, [x], tmp_path / "net.onnx", fixed=True)
    with pytest.raises(CalibrationError, match="channels last"):
        bitdial.quantize(path, x.movedim(1, -1), GREEDY)
    with pytest.raises(CalibrationError, match="float64"):
        bitdial.quantize(path, x.double(), GREEDY)
    with pytest.raises(CaptureError, match=r"takes 'in0' as float32\[N, 3, 8, 8\].*not \[N, 3, 9, 8\]"):
        bitdial.quantize(path, torch.randn(2, 3, 9, 8), GREEDY)


# ---- public networks


@pytest.fixture(scope="module")
def ocr(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the networks in the wheel of rapidocr-onnxruntime."""
    given = os.environ.get("BITDIAL_OCR")
    root = Path(__file__).resolve().parents[2]
    data = Path(os.environ.get("BITDIAL_DATA", root.parent / "shared" / "data"))
    wheels = sorted((Path(given) if given else data / "ocr").glob("rapidocr_onnxruntime-*.whl"))
    if not wheels:
        pytest.skip(
            "OCR NETWORKS MISSING: pip download --no-deps -d FOLDER rapidocr-onnxruntime, and set BITDIAL_OCR=FOLDER to run this "
            "test"
        )
    folder = tmp_path_factory.mktemp("ocr")
    with zipfile.ZipFile(wheels[-1]) as wheel:
        for member in wheel.infolist():
            if member.filename.endswith(".onnx"):
                (folder / Path(member.filename).name).write_bytes(wheel.read(member))
    return folder


# Of opset 11 and 12, sizes of the pictures open. Layers of the fused graphs; beside these they need add, mul, concat, reshape,
# permute, slice, hardsigmoid, sigmoid, nearest upsampling and, for detection, two transposed convolutions (in float).
OCR = {
    "ch_PP-OCRv4_det_infer.onnx": ((3, 64, 96), {"conv": 63, "hardswish": 24, "mean": 10}),
    "ch_PP-OCRv4_rec_infer.onnx": (
        (3, 48, 96), {"conv": 38, "linear": 9, "matmul": 4, "layer_norm": 5, "softmax": 3, "hardswish": 28},
    ),
    "ch_ppocr_mobile_v2.0_cls_infer.onnx": ((3, 48, 192), {"conv": 53, "linear": 1, "hardswish": 18, "max_pool": 1}),
}  # fmt: skip


def pictures(height: int, width: int) -> torch.Tensor:
    """Two pictures of words, dark on light, pixels -1..1."""
    from PIL import Image, ImageDraw, ImageFont

    made = []
    for word in ("Hello", "bitdial"):
        picture = Image.new("RGB", (width, height), "white")
        font = ImageFont.load_default(height // 2)
        ImageDraw.Draw(picture).text((width // 12, height // 5), word, fill="black", font=font)
        made.append(np.asarray(picture, np.float32).transpose(2, 0, 1) / 127.5 - 1.0)
    return torch.from_numpy(np.stack(made))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::bitdial.errors.LostAnswersWarning")  # of two samples
@pytest.mark.parametrize("name", list(OCR))
def test_ocr_networks(ocr: Path, name: str) -> None:
    shape, layers = OCR[name]
    x = pictures(*shape[1:])
    network = OnnxNetwork(ocr / name)
    session = onnxruntime.InferenceSession(str(ocr / name), providers=["CPUExecutionProvider"])
    (wanted,) = session.run(None, {"x": x.numpy()})
    assert wanted.max() > 0.5  # there is something to see
    np.testing.assert_allclose(network(x).numpy(), wanted, rtol=1e-4, atol=1e-4 * float(np.abs(wanted).max()))
    found = kinds(network.graph([x]))
    assert {op: found[op] for op in layers} == layers
    quantized = bitdial.quantize(ocr / name, x, GREEDY)
    outputs = np.asarray(quantized(x.numpy(), 0.0))
    cosine = float((outputs * wanted).sum() / np.linalg.norm(outputs) / np.linalg.norm(wanted))
    assert outputs.shape == wanted.shape and cosine > 0.9, cosine
    assert set(found) <= set(OPERATORS)
