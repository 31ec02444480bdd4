"""ModelSource → FloatModel: torch.onnx.export, and proof that the ONNX model computes what the module computes."""

from __future__ import annotations

import copy
import inspect
import io
import logging
import os
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from qdeploy import graph as questions
from qdeploy.affine import sqnr_db
from qdeploy.archive import require_modest, require_plain_paths
from qdeploy.backend import Arrays, Evidence, Runner
from qdeploy.errors import InputError, UnavailableError
from qdeploy.marks import take_marks
from qdeploy.model import DimRange, FloatModel, ModelSource, TensorSpec
from qdeploy.plan import Learned
from qdeploy.prepare import OPSET, refuse_other_floats, refuse_quantized
from qdeploy.registry import suggestion
from qdeploy.samples.callables import load_callable, user_code
from qdeploy.samples.check import checked
from qdeploy.samples.source import Sample, SampleSource
from qdeploy.session import SessionRunner

WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
"""The environment variable that makes torch.load refuse all but tensors and plain values."""

LEARNED = "qdeploy.learned"
"""Where a torch.fx module keeps what training settled: copies of it keep this, and nothing else that is not its own."""

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
        ranks: How many axes each input has, where that is known.
        notes: What the user should know, for the report.
    """

    source: ModelSource
    input_names: tuple[str, ...]
    module: Any = None
    program: Any = None
    examples: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def learned(self) -> Learned | None:
        """The ranges and scales that training settled, if `qdeploy.qat.finish` gave the module."""
        meta = getattr(self.module, "meta", None)
        return meta.get(LEARNED) if isinstance(meta, dict) else None

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
    if isinstance(module, torch.jit.ScriptModule):
        raise InputError(f"{source.text} is TorchScript.", "Give the module that it was traced or scripted from.")
    module, notes = _for_inference(module)
    named = _named_examples(examples, source, module)
    if notes:  # what was said of its inputs, and given, was meant for the module as it was
        floats = ("float16", "bfloat16", "float64")
        inputs = tuple(replace(s, dtype="float32") if s.dtype in floats else s for s in source.inputs)
        source = replace(source, inputs=inputs)
        named = {name: a.astype(np.float32) if a.dtype.kind == "f" else a for name, a in named.items()}
    names = tuple(spec.name for spec in source.inputs) or tuple(named) or _required(module)
    if not names:
        what = f"The forward of {type(module).__name__} has no named arguments."
        raise InputError(what, "Name the inputs: --input 'image=float32[batch,3,224,224]'.")
    ranks = {name: array.ndim for name, array in named.items()} | _ranks(source.inputs)
    loaded = LoadedModel(source, names, module, examples=named, ranks=ranks, notes=notes)
    if loaded.learned is None:
        return loaded
    trained = f"Ranges and scales were learned in training for {loaded.learned.target}"
    return replace(loaded, notes=(*notes, f"{trained}; FP32 is the trained model with its weights already rounded."))


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
        model = questions.describe(Path(source.text), source.name, source.dims)
        _require_dims(source, model)
        with SessionRunner(model.path, graph_level="disable"):  # the reference of all that follows: it must load
            return model
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
        labels = take_marks(path) if loaded.learned is not None else {}
        model = replace(questions.describe(path, loaded.name, source.dims), labels=labels)
        _require_inputs(source.inputs, model.inputs, "the exported model")
        _require_dims(source, model)
        _check_against(eager, model, real or [Sample(examples, origin="the example inputs")])
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
        # In an ONNX graph inputs and outputs share their names, so that an output cannot be called as an input is.
        return {
            f"{name}_output" if name in tensors else name: _array(tensor, f"The output {name!r}")
            for name, tensor in outputs.items()
        }

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
    questions.require_sound(path)
    graph = questions.load_graph(path)
    refuse_quantized(graph, path.name)
    refuse_other_floats(graph, path.name)
    if same := next((value.name for value in graph.graph.outputs if value.is_graph_input()), None):
        raise InputError(f"The output {same!r} of {path.name} is its input.", "Take it off the outputs.")
    inputs = tuple(questions.spec(value) for value in graph.graph.inputs if not value.is_initializer())
    _require_inputs(source.inputs, inputs, path.name)
    return LoadedModel(source, tuple(spec.name for spec in inputs), ranks=_ranks(inputs))


def _ranks(specs: tuple[TensorSpec, ...]) -> dict[str, int]:
    return {spec.name: len(spec.shape) for spec in specs}


def _require_inputs(wanted: tuple[TensorSpec, ...], inputs: tuple[TensorSpec, ...], name: str) -> None:
    """Refuse what --input says of a model that has other inputs; what its dynamic dimensions are called is free."""
    present = {spec.name: spec for spec in inputs}
    for spec in wanted:
        if spec.name not in present:
            raise InputError(f"{name} has no input {spec.name!r}.", suggestion(spec.name, list(present)))
        static, actual = ([d if isinstance(d, int) else None for d in s.shape] for s in (spec, present[spec.name]))
        if (spec.dtype, static) != (present[spec.name].dtype, actual):
            what = f"--input says {spec}, but {name} has {present[spec.name]}."
            raise InputError(what, "Leave --input out, or export the file anew with those dimensions.")


def _require_dims(source: ModelSource, model: FloatModel) -> None:
    """Refuse ranges of dimensions that the model does not have."""
    names = sorted({dim for spec in model.inputs for dim in spec.shape if isinstance(dim, str)})
    for dim in source.dims:
        if dim not in names:
            raise InputError(f"No input of the model has a dynamic dimension {dim!r}.", suggestion(dim, names))


def _load_program(source: ModelSource) -> LoadedModel:
    torch = _torch()
    path = Path(source.text)
    if not path.is_file():
        raise InputError(f"There is no file {path}.", "Check the path.")
    try:
        with _quiet(), _without_pickles(path):
            program = torch.export.load(path)
    except Exception as error:  # the file is an archive that torch takes apart in many ways
        what = f"{path.name} is not a torch.export program: {_first_line(error)}"
        raise InputError(what, "Write one with torch.export.save.") from error
    names = tuple(spec.name for spec in source.inputs) or tuple(program.graph_signature.user_inputs)
    args, kwargs = program.example_inputs or ((), {})
    values = (*args, *kwargs.values())
    if not all(isinstance(value, torch.Tensor) for value in values) or len(values) != len(names):
        what = f"{path.name} takes {len(values)} arguments, of which {len(names)} are tensors with names."
        raise InputError(what, "Export a module whose arguments are all tensors, and name each of them or none.")
    floats = {v.dtype for v in (*values, *program.state_dict.values()) if v.is_floating_point()}
    if other := sorted(str(dtype).removeprefix("torch.") for dtype in floats - {torch.float32}):
        raise InputError(f"{path.name} holds {', '.join(other)} values.", "Export the module after module.float().")
    examples = {name: _array(value, f"The example of {name!r}") for name, value in zip(names, values, strict=True)}
    ranks = {name: array.ndim for name, array in examples.items()}
    return LoadedModel(source, names, program.module(), program, examples, ranks)


@contextmanager
def _without_pickles(path: Path) -> Iterator[None]:
    """Let torch.export.load read numbers only: it would unpickle what else a program holds, which may run any code."""
    with zipfile.ZipFile(path) as archive:
        require_plain_paths(archive)
        require_modest(archive, path.stat().st_size)
        for name in archive.namelist():
            if PurePosixPath(name).name.startswith("opaque_obj"):
                raise ValueError(f"it holds a pickled object ({name}), which could run any code")
    before = os.environ.get(WEIGHTS_ONLY)
    os.environ[WEIGHTS_ONLY] = "1"
    try:
        yield
    finally:
        os.environ.pop(WEIGHTS_ONLY)
        if before is not None:
            os.environ[WEIGHTS_ONLY] = before


def _for_inference(module: Any) -> tuple[Any, tuple[str, ...]]:
    """The module in evaluation mode, in float32, on the CPU; the user's own object is not touched."""
    torch = _torch()
    tensors = [*module.parameters(), *module.buffers()]
    other = sorted({str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point()} - {"float32"})
    ready = not other and all(t.device.type == "cpu" for t in tensors)
    if ready and not any(part.training for part in module.modules()):
        return module, ()
    notes = (f"The module holds {', '.join(other)} values; it is exported in float32.",) if other else ()
    try:
        with user_code(f"Copying {type(module).__name__}"):
            copied = copy.deepcopy(module)
    except InputError as error:
        cure = "Return it in evaluation mode, in float32 and on the CPU: module.eval().float().cpu() needs no copy."
        raise InputError(f"{error.what.rstrip('.')}.", cure) from error
    return copied.to(device="cpu", dtype=torch.float32 if other else None).eval(), notes


