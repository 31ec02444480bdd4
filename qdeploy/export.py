"""ModelSource → FloatModel: torch.onnx.export, and proof that the ONNX model computes what the module computes."""

from __future__ import annotations

import copy
import inspect
import io
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from qdeploy import graph as questions
from qdeploy.affine import sqnr_db
from qdeploy.backend import Arrays, Evidence, Runner
from qdeploy.errors import InputError, UnavailableError
from qdeploy.model import FloatModel, ModelSource, TensorSpec
from qdeploy.prepare import OPSET, refuse_quantized
from qdeploy.registry import suggestion
from qdeploy.samples.callables import load_callable, user_code
from qdeploy.samples.source import Sample
from qdeploy.session import open_session

CHECKED_SAMPLES = 4
LOWEST_SQNR_DB = 50.0
"""Rounding in another order leaves 100 dB and more; less than 50 dB is another computation."""


@dataclass(frozen=True)
class LoadedModel:
    """A source after the user's code has run: what export needs, and what it is checked against.

    Attributes:
        source: Where it came from.
        input_names: Of the ONNX model, in order.
        module: A callable torch module in evaluation mode on the CPU, or None for an ONNX file.
        program: The torch.export program, if that is what the source is.
        examples: Example inputs by name; empty if the source brought none.
        notes: What the user should know, for the report.
    """

    source: ModelSource
    input_names: tuple[str, ...]
    module: Any = None
    program: Any = None
    examples: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """A short name for reports: the module's class, or the file's stem."""
        return type(self.module).__name__ if self.module is not None and self.program is None else self.source.name


def load(source: ModelSource) -> LoadedModel:
    """Run the user's code, or open the file.

    Raises:
        InputError: The source is not there, raises, or is no model.
        UnavailableError: torch is needed and not installed.
    """
    if source.kind == "onnx":
        return _load_onnx(source)
    torch = _torch()
    if source.kind == "exported-program":
        return _load_program(source)
    built = load_callable(source.text)() if source.kind == "callable" else (source.module, source.example_inputs)
    module, examples = built if isinstance(built, tuple) and len(built) == 2 else (built, None)
    if not isinstance(module, torch.nn.Module):
        what = f"{source.text} returned {type(module).__name__}, not a torch.nn.Module."
        raise InputError(what, "Return the module, or the module and a tuple of example inputs.")
    module, notes = _for_inference(module)
    parameters = _forward_parameters(module)
    named = _named_examples(examples, parameters)
    names = tuple(spec.name for spec in source.inputs) or tuple(named) or _required(module)
    if source.inputs and named:
        named = dict(zip(names, named.values(), strict=False))
    if not names:
        what = f"The forward of {type(module).__name__} has no named arguments."
        raise InputError(what, "Name the inputs: --input 'image=float32[batch,3,224,224]'.")
    return LoadedModel(source, names, module, examples=named, notes=notes)


def export(loaded: LoadedModel, samples: Iterable[Sample], directory: Path) -> FloatModel:
    """Write the ONNX model to `directory/exported.onnx` and check it on real samples against the module.

    Args:
        loaded: From `load`.
        samples: Real inputs; the first is the example to trace with, if the source brought none.
        directory: An empty folder.

    Raises:
        InputError: The model cannot be exported (with the module and the reason), or computes something else.
    """
    source = loaded.source
    if source.kind == "onnx":
        return questions.describe(Path(source.text), source.name, source.dims)
    real = list(islice(samples, CHECKED_SAMPLES))
    examples = dict(loaded.examples) or (dict(real[0].inputs) if real else {})
    if missing := [name for name in loaded.input_names if name not in examples]:
        what = f"There is no example of the input {missing[0]!r}: {source.text} gave none, and no sample has it."
        raise InputError(what, "Return (module, example_inputs), or give samples with that name.")
    examples = {name: examples[name] for name in loaded.input_names}
    _check_specs(source.inputs, examples)
    with EagerRunner(loaded) as eager:
        output_names = tuple(eager.run(examples))
        path = directory / "exported.onnx"
        _export_to(path, loaded, examples, output_names)
        model = questions.describe(path, loaded.name, source.dims)
        _check_against(eager, model, real or [Sample(examples)])
    return model


