"""From a PyTorch module to a graph, through torch.export."""

from __future__ import annotations

import inspect
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree

from bitdial.errors import CaptureError
from bitdial.graph.convert import CONVERTERS, Converter, is_identity
from bitdial.graph.ir import VALUE_DTYPES, Graph
from bitdial.graph.structure import describe
from bitdial.graph.symbolic import Ref, dtype_name, tensor_type
from bitdial.graph.verify import verify


def capture(model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Graph:
    """Capture `model` in evaluation mode as a graph whose batch dimension is dynamic and whose other dimensions are static.

    args, kwargs: example inputs (tensors, batch first); the graph's inputs are in the order of forward()'s parameters. The
    model is left as it was (training flags, parameters, buffers).
    Raises CaptureError naming the operator, the module path and what to do.
    """
    order = list(inspect.signature(model.forward).parameters)
    named = sorted((kwargs or {}).items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order))
    args = tuple(_map_leaves(_two_samples, a) for a in args)
    kwargs = {k: _map_leaves(_two_samples, v) for k, v in named}
    _check_parameters(model, {x.device for x in _leaves([args, kwargs]) if isinstance(x, Tensor)})
    with evaluation_mode(model), torch.no_grad(), torch.autocast("cpu", enabled=False):
        program = _export(model, args, kwargs)
    return _Importer(program).run()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards every module's training flag is as it was."""
    flags = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def _check_parameters(model: nn.Module, devices: set[torch.device]) -> None:
    for name, p in model.named_parameters():
        if devices and p.device not in devices:
            raise CaptureError(
                f"parameter '{name}' is on {p.device}, the example inputs on {', '.join(map(str, devices))}: move the "
                "model there with model.to(...)"
            )
    wrong = [("parameter", n, p.dtype) for n, p in model.named_parameters() if p.is_floating_point()]
    wrong += [("buffer", n, b.dtype) for n, b in model.named_buffers() if b.dtype in (torch.float16, torch.bfloat16)]
    for kind, name, dtype in wrong:
        if dtype != torch.float32:
            raise CaptureError(f"{kind} '{name}' is {dtype}: convert the model with model.float() first")


def _map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to everything inside nested lists, tuples and dicts."""
    if isinstance(value, (list, tuple)):
        return type(value)(_map_leaves(function, v) for v in value)
    if isinstance(value, dict):
        return {k: _map_leaves(function, v) for k, v in value.items()}
    return function(value)


def _two_samples(value: Any) -> Any:
    """A batch of one would be burnt into the graph as a constant: repeat it."""
    if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == 1:
        return torch.cat([value, value])
    return value


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    batch = torch.export.Dim("batch", min=1)

    def spec(value: Any) -> Any:
        return {0: batch} if isinstance(value, Tensor) and value.dim() > 0 else None

    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    except TypeError as error:
        raise CaptureError(f"the example inputs do not fit forward() of {type(model).__name__}: {error}") from None
    dynamic = {name: _map_leaves(spec, value) for name, value in bound.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch about its own internals; the caller cannot act on it
            program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic, strict=False)
            return program.run_decompositions({})  # functional form: in-place operators become pure, nothing more
    except Exception as error:
        text = str(error).strip().splitlines()
        detail = next((line for line in text if line.strip()), type(error).__name__)
        hint = "rewrite data-dependent control flow and keep the batch size symbolic (x.shape[0], not a number)"
        if "batch" in str(error) and ("constant" in str(error) or "specializ" in str(error)):
            hint = "the model fixes its batch size; use x.shape[0] or -1 where a number stands for the batch"
        raise CaptureError(
            f"torch.export cannot capture {type(model).__name__}{_failing_module(model, error)} ({type(error).__name__}: "
            f"{detail}). To do: {hint}; torch.export.export(model, args) on its own prints the full trace"
        ) from error


def _failing_module(model: nn.Module, error: BaseException) -> str:
    """Where the innermost module's forward was when the error arose: " in module 'blocks.1' (model.py, line 7)", or ""."""
    paths = {id(m): name for name, m in model.named_modules()}
    library = torch.__file__.removesuffix("__init__.py")
    cause: BaseException | None = error
    while cause is not None:
        found, line = "", ""
        for frame, number in traceback.walk_tb(cause.__traceback__):
            path = paths.get(id(frame.f_locals.get("self")), "")
            if path and path != found:
                found, line = path, ""
            elif found and not frame.f_code.co_filename.startswith(library):
                line = f" ({Path(frame.f_code.co_filename).name}, line {number})"
        if found:
            return f" in module '{found}'{line}"
        cause = cause.__cause__ or cause.__context__
    return ""


