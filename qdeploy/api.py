"""The one command from Python, and what comes of it. The values and arrows stand in rooms of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from numpy.typing import NDArray

from qdeploy import bundled, pipeline, registry
from qdeploy.backend import Arrays, Backend, Runner, option_text, parse_options
from qdeploy.errors import InputError
from qdeploy.model import DimRange, ModelSource, TensorSpec
from qdeploy.recipe import Recipe, TargetRequest, with_options
from qdeploy.recommend import AUTO, recommend_by_name
from qdeploy.samples.kinds import AnyPreprocessing, parse_preprocessing
from qdeploy.scheme import QuantContract

if TYPE_CHECKING:
    from qdeploy.report.schema import Report


@dataclass(frozen=True)
class Deployment:
    """A bundle that `export` wrote.

    Attributes:
        path: Its folder.
        report: How its targets compare with FP32.
    """

    path: Path
    report: Report

    @property
    def ok(self) -> bool:
        """Whether every target was built and passed."""
        return self.report.exit_code == 0

    def open(self, target: str | None = None) -> Runner:
        """A runner of one target, ready for `with`; the bundle's bytes are checked first.

        Args:
            target: Its name or its folder in the bundle; None for the first.

        Raises:
            InputError: The bundle has no such target, or was changed.
        """
        return bundled.open_target(self.path, target)

    def run(self, inputs: Arrays, target: str | None = None) -> dict[str, NDArray[Any]]:
        """Outputs by name for whole model inputs by name, batch and states included. To run many, use `open`."""
        with self.open(target) as runner:
            return runner.run(inputs)


def export(  # noqa: PLR0913 - one argument an option of the command line
    model: Any,
    example_inputs: Any = None,
    *,
    targets: str | Iterable[str],
    output: str | PathLike[str],
    calibration: Any = None,
    statistics: str | PathLike[str] | None = None,
    evaluation: Any = None,
    input_names: Sequence[str] | None = None,
    dims: Mapping[str, tuple[int, int, int]] | None = None,
    states: Mapping[str, str] | None = None,
    preprocessing: AnyPreprocessing | str | None = None,
    samples: int | None = None,
    reader: str = "mse",
    granularity: Literal["per-channel", "per-tensor"] = "per-channel",
    keep: Sequence[str] = (),
    recover: Sequence[str] | None = None,
    metric: Any = None,
    max_drop: float | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    force: bool = False,
) -> Deployment:
    """Quantize a model for its targets, compare them with FP32, and write the bundle: `qdeploy export` from Python.

    Args:
        model: A `torch.nn.Module`, or what the command takes: "file.py:callable", "package.module:callable", a .pt2 or
            an .onnx file.
        example_inputs: For a module: its arguments, as a tensor, a tuple or a mapping.
        targets: "name" or "name:precision", or several.
        output: The folder to write.
        calibration: Samples to read ranges from: a folder of images, an .npz file, "file.py:callable", or from Python
            a callable without arguments or any re-iterable, of mappings from input name to array, or (mapping, labels).
        statistics: What `qdeploy calibrate` wrote, instead of calibration samples.
        evaluation: Samples to measure accuracy with, in the same forms; None for the calibration samples.
        input_names: What to call the arguments of forward, in order. A name alone takes type and shape from the
            example; as "image=float32[batch,3,224,224]" it states them, and a dimension that is a name is dynamic.
        dims: Minimum, typical and maximum of the dynamic dimensions, by name: {"batch": (1, 1, 8)}.
        states: For a model that carries states from sample to sample: the output that feeds each state, by the input's
            name, as in {"h": "h_out"}. A sample that gives a state begins a new sequence; the first begins with zeros.
        preprocessing: How files become inputs, as a value or as --preprocess has it.
        samples: Most calibration samples to use.
        reader: The calibration reader.
        granularity: Of the weights.
        keep: Nodes to leave float: "first", "last", or names with * and ?.
        recover: Recovery steps; None for each precision's default, ["none"] for plain quantization.
        metric: "top1", "top5", "file.py:callable", or a function of the outputs and the labels.
        max_drop: The allowed drop of the metric, absolute.
        options: Options of the targets: {"ort-cpu": {"threads": 2}}.
        force: Replace an earlier bundle.

    Raises:
        InputError: An argument, or something that it names, is wrong.
        UnavailableError: A package that is needed is not installed.
    """
    if isinstance(preprocessing, str):
        preprocessing = parse_preprocessing(preprocessing)
    recipe = Recipe(
        source=_source(model, example_inputs, input_names or (), dims or {}),
        targets=with_options(
            map(TargetRequest.parse, [targets] if isinstance(targets, str) else targets),
            {name: {key: option_text(value) for key, value in each.items()} for name, each in (options or {}).items()},
        ),
        states=states or {},
        calibration=calibration,
        statistics=None if statistics is None else Path(statistics),
        evaluation=evaluation,
        preprocessing=preprocessing,
        samples=samples,
        reader=reader,
        granularity=granularity,
        keep=tuple(keep),
        recover=None if recover is None else tuple(recover),
        metric=metric,
        max_drop=max_drop,
    )
    return Deployment(Path(output), pipeline.run(recipe, Path(output), force=force))


def contract(target: str, precision: str = "", **options: Any) -> QuantContract:
    """A target's rules, whether or not it can be built here.

    Args:
        target: Its name, or "auto" for what is recommended for this machine.
        precision: One that it takes; empty for its first.
        options: The target's own.

    Raises:
        InputError: There is no such target, precision or option.
        UnavailableError: The target's plug-in needs a package that is not installed.
    """
    if target == AUTO:
        chosen = recommend_by_name(AUTO).request(precision)
        target, precision, options = chosen.name, chosen.precision, {**chosen.options, **options}
    kind = registry.backends().load(target)
    backend: Backend = kind()
    precision = precision or backend.precisions[0]
    if precision not in backend.precisions:
        what = f"{target} does not take the precision {precision!r}."
        raise InputError(what, f"It takes: {', '.join(backend.precisions)}.")
    return backend.contract(precision, parse_options(kind, {key: option_text(value) for key, value in options.items()}))


def _source(
    model: Any, example_inputs: Any, input_names: Sequence[str], dims: Mapping[str, tuple[int, int, int]]
) -> ModelSource:
    ranges = {name: DimRange(*limits) for name, limits in dims.items()}
    if isinstance(model, str | PathLike):
        return ModelSource.parse(str(model), tuple(map(TensorSpec.parse, input_names)), ranges)
    if not callable(getattr(model, "forward", None)):
        what = f"A {type(model).__name__} is no model."
        raise InputError(what, "Give a torch.nn.Module, a path, or the name of a callable that returns a module.")
    examples = _in_order(example_inputs)
    inputs = tuple(
        TensorSpec.parse(name) if "=" in name else _spec(name, examples, index)
        for index, name in enumerate(input_names)
    )
    return ModelSource(type(model).__name__, "module", inputs, ranges, model, example_inputs)


def _in_order(examples: Any) -> Sequence[Any]:
    if isinstance(examples, Mapping):
        return list(examples.values())
    return examples if isinstance(examples, tuple | list) else [examples]


def _spec(name: str, examples: Sequence[Any], index: int) -> TensorSpec:
    """Type and shape of an input that is only named, from its example."""
    example = examples[index] if index < len(examples) else None
    if example is None:
        what = f"The input name {name!r} comes without an example."
        raise InputError(what, "Give example_inputs, or write name=dtype[dimensions].")
    return TensorSpec(name, str(example.dtype).removeprefix("torch."), tuple(example.shape))