class EagerRunner(Runner):
    """Runs the torch module itself, so that it can be compared like any other model."""

    evidence = Evidence.EXECUTED

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs by name, in the order in which the exporter flattens them."""
        torch = _torch()
        tensors = {name: torch.from_numpy(np.array(inputs[name])) for name in self._loaded.input_names}
        args, kwargs = _call_arguments(self._loaded, tensors)
        with torch.no_grad(), user_code(f"The forward of {type(self._loaded.module).__name__}"):
            result = self._loaded.module(*args, **kwargs)
        outputs = dict(_named_outputs(result, ""))
        if not outputs:
            raise InputError(f"The forward of {self._loaded.source.text} returned no tensor.", "Return a tensor.")
        return {name: tensor.detach().cpu().numpy() for name, tensor in outputs.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


def _torch() -> Any:
    try:
        import torch
    except ModuleNotFoundError as error:
        raise UnavailableError("torch is not installed.", "Install it: pip install 'qdeploy[torch]'") from error
    return torch


def _load_onnx(source: ModelSource) -> LoadedModel:
    path = Path(source.text)
    graph = questions.load_graph(path)
    refuse_quantized(graph, path.name)
    present = {spec.name: spec for v in graph.graph.inputs if not v.is_initializer() for spec in (questions.spec(v),)}
    for wanted in source.inputs:
        if wanted.name not in present:
            raise InputError(f"{path.name} has no input {wanted.name!r}.", suggestion(wanted.name, list(present)))
        static = [dim if isinstance(dim, int) else None for dim in wanted.shape]
        actual = [dim if isinstance(dim, int) else None for dim in present[wanted.name].shape]
        if (wanted.dtype, static) != (present[wanted.name].dtype, actual):
            what = f"--input says {wanted}, but {path.name} has {present[wanted.name]}."
            raise InputError(what, "Leave --input out, or export the file anew with those dimensions.")
    return LoadedModel(source, tuple(present))


def _load_program(source: ModelSource) -> LoadedModel:
    torch = _torch()
    path = Path(source.text)
    if not path.is_file():
        raise InputError(f"There is no file {path}.", "Check the path.")
    try:
        with _quiet():
            program = torch.export.load(path)
    except Exception as error:  # the file is an archive that torch takes apart in many ways
        what = f"{path.name} is not a torch.export program: {_first_line(error)}"
        raise InputError(what, "Write one with torch.export.save.") from error
    names = tuple(spec.name for spec in source.inputs) or tuple(program.graph_signature.user_inputs)
    args, kwargs = program.example_inputs or ((), {})
    examples = {n: t.numpy() for n, t in zip(names, (*args, *kwargs.values()), strict=False)}
    return LoadedModel(source, names, program.module(), program, examples)


def _for_inference(module: Any) -> tuple[Any, tuple[str, ...]]:
    """The module in evaluation mode, in float32, on the CPU; the user's own object is not touched."""
    torch = _torch()
    tensors = [*module.parameters(), *module.buffers()]
    other = sorted({str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point()} - {"float32"})
    if not module.training and not other and all(t.device.type == "cpu" for t in tensors):
        return module, ()
    notes = (f"The module holds {', '.join(other)} values; it is exported in float32.",) if other else ()
    return copy.deepcopy(module).to(device="cpu", dtype=torch.float32 if other else None).eval(), notes