class _Importer:
    """Walks an exported program and emits nodes through the converters of `bitdial.graph.convert`."""

    def __init__(self, program: Any) -> None:
        self.program = program
        self.known: dict[
            str, Any
        ] = {}  # fx node name -> graph value name | Tensor (constant) | list of either | SymInt
        self.constant_names: dict[int, str] = {}
        self.graph = Graph([], [], [], {}, {})
        self.kept: list[Tensor] = []  # keeps ids in constant_names alive
        self.state: dict[Any, Tensor] = {}  # (address, shape, strides, dtype) -> parameter or buffer

    def run(self) -> Graph:
        signature = self.program.graph_signature
        state = {**self.program.state_dict, **self.program.constants}
        lifted: dict[str, str] = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                if node.name in lifted:
                    target = lifted[node.name]
                    tensor = self._state_tensor(state[target], target)
                    self.known[node.name] = tensor
                elif isinstance(node.meta.get("val"), Tensor):
                    self.known[node.name] = node.name
                    self.graph.inputs.append(node.name)
                    self._check_dtype(node.meta["val"], f"the input '{node.name}' is")
                    self.graph.types[node.name] = tensor_type(node.meta["val"], node.name)
                else:
                    self.known[node.name] = node.meta.get("val")
            elif node.op == "get_attr":  # a branch or loop body: the operator that takes it is refused by name
                self.known[node.name] = None
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                self._outputs(node, signature)
        used = {v for n in self.graph.nodes for v in n.operands()} | set(self.graph.outputs)
        self.graph.constants = {k: v for k, v in self.graph.constants.items() if k in used}
        verify(self.graph)
        return self.graph

    def _state_tensor(self, tensor: Tensor, target: str) -> Tensor:
        """A parameter or buffer; one that shares its storage with an earlier one (tied weights) is that one."""
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        known = self.state.get(key) if tensor.numel() else None
        if known is None:
            known = self.state[key] = tensor.detach()
            self.kept.append(known)
            self.constant_names.setdefault(id(known), _clean(target))
        return known

    def _outputs(self, node: Any, signature: Any) -> None:
        mutated = {*signature.buffers_to_mutate.values(), *getattr(signature, "user_inputs_to_mutate", {}).values()}
        if mutated:
            raise CaptureError(
                f"the model writes into {sorted(mutated)} during evaluation: bitdial runs pure functions only; "
                "remove the state update from forward()"
            )
        places: list[int | None] = []  # where every leaf of what the model returns stands among the outputs
        for argument in node.args[0]:
            value = self.known[argument.name] if hasattr(argument, "name") else argument
            if isinstance(value, Tensor):
                value = self.constant(value, "output")
            if value is not None and not isinstance(value, str):
                raise CaptureError(f"the model returns {value!r}, which is no tensor: return tensors only")
            places.append(None if value is None else len(self.graph.outputs))
            if value is not None:
                self.graph.outputs.append(value)
        if not self.graph.outputs:
            raise CaptureError("the model returns no tensor: let forward() return its results")
        try:
            returned = _pytree.tree_unflatten(places, self.program.call_spec.out_spec)
            self.graph.structure = describe(returned, _parts)
        except Exception as error:
            raise CaptureError(
                f"what the model returns cannot be described as data ({type(error).__name__}: {error!s:.200}): return tensors "
                "in tuples, lists and dicts"
            ) from error

    def _call(self, node: Any) -> None:
        target = str(node.target)
        source = module_path(node)
        where = f" in module '{source}'" if source else ""
        if target == "<built-in function getitem>":
            self.known[node.name] = self.known[node.args[0].name][node.args[1]]
            if self.known[node.name] is None and node.users:
                raise CaptureError(
                    f"output {node.args[1]} of operator '{node.args[0].target}'{where} is not available (of pools "
                    "and norms only the result is): change the model not to need it"
                )
            return
        value = node.meta.get("val")
        if not isinstance(value, (Tensor, list, tuple)):
            self.known[node.name] = value  # sizes and arithmetic on them: the output types carry what matters
            return
        args = [self._argument(a) for a in node.args]
        kwargs = {k: self._argument(v) for k, v in node.kwargs.items()}
        if target in _NEW_TENSOR and isinstance(args[0], Ref) and isinstance(value, Tensor):
            args[0] = torch.empty(0, dtype=value.dtype)  # only its dtype and device matter
        if not _mentions_values((args, kwargs)):
            folded = self._fold(node, args, kwargs)
            if folded is not None:
                self.known[node.name] = folded
                return
        if args and isinstance(value, Tensor) and is_identity(target, self.value_dtype(args[0]), dtype_name(value)):
            self.known[node.name] = args[0]
            return
        for tensor in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(tensor, Tensor):
                self._check_dtype(tensor, f"operator '{target}'{where} gives")
        converter = Converter(self, node.name, target, source, args, kwargs, value)
        converter.fill_defaults(node.target)
        self.known[node.name] = CONVERTERS.get(target, Converter.generic)(converter)

    @staticmethod
    def _check_dtype(tensor: Tensor, what: str) -> None:
        """Raise CaptureError for a dtype that no file can hold and the engines do not run."""
        if dtype_name(tensor) not in VALUE_DTYPES:
            remedy = "convert it to float32"
            if tensor.is_complex():
                remedy = "write the model with real numbers (a rotary embedding: cosines and sines)"
            raise CaptureError(f"{what} {tensor.dtype}, which bitdial does not store: {remedy}")

    def _argument(self, argument: Any) -> Any:
        """fx argument -> value name wrapped in Ref, constant Tensor, number, or a nested list of those."""
        if isinstance(argument, (list, tuple)):
            return [self._argument(a) for a in argument]
        if hasattr(argument, "op") and hasattr(argument, "users"):
            known = self.known[argument.name]
            return Ref(known) if isinstance(known, str) else known
        return argument

    def _fold(self, node: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Evaluate an operator on constants only (masks, position tables); None if a size of the batch takes part."""
        if any(_is_symbolic(a) for a in _leaves((args, kwargs))) or "rand" in str(node.target):
            return None
        if isinstance(node.meta["val"], Tensor) and any(_is_symbolic(d) for d in node.meta["val"].shape):
            return None
        with torch.no_grad():
            result = node.target(*args, **kwargs)
        self.kept.extend(t for t in _leaves(result) if isinstance(t, Tensor))
        return list(result) if isinstance(result, (tuple, list)) else result

    def value_dtype(self, value: Any) -> str:
        """dtype of an argument that is a value or a constant, else ""."""
        if isinstance(value, Tensor):
            return dtype_name(value)
        return self.graph.types[value].dtype if isinstance(value, Ref) else ""

    def constant(self, tensor: Tensor, hint: str) -> str:
        """Name of a constant tensor, entering it into the graph at its first use."""
        name = self.constant_names.get(id(tensor))
        if name is None:
            name = self.fresh(_clean(hint))
            self.constant_names[id(tensor)] = name
            self.kept.append(tensor)
        if name not in self.graph.constants:
            if name in self.graph.types:
                name = self.fresh(name)
                self.constant_names[id(tensor)] = name
            if tensor.dtype in (torch.bfloat16, torch.float16):
                raise CaptureError(
                    f"the constant '{name}' is {tensor.dtype}: convert the model with model.float() first"
                )
            self._check_dtype(tensor, f"the constant '{name}' is")
            array = tensor.detach().cpu().contiguous().clone().numpy()
            if array.dtype.kind == "f" and not np.all((array == array) & (array < np.inf)):
                raise CaptureError(
                    f"the constant '{name}' holds NaN or +infinity, which is not stored: use a large finite number, such as "
                    "torch.finfo(torch.float32).max"
                )
            self.graph.constants[name] = array
        return name

    def fresh(self, hint: str) -> str:
        return self.graph.fresh_name(hint)


_NEW_TENSOR = frozenset(f"aten.{op}.default" for op in ("new_zeros", "new_ones", "new_full", "new_empty"))


def module_path(node: Any) -> str:
    """Path of the innermost module that a node came from, e.g. "layer1.0.conv1"."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    path = path.removeprefix("L['self'].").removeprefix("L['self']")
    return path.replace("slice(None, None, None)", "")


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for v in value:
            yield from _leaves(v)
    elif isinstance(value, dict):
        for v in value.values():
            yield from _leaves(v)
    else:
        yield value


def _parts(value: Any) -> list[Any]:
    """What lies directly in a container that torch can flatten."""
    leaves: list[Any] = _pytree.tree_leaves(value, is_leaf=lambda part: part is not value)
    return leaves


def _mentions_values(value: Any) -> bool:
    return any(isinstance(v, Ref) for v in _leaves(value))


def _is_symbolic(value: Any) -> bool:
    return isinstance(value, torch.SymInt)


def _clean(name: str) -> str:
    return name.removeprefix("L__self___")
