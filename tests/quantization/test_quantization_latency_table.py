"""Latency tables: keys, round trip, refusal of anything wrong, estimates, and curves between 8 bits and low."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from bitdial.errors import ConfigError, OutputError
from bitdial.graph.ir import BatchDim, Node, TensorType
from bitdial.quantization.config import QuantizeConfig
from bitdial.quantization.exactness import MECHANISMS
from bitdial.quantization.latency_table import (
    LatencyTable,
    LatencyTableError,
    LayerShape,
    LayerTimes,
    layer_shape,
    load_latency_table,
    parse_latency_table,
)

ALL = frozenset(MECHANISMS)


def conv(channels: int, out: int, size: int, kernel: int = 3, stride: int = 1) -> LayerShape:
    return LayerShape(
        op="conv", in_channels=channels, out_channels=out, in_size=(size, size), out_size=(size // stride,) * 2,
        kernel=(kernel, kernel), stride=(stride, stride), padding=(kernel // 2,) * 2, dilation=(1, 1),
    )  # fmt: skip


def table_of(*entries: LayerTimes) -> LatencyTable:
    return LatencyTable(
        target="synthetic", cpu="none", isa="none", threads=1, batch=1, layers={e.shape.key: e for e in entries}
    )


@pytest.fixture
def table() -> LatencyTable:
    wide = {"direct": 8e-4, "fip": 6e-4, "winograd": 5e-4, "winograd_fip": 3e-4}
    return table_of(
        LayerTimes(shape=conv(64, 64, 56), seconds=wide, mixed=((0.25, 8e-4), (0.5, 6e-4), (0.75, 4e-4))),
        LayerTimes(shape=conv(512, 512, 7), seconds={"direct": 9e-4, "winograd": 7e-4}),
        LayerTimes(shape=conv(64, 128, 56, kernel=1), seconds={"direct": 1e-4, "fip": 7e-5}),
    )


def test_keys_of_nodes() -> None:
    types = {
        "x": TensorType((BatchDim(), 64, 56, 56), "uint8"),
        "y": TensorType((BatchDim(), 128, 28, 28), "uint8"),
        "t": TensorType((BatchDim(4), 49, 96)),
        "u": TensorType((BatchDim(4), 49, 192)),
    }
    attrs = {"stride": [2, 2], "padding": [1, 1], "dilation": [1, 1], "groups": 2}
    strided = layer_shape(Node("y", "conv", ["x"], attrs), types, (128, 32, 3, 3))
    assert strided.key == "conv k3x3 s2x2 p1x1 d1x1 g2 in 64x56x56 out 128x28x28"
    assert strided.macs == 28 * 28 * 128 * 32 * 9 and strided.depth == 288 and not strided.winograd
    linear = layer_shape(Node("u", "linear", ["t"]), types, (192, 96))
    assert linear.key == "linear in 96 out 192 rows 196" and linear.macs == 4 * 49 * 96 * 192
    assert conv(64, 64, 56).key == "conv k3x3 s1x1 p1x1 d1x1 g1 in 64x56x56 out 64x56x56" and conv(64, 64, 56).winograd
    folded = {"a": TensorType((BatchDim(4), 8, 5)), "b": TensorType((BatchDim(4), 8, 5))}
    node = Node("b", "conv", ["a"], {"stride": [1], "padding": [1], "dilation": [1], "groups": 8})
    assert layer_shape(node, folded, (8, 1, 3)).key == "conv k3 s1 p1 d1 g8 in 8x5 out 8x5 n4"


def test_round_trip(table: LatencyTable, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    table.save(path)
    again = load_latency_table(path)
    assert again == table and again.digest == table.digest
    assert parse_latency_table(json.loads(path.read_text())) == table
    assert [p.name for p in tmp_path.iterdir()] == ["table.json"]
    assert QuantizeConfig(latency_table=path).latency_table == table
    config = QuantizeConfig(latency_table=str(path), low_bits="auto")
    assert config.updated(seed=2).latency_table == table
    assert config.model_dump(mode="json")["latency_table"] == {
        "target": "synthetic", "cpu": "none", "sha256": table.digest,
    }  # fmt: skip


def test_any_change_changes_the_digest(table: LatencyTable) -> None:
    digests = {table.digest}
    for change in ({"target": "other"}, {"batch": 8}, {"threads": 2}, {"layers": dict(list(table.layers.items())[:2])}):
        digests.add(table.model_copy(update=change).digest)
    assert len(digests) == 5


Change = Callable[[dict[str, Any]], Any]


def layer(document: dict[str, Any]) -> dict[str, Any]:
    return next(iter(document["layers"].values()))


def swap_keys(document: dict[str, Any]) -> None:
    first, second, *_ = document["layers"]
    entries = document["layers"]
    entries[first], entries[second] = entries[second], entries[first]


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda d: layer(d)["seconds"].update(direct=-1.0), "above 0"),
        (lambda d: layer(d)["seconds"].pop("direct"), "'direct' is missing"),
        (lambda d: layer(d)["seconds"].update(strassen=1.0), "unknown mechanisms strassen"),
        (lambda d: layer(d)["seconds"].update(direct="fast"), "number"),
        (lambda d: layer(d).update(mixed=[[0.5, 1e-3], [0.25, 1e-3]]), "rise within"),
        (lambda d: layer(d).update(mixed=[[1.5, 1e-3]]), "rise within"),
        (lambda d: layer(d).update(comment="x"), "Extra"),
        (lambda d: layer(d)["shape"].update(in_channels=0), "greater"),
        (lambda d: layer(d)["shape"].update(stride=[2, 2]), "Winograd times"),
        (swap_keys, "holds the shape"),
        (lambda d: d.update(layers={}), "layers"),
        (lambda d: d.pop("target"), "target"),
        (lambda d: d.update(threads=0), "threads"),
    ],
)
def test_contradictions_are_refused_even_with_a_right_checksum(
    table: LatencyTable, tmp_path: Path, change: Change, told: str
) -> None:
    from bitdial.quantization.latency_table import _checksum

    document = table.document()
    change(document)
    document["sha256"] = _checksum({k: v for k, v in document.items() if k != "sha256"})
    path = tmp_path / "table.json"
    path.write_text(json.dumps(document))
    with pytest.raises(LatencyTableError, match=told) as caught:
        load_latency_table(path)
    assert "table.json" in str(caught.value) and isinstance(caught.value, ConfigError)


def test_tampered_files_are_refused(table: LatencyTable, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    table.save(path)
    text = path.read_text()
    cases: list[tuple[bytes, str]] = [
        (text.replace("0.0003", "0.0002").encode(), "altered or cut"),
        (text.replace('"batch": 1', '"batch": 8').encode(), "altered or cut"),
        (text.replace('"sha256"', '"sum"').encode(), "altered or cut.*missing"),
        (text[: len(text) // 2].encode(), "not valid JSON"),
        (b"\xff\xfe", "cannot read"),
        (b"[" * 100_000, "not valid JSON"),
        (text.replace("0.0003", "NaN").encode(), "not finite"),
        (b'{"format": "something else"}', "not a latency table"),
        (b"[]", "not a latency table"),
        (json.dumps({**json.loads(text), "version": 2}).encode(), "version 2.*reads 1"),
    ]
    for content, told in cases:
        path.write_bytes(content)
        with pytest.raises(LatencyTableError, match=told):
            load_latency_table(path)
        with pytest.raises(LatencyTableError):
            QuantizeConfig(latency_table=path)
    with pytest.raises(LatencyTableError, match=r"cannot read the latency table .*missing.json"):
        load_latency_table(tmp_path / "missing.json")
    with pytest.raises(OutputError, match="cannot write"):
        table.save(tmp_path / "missing" / "table.json")


def test_models_refuse_what_files_may_not_hold(table: LatencyTable) -> None:
    with pytest.raises(ValidationError, match="direct"):
        LayerTimes(shape=conv(8, 8, 8), seconds={"fip": 1.0})
    with pytest.raises(ValidationError, match="finite"):
        LayerTimes(shape=conv(8, 8, 8), seconds={"direct": float("inf")})


def test_missing_shapes_are_estimated_from_their_kind(table: LatencyTable) -> None:
    measured = table.times(conv(64, 64, 56))
    assert measured.estimated_from is None
    near = table.times(conv(128, 64, 56))  # as fast per multiply as the nearest 3x3
    assert near.estimated_from == conv(64, 64, 56).key
    for name, seconds in measured.seconds.items():
        assert near.seconds[name] == pytest.approx(2 * seconds)
    assert near.mixed == tuple((share, pytest.approx(2 * seconds)) for share, seconds in measured.mixed)
    assert table.times(conv(512, 512, 8)).estimated_from == conv(512, 512, 7).key
    assert set(table.times(conv(64, 64, 28, kernel=1)).seconds) == {"direct", "fip"}
    strided = table.times(conv(64, 64, 56, stride=2))  # nothing of the kind: no gain is claimed
    assert set(strided.seconds) == {"direct"} and strided.mixed == ()
    assert strided.seconds["direct"] == pytest.approx(8e-4 / 4)


def test_curves_run_from_8_bits_to_the_fastest_exact_mechanism(table: LatencyTable) -> None:
    times = table.times(conv(64, 64, 56))
    shares, seconds = times.curve(ALL)
    np.testing.assert_allclose(shares, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(seconds, [8e-4, 8e-4, 6e-4, 4e-4, 3e-4])
    _, wide = times.curve(frozenset({"direct", "fip", "winograd"}))
    np.testing.assert_allclose(wide, [8e-4, 8e-4, 6.8e-4, 5.6e-4, 5e-4])  # the same shape, three fifths of the gain
    _, none = times.curve(frozenset())
    np.testing.assert_allclose(none, 8e-4)
    assert times.fastest(frozenset({"fip"})) == ("fip", 6e-4) and times.fastest(frozenset()) == ("direct", 8e-4)


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"latency_gain": 0.8}, "latency_gain = 0.8 needs latency_table"),
        ({"low_bits": "wide"}, "low_bits"),
        ({"low_bits": 12}, r"low_bits: Input should be less than or equal to 7 \(got 12\)"),
        ({"auto_tolerance": 0.9}, "auto_tolerance"),
        ({"latency_table": {"target": "x"}}, "latency_table"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        QuantizeConfig(**settings)


def test_settings_that_contradict_each_other_with_a_table(table: LatencyTable) -> None:
    with pytest.raises(ConfigError, match="low_bits_weights"):
        QuantizeConfig(latency_table=table, low_bits="auto", low_bits_weights=4)
    with pytest.raises(ConfigError, match="random"):
        QuantizeConfig(latency_table=table, latency_gain=0.8, selector="random")
    config = QuantizeConfig(latency_table=table, low_bits="auto")
    assert config.activation_bits == config.weight_bits == 4
