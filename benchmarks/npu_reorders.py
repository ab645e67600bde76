"""Reorders of channels that the layout pass leaves on networks as torchvision and timm build them, and what reorders cost."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import numpy as np
import torch

from bitdial.graph.capture import capture
from bitdial.graph.passes import optimize
from bitdial.layout import plan_layout
from bitdial.zoo.registry import build_model

SOURCES = {
    "resnet18": "torchvision:resnet18",
    "resnet34": "torchvision:resnet34",
    "resnet50": "torchvision:resnet50",
    "mobilenet_v2": "torchvision:mobilenet_v2",
    "vit_small": "timm:vit_small_patch16_224",
    "vit_base": "timm:vit_base_patch16_224",
    "deit_small_distilled": "timm:deit_small_distilled_patch16_224",
    "swin_tiny": "timm:swin_tiny_patch4_window7_224",
    "swin_small": "timm:swin_small_patch4_window7_224",
}


def missing(name: str) -> str:
    """Why a network cannot be looked at, "" if it can."""
    package = SOURCES[name].partition(":")[0]
    return "" if importlib.util.find_spec(package) else f"{package} is not installed: {name}'s reorders are not counted"


def left_by_layout(name: str, group: int) -> dict[str, Any]:
    """count, bytes (of 8-bit values, one sample) and names of the values that are reordered at run time. Channels have random
    ranges, so that every order that may change does: first, last and depthwise layers stay, as in `npu_networks.plans`."""
    network = build_model(SOURCES[name])
    graph = optimize(capture(network.eval(), [torch.zeros(2, 3, 224, 224)]))
    layers = [n for n in graph.nodes if n.op in ("conv", "linear")]
    rng = np.random.default_rng(0)
    ranges: dict[str, Any] = {}
    eligible = []
    for i, node in enumerate(layers):
        assert node.weight is not None
        groups = int(node.attrs.get("groups", 1))
        channels = graph.constants[node.weight].shape[1] * groups
        ranges.setdefault(node.inputs[0], rng.uniform(0.1, 1.0, channels))
        if 0 < i < len(layers) - 1 and groups == 1:
            eligible.append(node.name)
    plan = plan_layout(graph, ranges, group, eligible)
    sizes = [math.prod(int(d) for d in graph.types[value].shape[1:]) for value in plan.reorders]
    return {"count": len(sizes), "bytes": sum(sizes), "values": list(plan.reorders), "permuted": plan.permuted_spaces}
