"""The options that several commands share, and how their texts are read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qdeploy.errors import InputError

if TYPE_CHECKING:
    from qdeploy.model import DimRange, ModelSource, TensorSpec
    from qdeploy.samples.kinds import AnyPreprocessing

DATA = "A folder of images or .wav files, a .csv, .txt or .npz file, or file.py:callable"

Source = Annotated[
    str | None,
    typer.Argument(
        metavar="SOURCE",
        help="file.py:callable, package.module:callable, model.pt2 or model.onnx; needed unless a recipe has one.",
        show_default=False,
    ),
]
Recipe = Annotated[
    Path | None,
    typer.Option(
        "--recipe", metavar="FILE", help="A TOML file with a model and options; what the command line gives beats it."
    ),
]
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder that export wrote.", show_default=False)]
ModelOrBundle = Annotated[
    Path,
    typer.Argument(metavar="MODEL|BUNDLE", help="An ONNX file, or a folder that export wrote.", show_default=False),
]
Targets = Annotated[
    list[str],
    typer.Option(
        "--target",
        metavar="NAME[:PRECISION]",
        help="What to build for; see qdeploy backends. auto: what is recommended for this machine.",
        default_factory=list,
        show_default=False,
    ),
]
StatisticsFile = Annotated[
    Path | None,
    typer.Option("--statistics", metavar="STATS", help="What qdeploy calibrate wrote, instead of --calibration."),
]
Granularity = Annotated[
    Literal["per-channel", "per-tensor"] | None,
    typer.Option(
        "--granularity", help="One scale for each channel of a weight, or for all.", show_default="per-channel"
    ),
]
Recover = Annotated[
    str | None,
    typer.Option(
        "--recover",
        metavar="none|STEP,...",
        help="Steps that win back accuracy.",
        show_default="bias-correction for int8",
    ),
]
Keep = Annotated[
    list[str],
    typer.Option(
        "--keep",
        metavar="PATTERN",
        help="Leave nodes float: first, last, or a name with * and ?.",
        default_factory=list,
        show_default=False,
    ),
]
Settings = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="BACKEND.OPTION=VALUE",
        help="An option of a target.",
        default_factory=list,
        show_default=False,
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The bundle to write.")]
Inputs = Annotated[
    list[str],
    typer.Option(
        "--input",
        metavar="SPEC",
        help="An input's name, type and dimensions, as in 'image=float32\\[batch,3,224,224]'; a name is dynamic.",
        default_factory=list,
        show_default=False,
    ),
]
Dims = Annotated[
    list[str],
    typer.Option(
        "--dim",
        metavar="NAME=MIN:TYPICAL:MAX",
        help="The range of a dynamic dimension.",
        default_factory=list,
        show_default=False,
    ),
]
States = Annotated[
    list[str],
    typer.Option(
        "--state",
        metavar="INPUT=OUTPUT",
        help="An input that the model's own output of the sample before feeds; the first sample begins with zeros.",
        default_factory=list,
        show_default=False,
    ),
]
Calibration = Annotated[
    str | None, typer.Option("--calibration", metavar="DATA", help=f"{DATA}: samples to read ranges from.")
]
Evaluation = Annotated[
    str | None, typer.Option("--evaluation", metavar="DATA", help=f"{DATA}: samples, with labels or without.")
]
Preprocess = Annotated[
    str | None,
    typer.Option(
        "--preprocess",
        metavar="SETTINGS",
        help="How files become inputs: 'resize=256 crop=224 mean=0.5', 'tokenizer=tok/' or 'rate=16000 length=16000'.",
    ),
]
Samples = Annotated[int | None, typer.Option("--samples", metavar="N", help="Most calibration samples to use.")]
WorkerCount = Annotated[
    int | None,
    typer.Option(
        "--workers",
        metavar="N",
        help="Share calibration, probes and evaluation among N processes; the result does not depend on it.",
        show_default="this process alone",
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Share them among tasks of a Ray cluster (ray://host:10001, auto or local), one a core unless --workers "
        "says how many.",
    ),
]
Reader = Annotated[
    str | None,
    typer.Option(
        "--reader",
        metavar="NAME",
        help="How ranges are chosen: mse, entropy, minmax, percentile\\[:99.99].",
        show_default="mse",
    ),
]
Metric = Annotated[
    str | None,
    typer.Option(
        "--metric",
        metavar="NAME",
        help="top1, top5, pearson, spearman or file.py:callable; top1 where labels are classes.",
    ),
]
MaxDrop = Annotated[
    float | None,
    typer.Option(
        "--max-drop",
        metavar="X",
        help="The allowed drop of the metric: 0.01 is one point. Without --recover, steps are searched that keep it.",
    ),
]
Force = Annotated[bool, typer.Option("--force", metavar="", help="Replace the output if it exists.")]
Json = Annotated[
    bool, typer.Option("--json", metavar="", help="Print the result as JSON, and nothing else, on standard output.")
]
Quiet = Annotated[bool, typer.Option("--quiet", metavar="", help="Show nothing but errors.")]


def model_source(text: str, inputs: list[str], dims: list[str]) -> ModelSource:
    """What SOURCE, --input and --dim say."""
    from qdeploy.model import ModelSource

    return ModelSource.parse(text, specs(inputs), ranges(dims))


def specs(texts: list[str]) -> tuple[TensorSpec, ...]:
    """What --input says."""
    from qdeploy.model import TensorSpec

    return tuple(map(TensorSpec.parse, texts))


def ranges(texts: list[str]) -> dict[str, DimRange]:
    """What --dim says."""
    from qdeploy.model import DimRange

    return dict(map(DimRange.parse, texts))


def states(texts: list[str]) -> dict[str, str]:
    """What --state says: input → output.

    Raises:
        InputError: A text that is not of the form INPUT=OUTPUT, or an input that is named twice.
    """
    values: dict[str, str] = {}
    for text in texts:
        name, _, output = text.partition("=")
        if not name or not output:
            raise InputError(f"--state cannot be {text!r}.", "Write INPUT=OUTPUT, for example h=h_out.")
        if name in values:
            raise InputError(f"The state {name!r} is given twice.", "Give each --state once.")
        values[name] = output
    return values


def preprocessing(text: str | None) -> AnyPreprocessing | None:
    """What --preprocess says."""
    from qdeploy.samples.kinds import parse_preprocessing

    return None if text is None else parse_preprocessing(text)


def settings(texts: list[str]) -> dict[str, dict[str, str]]:
    """What --set says: target → option → value.

    Raises:
        InputError: A text that is not of the form BACKEND.OPTION=VALUE.
    """
    values: dict[str, dict[str, str]] = {}
    for text in texts:
        found = re.fullmatch(r"([^.=]+)\.([^.=]+)=(.*)", text)
        if found is None:
            raise InputError(f"--set cannot be {text!r}.", "Write BACKEND.OPTION=VALUE, for example ort-cpu.threads=2.")
        values.setdefault(found[1], {})[found[2]] = found[3]
    return values