def _forward_parameters(module: Any) -> list[inspect.Parameter]:
    return [
        p
        for p in inspect.signature(module.forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]


def _required(module: Any) -> tuple[str, ...]:
    return tuple(p.name for p in _forward_parameters(module) if p.default is p.empty)


def _named_examples(examples: Any, source: ModelSource, module: Any) -> dict[str, NDArray[Any]]:
    """Example inputs (a tensor, a tuple in forward's order, or a mapping from its names) by the names of the inputs.

    Those of --input are forward's own names, or else take their place in its order.
    """
    own = [p.name for p in _forward_parameters(module)]
    given = [spec.name for spec in source.inputs]
    names = own if set(given) <= set(own) else given
    if examples is None:
        return {}
    if isinstance(examples, Mapping):
        renamed = dict(zip(own, names, strict=False))
        named = {renamed.get(str(name), str(name)): value for name, value in examples.items()}
        for name in named if own else ():
            if name not in names:
                raise InputError(f"Forward has no argument {name!r}.", suggestion(name, names))
    else:
        values = examples if isinstance(examples, tuple | list) else (examples,)
        if len(values) > len(names):
            what = f"There are {len(values)} example inputs, but forward takes {len(names)} named arguments."
            raise InputError(what, "Give one for each argument, and name those of *args with --input.")
        named = dict(zip(names, values, strict=False))
    return {name: _array(value, f"The example of {name!r}") for name, value in named.items()}


def _array(value: Any, name: str) -> NDArray[Any]:
    """A tensor, or what numpy can take, as numbers; bfloat16, which numpy does not know, as float32."""
    try:
        tensor = _torch().as_tensor(value).detach().cpu()
        array: NDArray[Any] = (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} cannot be an array: {_first_line(error)}.", "Give a dense tensor.") from error
    return array


def _check_specs(specs: tuple[TensorSpec, ...], examples: Arrays) -> None:
    for spec in specs:
        array = examples[spec.name]
        if mismatch := spec.mismatch(array.dtype.name, array.shape):
            raise InputError(f"The example of input {spec.name!r} {mismatch}.", "Correct --input or the samples.")


def _call_arguments(loaded: LoadedModel, tensors: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """By name where forward takes the names, otherwise in order; to a program just as it was exported."""
    if loaded.program is not None:
        args, kwargs = loaded.program.example_inputs or (tensors, {})
        in_order = iter(tensors.values())
        return tuple(next(in_order) for _ in args), {name: next(in_order) for name in kwargs}
    try:
        inspect.signature(loaded.module.forward).bind(**tensors)
    except TypeError:
        return tuple(tensors.values()), {}
    return (), dict(tensors)


def _named_outputs(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Tensors of a nested result with names: keys and field names where there are any, otherwise positions."""
    torch = _torch()
    if isinstance(value, torch.Tensor):
        yield prefix or "output", value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _named_outputs(part, f"{prefix}_{key}" if prefix else str(key))
    elif isinstance(value, tuple | list):
        fields = getattr(value, "_fields", None)
        for key, part in zip(fields or range(len(value)), value, strict=True):
            base = prefix or ("" if fields else "output")
            yield from _named_outputs(part, f"{base}_{key}" if base else key)
    elif value is not None and not isinstance(value, bool | int | float | str):
        what = f"Forward returns a {type(value).__name__} as {prefix or 'output'!r}; the outputs of ONNX are tensors."
        cure = "Return tensors, in tuples or mappings; a transformers model returns no cache with use_cache=False."
        raise InputError(what, cure)


def _export_to(path: Path, loaded: LoadedModel, examples: Arrays, output_names: tuple[str, ...]) -> None:
    torch = _torch()
    tensors = {n: torch.from_numpy(_traceable(a, n, loaded.source)) for n, a in examples.items()}
    args, kwargs = _call_arguments(loaded, tensors)
    dims = _dynamic_shapes(loaded)
    dynamic: Any = None
    if any(dims.values()):
        dynamic = dims if kwargs and loaded.program is None else tuple(dims.values())
    try:
        with _tracing():
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
        cause = _root_cause(error)
        place = _failing_module(loaded, args, kwargs, dynamic, cause)
        what = f"{loaded.source.text} cannot be exported to ONNX{place}: {cause}"
        cure = "Change that part of forward, or give an ONNX file that you exported yourself."
        raise InputError(what, cure) from error


def _is_large(module: Any) -> bool:
    tensors = (*module.parameters(), *module.buffers())
    return bool(sum(t.numel() * t.element_size() for t in tensors) > questions.EXTERNAL_DATA_BYTES)


def _traceable(array: NDArray[Any], name: str, source: ModelSource) -> NDArray[Any]:
    """The example, repeated until its dynamic dimensions are in range and not 1, which tracing takes for constant."""
    spec = next((s for s in source.inputs if s.name == name), None)
    result = np.array(array)
    for axis, dim in enumerate(spec.shape if spec else ()):
        if isinstance(dim, str):
            least = max(2, source.dims[dim].minimum if dim in source.dims else 0)
            if result.shape[axis] < least:
                result = np.take(result, np.arange(least) % result.shape[axis], axis)
    return result


def _dynamic_shapes(loaded: LoadedModel) -> dict[str, dict[int, Any] | None]:
    """Axis → dimension of each input of --input; of a program, which has its dimensions already, only their names."""
    source = loaded.source
    names = {dim for spec in source.inputs for dim in spec.shape if isinstance(dim, str)}
    dims = {n: n if loaded.program is not None else _dimension(n, source.dims.get(n)) for n in names}
    return {
        spec.name: {axis: dims[dim] for axis, dim in enumerate(spec.shape) if isinstance(dim, str)} or None
        for spec in source.inputs
    }


def _dimension(name: str, bounds: DimRange | None) -> Any:
    """A dynamic dimension as torch has it."""
    dim = _torch().export.Dim
    if bounds is None:
        return dim(name)
    if bounds.minimum == bounds.maximum:
        what = f"The dimension {name!r} is dynamic, but always {bounds.minimum}."
        raise InputError(what, f"Write {bounds.minimum} in its place in --input, and leave --dim out.")
    return dim(name, min=bounds.minimum, max=bounds.maximum)


def _check_against(eager: EagerRunner, model: FloatModel, samples: list[Sample]) -> None:
    """Refuse an ONNX model that computes something else than the module, before anything else is done with it."""
    with SessionRunner(model.path, graph_level="disable") as onnx:
        for sample in checked(SampleSource("samples to export with", lambda: iter(samples)), model.inputs):
            expected, got = eager.run(sample.inputs), onnx.run(sample.inputs)
            for name, reference in expected.items():
                same_shape = name in got and got[name].shape == reference.shape
                sqnr = _sqnr_of_finite(reference, got[name]) if same_shape else float("nan")
                if not sqnr >= LOWEST_SQNR_DB:
                    figure = f"{sqnr:.1f} dB SQNR" if same_shape else "another shape"
                    where = f"output {name!r} of {sample.origin} has {figure}"
                    what = f"The ONNX model does not compute what the module does: {where}."
                    cure = "Look for control flow that depends on values, randomness, or state in forward."
                    if np.isnan(reference).any():
                        cure = "The module's own output holds NaN: look for NaN in its weights and buffers."
                    raise InputError(what, cure)


def _sqnr_of_finite(reference: NDArray[Any], array: NDArray[Any]) -> float:
    """SQNR in dB over the finite values; −inf unless NaN and infinities (masks) are where the reference has them."""
    finite = np.isfinite(reference)
    if not np.array_equal(np.where(finite, 0, reference), np.where(np.isfinite(array), 0, array), equal_nan=True):
        return float("-inf")
    return sqnr_db(reference[finite], array[finite])


def _failing_module(loaded: LoadedModel, args: Any, kwargs: Any, dynamic: Any, cause: str) -> str:
    """Where in the model tracing stops, or the operator stands that the cause names, as " in layer1.attention (Mine)".

    Empty if it is not found.
    """
    torch = _torch()
    if loaded.program is not None:
        return ""
    stack: list[str] = []
    names = {module: f"{name} ({type(module).__name__})" for name, module in loaded.module.named_modules() if name}
    hooks = [m.register_forward_pre_hook(lambda module, _: stack.append(names[module])) for m in names]
    hooks += [m.register_forward_hook(lambda *_: stack.pop() and None) for m in names]
    try:
        with _tracing():
            program = torch.export.export(loaded.module, args, kwargs, dynamic_shapes=dynamic, strict=False)
    except Exception:  # noqa: BLE001 - the same failure again, this time to see where
        return f" in {stack[-1]}" if stack else ""
    finally:
        for hook in hooks:
            hook.remove()
    return next((_module_of(node) for node in program.graph.nodes if repr(node.target) in cause), "")


def _module_of(node: Any) -> str:
    """The innermost module that a traced operator stands in."""
    path, kind = [("", ""), *node.meta.get("nn_module_stack", {}).values()][-1]
    name = kind if isinstance(kind, str) else kind.__name__
    return f" in {path} ({name.rpartition('.')[2]})" if path else ""


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def _tracing() -> Iterator[None]:
    """Trace without gradients, as the eager module is run, and attention by its formula.

    The other kernels for attention lay their result out as its decomposition for ONNX, which comes later, does not. And
    torch.onnx keeps sequences dynamic through a recurrence of its own, which torch forgets to look up once it has
    resolved the operator: without clearing what it remembers, the second LSTM of a process gets a fixed length.
    """
    torch = _torch()
    for operator in (torch.ops.aten.lstm.input, torch.ops.aten.gru.input):
        operator._dispatch_cache.clear()  # noqa: SLF001 - torch offers no other way
    attention = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with _quiet(), torch.no_grad(), attention, _exact_rewrites():
        yield


@contextmanager
def _exact_rewrites() -> Iterator[None]:
    """Without the rewrites that take x + 1e-12 for x: where that guards a division, the quotient would become NaN.

    torch runs onnxscript's default rules on what it exports, and offers no choice of them: only not to run any, and
    then it gives inputs that are outputs, too, the outputs' names.
    """
    from onnxscript import rewriter
    from onnxscript.rewriter.rules.common import _no_op

    inexact = tuple(_no_op.rules)
    before = rewriter._DEFAULT_REWRITE_RULES  # noqa: SLF001 - onnxscript offers no other way
    rewriter._DEFAULT_REWRITE_RULES = tuple(rule for rule in before if rule not in inexact)  # noqa: SLF001
    try:
        yield
    finally:
        rewriter._DEFAULT_REWRITE_RULES = before  # noqa: SLF001


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
