"""Networks by a short text: the zoo's own, torchvision's, timm's, or the user's own code.

  zoo:NAME                      one of `bitdial.zoo.architectures.ARCHITECTURES`
  torchvision:NAME, timm:NAME   an architecture of these libraries, with random weights
  package.module:callable       a function or class of an importable module
  path/to/file.py:callable      the same from a file; the text after the last colon names the callable
  path/to/file.onnx             a float ONNX model, which brings its weights

Naming a module or file runs its code: the text comes from the user, never from a data file or an artifact.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from bitdial.errors import ConfigError
from bitdial.graph.onnx import OnnxNetwork, is_onnx
from bitdial.zoo.architectures import ARCHITECTURES, HEADS
from bitdial.zoo.weights import assign_weights, read_weights

# Schemas that torchvision's Python code expects its compiled library to have defined.
_TORCHVISION_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_torchvision_library: torch.library.Library | None = None  # definitions live as long as this object


def build_model(spec: str, weights: Path | None = None, num_classes: int | None = None) -> nn.Module:
    """The network that `spec` names, in evaluation mode.

    spec         see the module docstring
    weights      .safetensors, .pt or .pth file with every parameter of the network; None leaves the random weights, or
                 whatever the user's callable loaded itself
    num_classes  outputs of the last layer. None: as in `weights` for the zoo's own networks, else the default of the
                 architecture. Handed to the user's callable as `num_classes=` only if given

    Raises ConfigError for a spec that names nothing, DataError for weights that cannot be read or do not fit, CaptureError for
    an ONNX file that cannot be read.
    """
    if num_classes is not None and num_classes < 1:
        raise ConfigError(f"num_classes is {num_classes}; it must be at least 1")
    if is_onnx(spec):
        if weights is not None or num_classes is not None:
            raise ConfigError(f"{spec} brings its weights and its last layer: leave weights and num_classes out")
        return OnnxNetwork(spec)
    state = read_weights(Path(weights)) if weights is not None else None
    source, separator, name = spec.rpartition(":")
    if not separator or not source or not name:
        raise ConfigError(
            f"model '{spec}' is not of the form zoo:NAME, torchvision:NAME, timm:NAME, package.module:callable, "
            "path/to/file.py:callable or path/to/file.onnx"
        )
    if source == "zoo":
        if num_classes is None and state is not None and HEADS.get(name) in state:
            num_classes = int(state[HEADS[name]].shape[0])
        model = _zoo_model(name, num_classes)
    elif source == "torchvision":
        model = _torchvision_model(name, num_classes)
    elif source == "timm":
        model = _timm_model(name, num_classes)
    else:
        model = _user_model(source, name, num_classes)
    if state is not None:
        assign_weights(model, state, str(weights))
    return model.eval()


def torchvision_compat() -> None:
    """Make `import torchvision` work beside a torch build that its compiled operators do not load with.

    torchvision's wheels are linked against one particular torch build. Beside another one (say torch from a different
    index) its Python code still works for classification networks, but stops at import because the operators
    `torchvision::nms` and `::qnms` were never defined. This defines their schemas (no implementation) in exactly
    that case, and does nothing otherwise. Call it before the first import of torchvision or timm. Raises ConfigError
    if torchvision is not installed.
    """
    global _torchvision_library
    if "torchvision" in sys.modules or _torchvision_library is not None:
        return
    found = importlib.util.find_spec("torchvision")
    if found is None or not found.submodule_search_locations:
        raise ConfigError("torchvision is not installed; run: pip install --no-deps torchvision")
    binaries = [path for folder in found.submodule_search_locations for path in sorted(Path(folder).glob("_C*.so"))]
    for binary in binaries:
        try:
            torch.ops.load_library(str(binary))  # type: ignore[no-untyped-call]
        except OSError:
            continue
        return  # the real operators are there
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for schema in _TORCHVISION_SCHEMAS:
        library.define(schema)  # type: ignore[no-untyped-call]
    _torchvision_library = library


def _zoo_model(name: str, num_classes: int | None) -> nn.Module:
    if name not in ARCHITECTURES:
        raise ConfigError(f"zoo:{name} does not exist; choose one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name](10 if num_classes is None else num_classes)


def _torchvision_model(name: str, num_classes: int | None) -> nn.Module:
    torchvision_compat()
    models = importlib.import_module("torchvision.models")
    if name not in models.list_models():
        raise ConfigError(f"torchvision:{name} does not exist{_suggest(name, models.list_models())}")
    options = {} if num_classes is None else {"num_classes": num_classes}
    return _checked(f"torchvision:{name}", lambda: models.get_model(name, weights=None, **options))


def _timm_model(name: str, num_classes: int | None) -> nn.Module:
    if importlib.util.find_spec("timm") is None:
        raise ConfigError("timm is not installed; run: pip install --no-deps timm torchvision")
    torchvision_compat()
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise ConfigError(f"timm cannot be imported ({error}); install what is missing") from error
    if not timm.is_model(name):
        raise ConfigError(f"timm:{name} does not exist{_suggest(name, timm.list_models())}")
    options = {} if num_classes is None else {"num_classes": num_classes}
    return _checked(f"timm:{name}", lambda: timm.create_model(name, pretrained=False, **options))


def _user_model(source: str, name: str, num_classes: int | None) -> nn.Module:
    spec = f"{source}:{name}"
    module = _import_file(Path(source)) if source.endswith(".py") else _import_module(source, spec)
    target: Any = module
    for part in name.split("."):
        if not hasattr(target, part):
            raise ConfigError(f"model '{spec}': {source} has no '{name}'; check the name after the last colon")
        target = getattr(target, part)
    if isinstance(target, nn.Module):
        return target
    if not callable(target):
        raise ConfigError(
            f"model '{spec}' is a {type(target).__name__}; name a function or class that returns a module"
        )
    options: dict[str, Any] = {}
    if num_classes is not None:
        if not _accepts(target, "num_classes"):
            raise ConfigError(f"model '{spec}' takes no num_classes; leave the option out or add the parameter")
        options["num_classes"] = num_classes
    return _checked(spec, lambda: target(**options))


def _checked(spec: str, construct: Callable[[], Any]) -> nn.Module:
    try:
        model = construct()
    except Exception as error:
        raise ConfigError(f"model '{spec}' could not be constructed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model '{spec}' returned a {type(model).__name__}; it must return a torch.nn.Module")
    return model


def _import_module(source: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(source)
    except Exception as error:  # the user's code may raise anything
        raise ConfigError(
            f"model '{spec}': module '{source}' cannot be imported ({type(error).__name__}: {error}); "
            "use zoo:, torchvision:, timm:, an importable module or a path that ends in .py"
        ) from error


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"model file {path} does not exist; check the path before the last colon")
    resolved = path.resolve()
    # A name of its own per file: two files called model.py must not share one entry of sys.modules.
    module_name = f"bitdial_user_{resolved.stem}_{hashlib.sha256(str(resolved).encode()).hexdigest()[:8]}"
    found = importlib.util.spec_from_file_location(module_name, resolved)
    if found is None or found.loader is None:
        raise ConfigError(f"model file {path} is not a Python file")
    module = importlib.util.module_from_spec(found)
    sys.modules[module_name] = module  # dataclasses and torch.export look classes up there
    folder = str(resolved.parent)
    sys.path.insert(0, folder)  # as `python file.py` would, so that the file can import its neighbours
    try:
        found.loader.exec_module(module)
    except Exception as error:  # the user's code may raise anything
        del sys.modules[module_name]
        raise ConfigError(f"model file {path} cannot be imported ({type(error).__name__}: {error})") from error
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
    return module


def _accepts(target: Callable[..., Any], parameter: str) -> bool:
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return True
    return parameter in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def _suggest(name: str, known: list[str]) -> str:
    close = get_close_matches(name, known, n=3)
    return f"; did you mean {', '.join(close)}?" if close else "; see the library's list of models"