def _forward_parameters(module: Any) -> list[inspect.Parameter]:
    return [
        p
        for p in inspect.signature(module.forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]


def _required(module: Any) -> tuple[str, ...]:
    return tuple(p.name for p in _forward_parameters(module) if p.default is p.empty)


def _named_examples(examples: Any, parameters: list[inspect.Parameter]) -> dict[str, NDArray[Any]]:
    """Example inputs (a tensor, a tuple, or a mapping) by the names of forward's arguments."""
    if examples is None:
        return {}
    if isinstance(examples, Mapping):
        named = dict(examples)
    else:
        values = examples if isinstance(examples, tuple | list) else (examples,)
        if len(values) > len(parameters):
            what = f"There are {len(values)} example inputs, but forward takes {len(parameters)} arguments."
            raise InputError(what, "Give one example for each argument of forward.")
        named = {p.name: value for p, value in zip(parameters, values, strict=False)}
    try:
        return {
            name: np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
            for name, value in named.items()
        }
    except (TypeError, ValueError) as error:
        raise InputError(f"The example inputs cannot be arrays: {error}", "Give tensors.") from error


def _check_specs(specs: tuple[TensorSpec, ...], examples: Arrays) -> None:
    for spec in specs:
        array = examples[spec.name]
        if mismatch := spec.mismatch(array.dtype.name, array.shape):
            raise InputError(f"The example of input {spec.name!r} {mismatch}.", "Correct --input or the samples.")


def _call_arguments(loaded: LoadedModel, tensors: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """By name where forward knows the names, otherwise in order."""
    names = {p.name for p in _forward_parameters(loaded.module)} if loaded.program is None else set()
    if set(tensors) <= names:
        return (), dict(tensors)
    return tuple(tensors.values()), {}


def _named_outputs(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Tensors of a nested result with names: keys and field names where there are any, otherwise positions."""
    torch = _torch()
    if isinstance(value, torch.Tensor):
        yield prefix or "output", value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _named_outputs(part, f"{prefix}_{key}" if prefix else str(key))
    elif isinstance(value, tuple | list):
        fields = getattr(value, "_fields", range(len(value)))
        for key, part in zip(fields, value, strict=True):
            yield from _named_outputs(part, f"{prefix or 'output'}_{key}" if isinstance(key, int) else str(key))


def _export_to(path: Path, loaded: LoadedModel, examples: Arrays, output_names: tuple[str, ...]) -> None:
    torch = _torch()
    tensors = {n: torch.from_numpy(_traceable(a, n, loaded.source)) for n, a in examples.items()}
    args, kwargs = _call_arguments(loaded, tensors)
    dims = _dynamic_shapes(loaded.source)
    dynamic = None
    if loaded.program is None and any(dims.values()):
        dynamic = dims if kwargs else tuple(dims.values())
    try:
        with _quiet():
            program = torch.onnx.export(
                loaded.program or loaded.module,
                args,
                kwargs=kwargs,
                dynamic_shapes=dynamic,
                input_names=list(loaded.input_names),
                output_names=list(output_names),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
            program.save(path, external_data=_is_large(loaded.module))
    except Exception as error:  # torch raises dozens of classes here, and all mean the same to the user
        place = _failing_module(loaded, args, kwargs, dynamic)
        raise InputError(f"{loaded.source.text} cannot be exported to ONNX{place}: {_root_cause(error)}") from error


def _is_large(module: Any) -> bool:
    return bool(sum(t.numel() * t.element_size() for t in module.parameters()) > questions.EXTERNAL_DATA_BYTES)


def _traceable(array: NDArray[Any], name: str, source: ModelSource) -> NDArray[Any]:
    """The example with at least 2 along dynamic dimensions: tracing takes a size of 1 for a constant."""
    spec = next((s for s in source.inputs if s.name == name), None)
    result = np.array(array)
    for axis, dim in enumerate(spec.shape if spec else ()):
        if isinstance(dim, str) and result.shape[axis] < 2:
            result = np.repeat(result, 2, axis=axis)
    return result


def _dynamic_shapes(source: ModelSource) -> dict[str, dict[int, Any] | None]:
    torch = _torch()
    made: dict[str, Any] = {}
    for dim in (d for spec in source.inputs for d in spec.shape if isinstance(d, str)):
        bounds = source.dims.get(dim)
        limits = {"min": bounds.minimum, "max": bounds.maximum} if bounds else {}
        made.setdefault(dim, torch.export.Dim(dim, **limits))
    return {
        spec.name: {axis: made[dim] for axis, dim in enumerate(spec.shape) if isinstance(dim, str)} or None
        for spec in source.inputs
    }


def _check_against(eager: EagerRunner, model: FloatModel, samples: list[Sample]) -> None:
    """Refuse an ONNX model that computes something else than the module, before anything else is done with it."""
    session = open_session(model.path)
    names = [output.name for output in session.get_outputs()]
    for sample in samples:
        expected = eager.run(sample.inputs)
        got = dict(zip(names, session.run(names, dict(sample.inputs)), strict=True))
        for name, reference in expected.items():
            same_shape = name in got and got[name].shape == reference.shape
            sqnr = sqnr_db(reference, got[name]) if same_shape and np.isfinite(reference).all() else None
            if not same_shape or (sqnr is not None and sqnr < LOWEST_SQNR_DB):
                figure = f"{sqnr:.1f} dB SQNR" if sqnr is not None else "another shape"
                where = f"output {name!r} of {sample.origin} has {figure}"
                what = f"The ONNX model does not compute what the module does: {where}."
                raise InputError(what, "Look for control flow that depends on values, randomness, or state in forward.")


def _failing_module(loaded: LoadedModel, args: Any, kwargs: Any, dynamic: Any) -> str:
    """Where in the model tracing stops, as " in layer1.attention (MyAttention)"; empty if it does not stop there."""
    torch = _torch()
    if loaded.program is not None:
        return ""
    stack: list[str] = []
    names = {module: f"{name} ({type(module).__name__})" for name, module in loaded.module.named_modules() if name}
    hooks = [m.register_forward_pre_hook(lambda module, _: stack.append(names[module])) for m in names]
    hooks += [m.register_forward_hook(lambda *_: stack.pop() and None) for m in names]
    try:
        with _quiet():
            torch.export.export(loaded.module, args, kwargs, dynamic_shapes=dynamic, strict=False)
    except Exception:  # noqa: BLE001 - the same failure again, this time to see where
        return f" in {stack[-1]}" if stack else ""
    finally:
        for hook in hooks:
            hook.remove()
    return ""


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's exporter, which warns of its own future and prints whole graphs when it fails.

    What the user's forward prints while it is traced goes too; it was run, and heard, before.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(disabled)
