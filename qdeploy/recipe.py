"""What a run is to do, as one frozen value: the command line, Python and recipe files all end here."""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from qdeploy.backend import option_text
from qdeploy.errors import InputError
from qdeploy.model import DimRange, ModelSource, TensorSpec
from qdeploy.registry import suggestion
from qdeploy.samples.kinds import AnyPreprocessing, parse_preprocessing, preprocessing_from_json
from qdeploy.toml import toml_text

FROM_PYTHON = " given from Python"
"""How the written form of a Python object ends; a recipe that holds one cannot be run as it is."""

Granularity = Literal["per-channel", "per-tensor"]


@dataclass(frozen=True)
class TargetRequest:
    """One target at one precision.

    Attributes:
        name: Backend name.
        precision: As the backend lists them; empty for its first.
        options: The backend's options as texts.
    """

    name: str
    precision: str = ""
    options: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str, options: Mapping[str, str] | None = None) -> TargetRequest:
        """What `--target` says: NAME or NAME:PRECISION."""
        name, _, precision = text.partition(":")
        return cls(name, precision, options or {})


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result of a run; the values are as on the command line.

    Attributes:
        source: The model.
        targets: In the order of the report; none for what needs none, such as calibrating.
        states: The output that feeds each input which carries a state from sample to sample.
        calibration: DATA to calibrate with, or None.
        statistics: A statistics file to use instead of calibrating, or None.
        evaluation: DATA to measure accuracy with; None for the calibration samples.
        preprocessing: How images, texts or audio become inputs.
        samples: Most calibration samples to use.
        reader: Calibration reader.
        granularity: Of the weights.
        keep: Nodes that stay float: "first", "last", patterns.
        recover: Recovery steps, or None for each precision's default.
        metric: A metric's name, `file.py:callable`, a Python callable, or None for top1 where there are labels.
        max_drop: The allowed drop of the metric, absolute, or None.
    """

    source: ModelSource
    targets: tuple[TargetRequest, ...]
    states: Mapping[str, str] = field(default_factory=dict)
    calibration: Any = None
    statistics: Path | None = None
    evaluation: Any = None
    preprocessing: AnyPreprocessing | None = None
    samples: int | None = None
    reader: str = "mse"
    granularity: Granularity = "per-channel"
    keep: tuple[str, ...] = ()
    recover: tuple[str, ...] | None = None
    metric: Any = None
    max_drop: float | None = None

    def __post_init__(self) -> None:
        if self.calibration is not None and self.statistics is not None:
            what = "Both --calibration and --statistics are given."
            raise InputError(what, "Give one: data to calibrate with, or the statistics of an earlier calibration.")
        if self.granularity not in get_args(Granularity):
            what = f"The granularity cannot be {self.granularity!r}."
            raise InputError(what, suggestion(self.granularity, list(get_args(Granularity))))

    def as_json(self) -> dict[str, Any]:
        """The recipe as plain data for the bundle; what cannot be written down is named by its type."""
        of_module = self.source.kind == "module"
        return {
            "model": {
                "source": f"a {self.source.text}{FROM_PYTHON}" if of_module else self.source.text,
                "inputs": [str(spec) for spec in self.source.inputs],
                "dims": {n: f"{d.minimum}:{d.typical}:{d.maximum}" for n, d in self.source.dims.items()},
                "states": dict(self.states),
            },
            "samples": {"preprocessing": self.preprocessing.to_json() if self.preprocessing else None},
            "calibration": {
                "data": _written(self.calibration),
                "statistics": _written(self.statistics),
                "reader": self.reader,
                "samples": self.samples,
            },
            "quantization": {
                "granularity": self.granularity,
                "keep": list(self.keep),
                "recover": None if self.recover is None else list(self.recover),
            },
            "evaluation": {"data": _written(self.evaluation)},
            "parity": {"metric": _written(self.metric), "max_drop": self.max_drop},
            "target": [{"name": t.name, "precision": t.precision, **t.options} for t in self.targets],
        }

    def as_toml(self, folder: Path) -> str:
        """The recipe as a file in `folder`, from which `read_recipe` makes an equal one.

        Relative paths lead from there to what they name from the current folder; absolute ones stay.
        """
        tables = self.as_json()
        unwritten = []
        for place, key in _KEYS.items():
            value = tables[place.table][place.key]
            if _is_from_python(value):
                unwritten.append(str(place))
            elif key.move and value is not None:
                tables[place.table][place.key] = key.move(value, partial(_from_folder, folder=folder))
        tables["target"] = [{k: v for k, v in t.items() if (k, v) != ("precision", "")} for t in tables["target"]]
        head = "# To run it again: qdeploy export --recipe FILE -o DIR. Relative paths begin at this file's folder.\n"
        if unwritten:
            head += f"# Was given from Python, and is to be given anew on the command line: {', '.join(unwritten)}.\n"
        return f"{head}\n{toml_text(_without_nothing(tables))}"


def _written(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return str(value) if isinstance(value, Path) else f"a {type(value).__name__}{FROM_PYTHON}"


def _is_from_python(value: Any) -> bool:
    return isinstance(value, str) and value.endswith(FROM_PYTHON)


def _from_folder(path: str, folder: Path) -> str:
    """What a path from the current folder is called in another one."""
    if Path(path).is_absolute():
        return path
    # Without symbolic links ".." leads where it says; the last part keeps its name, which the model is called by.
    target = Path(path).parent.resolve() / Path(path).name
    return Path(os.path.relpath(target, folder.resolve())).as_posix()


def _without_nothing(content: Any) -> Any:
    """TOML has no null: what is None is left out at any depth, and so are tables without content."""
    if isinstance(content, Mapping):
        kept = {key: _without_nothing(value) for key, value in content.items()}
        return {key: value for key, value in kept.items() if value not in (None, {})}
    return content


@dataclass(frozen=True)
class Given:
    """What a recipe file or a command line says, where None says nothing.

    The attributes are those of `Recipe`, but for these:

    Attributes:
        source: The model as a text.
        inputs: Of the model.
        dims: Ranges of the model's dynamic dimensions, by name.
        options: Further options of the targets, by their names.
    """

    source: str | None = None
    inputs: tuple[TensorSpec, ...] | None = None
    dims: Mapping[str, DimRange] | None = None
    targets: tuple[TargetRequest, ...] | None = None
    options: Mapping[str, Mapping[str, str]] | None = None
    states: Mapping[str, str] | None = None
    calibration: str | None = None
    statistics: Path | None = None
    evaluation: str | None = None
    preprocessing: AnyPreprocessing | None = None
    samples: int | None = None
    reader: str | None = None
    granularity: str | None = None
    keep: tuple[str, ...] | None = None
    recover: tuple[str, ...] | None = None
    metric: str | None = None
    max_drop: float | None = None


def merged(recipe: Given, command: Given) -> Recipe:
    """The recipe that a file and a command line make together: what the command line gives, counts.

    Its targets take the place of the file's; its options and dimensions that of those with the same names.

    Raises:
        InputError: There is no model, or what is given is wrong or does not go together.
    """
    if command.calibration is not None or command.statistics is not None:
        recipe = replace(recipe, calibration=None, statistics=None)
    given = {**_said(recipe), **_said(command)}
    _refuse_python_objects(given)
    if "source" not in given:
        raise InputError("There is no model.", "Name SOURCE, or --recipe FILE with a source under [model].")
    dims = {**(recipe.dims or {}), **given.pop("dims", {})}
    source = ModelSource.parse(given.pop("source"), given.pop("inputs", ()), dims)
    targets = with_options(given.pop("targets", ()), given.pop("options", {}))
    return Recipe(source, targets, **given)


def _said(given: Given) -> dict[str, Any]:
    return {f.name: value for f in fields(given) if (value := getattr(given, f.name)) is not None}


def _refuse_python_objects(given: Mapping[str, Any]) -> None:
    for place, key in _KEYS.items():
        if _is_from_python(value := given.get(key.attribute)):
            what = f"The recipe's {place} was {value}, which no file can hold."
            raise InputError(what, "Give it on the command line.")


def with_options(
    targets: Iterable[TargetRequest], options: Mapping[str, Mapping[str, str]]
) -> tuple[TargetRequest, ...]:
    """Targets with further options, by the targets' names; they count more than those that a target has.

    Raises:
        InputError: Options of a target that is not among them.
    """
    requests = tuple(replace(each, options={**each.options, **options.get(each.name, {})}) for each in targets)
    names = [each.name for each in requests]
    for name in options:
        if name not in names:
            what = f"Options are given for {name!r}, which is not a target of this run."
            raise InputError(what, suggestion(name, names))
    return requests


def read_recipe(path: Path) -> Given:
    """What a recipe file says. Relative paths in it begin at its folder.

    Raises:
        InputError: There is no such file, it is no TOML, or it has a table, a key or a value that a recipe has not.
    """
    try:
        with path.open("rb") as file:
            content = tomllib.load(file)
    except OSError as error:
        raise InputError(f"The recipe {path} cannot be read: {error.strerror}.", "Check the path.") from error
    except (ValueError, RecursionError) as error:  # ValueError is also that of text that is no UTF-8
        raise InputError(f"{path} is not valid TOML: {error}.", "Mend it there.") from error
    try:
        values = dict(_values(content, partial(_in_folder, folder=path.parent)))
    except InputError as error:
        raise InputError(f"{path}: {error.what}", error.cure) from error
    return Given(**values)


def _in_folder(path: str, folder: Path) -> str:
    """What a path from a folder is called in the current one."""
    if "\0" in path:
        raise InputError(f"The path {path!r} holds a null character.", "No path has one.")
    return str(folder / path)


_Move = Callable[[str], str]
"""What a path is called in another folder."""


def _values(content: Mapping[str, Any], move: _Move) -> Iterator[tuple[str, Any]]:
    """Attributes of `Given`, and their values."""
    keys = {table: [p.key for p in _KEYS if p.table == table] for table in (p.table for p in _KEYS)}
    for table, entries in content.items():
        if table == "target":
            yield "targets", tuple(map(_target, _checked(entries, _TABLES, "[[target]]")))
            continue
        if table not in keys:
            raise InputError(f"A recipe has no table {table!r}.", suggestion(table, [*keys, "target"]))
        for name, value in _checked(entries, _TABLE, f"[{table}]").items():
            if name not in keys[table]:
                raise InputError(f"[{table}] has no key {name!r}.", suggestion(name, keys[table]))
            place = _Place(table, name)
            yield _KEYS[place].attribute, _value(place, value, move)


def _value(place: _Place, value: Any, move: _Move) -> Any:
    key = _KEYS[place]
    _checked(value, key.kind, str(place))
    try:
        return key.read(key.move(value, move) if key.move and not _is_from_python(value) else value)
    except InputError as error:
        raise InputError(f"{place}: {error.what}", error.cure) from error


def _target(table: Mapping[str, Any]) -> TargetRequest:
    if "name" not in table:
        raise InputError("A [[target]] has no name.", 'Add one, for example name = "ort-cpu".')
    kinds = {"name": _TEXT, "precision": _TEXT}
    for key, value in table.items():
        _checked(value, kinds.get(key, _OPTION), f"[[target]] {key}")
    options = {key: option_text(value) for key, value in table.items() if key not in kinds}
    return TargetRequest(table["name"], table.get("precision", ""), options)


def _moved_callable(text: str, move: _Move) -> str:
    """`file.py:callable` with its path moved; a module or a metric has a name and no path."""
    path, _, name = text.rpartition(":")
    return f"{move(path)}:{name}" if path.endswith(".py") else text


def _moved_place(text: str, move: _Move) -> str:
    """SOURCE or DATA with its path moved."""
    return _moved_callable(text, move) if ":" in text else move(text)


def _moved_settings(settings: str | Mapping[str, Any], move: _Move) -> Mapping[str, Any]:
    """Settings with the path of a tokenizer moved, if they have one."""
    table = _preprocessing(settings).to_json() if isinstance(settings, str) else settings
    tokenizer = table.get("tokenizer")
    return {**table, "tokenizer": _moved_place(tokenizer, move)} if isinstance(tokenizer, str) else table


def _inputs(texts: list[str]) -> tuple[TensorSpec, ...]:
    return tuple(map(TensorSpec.parse, texts))


def _dims(table: Mapping[str, Any]) -> dict[str, DimRange]:
    """Ranges as "1:1:8" or [1, 1, 8]."""
    texts = {name: ":".join(map(str, value)) if isinstance(value, list) else value for name, value in table.items()}
    return dict(DimRange.parse(f"{name}={text}") for name, text in texts.items())


def _preprocessing(settings: str | Mapping[str, Any]) -> AnyPreprocessing:
    return parse_preprocessing(settings) if isinstance(settings, str) else preprocessing_from_json(settings)


def _steps(steps: str | list[str]) -> tuple[str, ...]:
    return tuple(steps.split(",") if isinstance(steps, str) else steps)


@dataclass(frozen=True)
class _Kind:
    """What a value may be: in words, how to write it, and as a question."""

    words: str
    cure: str
    fits: Callable[[Any], bool]


def _checked(value: Any, kind: _Kind, place: str) -> Any:
    if not kind.fits(value):
        raise InputError(f"{place} is {_in_words(value)}, {kind.words} is wanted.", kind.cure)
    return value


def _in_words(value: Any) -> str:
    if type(value) in (int, float):
        return "a number" if _is_number(value) else "no finite number"
    words = {bool: "true or false", str: "text", list: "a list", dict: "a table"}
    return words.get(type(value), "a date or a time")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)


def _is_option(value: Any) -> bool:
    single = (str, bool, int, float)
    return isinstance(value, single) or (isinstance(value, list) and all(isinstance(each, single) for each in value))


_TEXT = _Kind("text", "Write it in quotation marks.", _is_text)
_NUMBER = _Kind("a number", "Write it without quotation marks, for example 0.01.", _is_number)
_WHOLE = _Kind("a whole number", "Write it without quotation marks, for example 100.", lambda value: type(value) is int)
_TEXTS = _Kind("a list of texts", 'For example: ["first", "last"].', _are_texts)
_STEPS = _Kind(
    "a list of texts", 'For example: ["bias-correction"].', lambda value: _is_text(value) or _are_texts(value)
)
_SETTINGS = _Kind(
    "a table", "For example: {resize = 256, crop = 224}.", lambda value: _is_text(value) or _is_table(value)
)
_NAMES = _Kind(
    "a table of texts", 'For example: {h = "h_out"}.', lambda value: _is_table(value) and _are_texts([*value.values()])
)
_RANGES = _Kind("a table", "For example: {batch = [1, 1, 8]}.", _is_table)
_TABLE = _Kind("a table", "Write its name in brackets on a line of its own, and its keys below.", _is_table)
_TABLES = _Kind(
    "a list of tables",
    "Write [[target]] in double brackets above the keys of each target.",
    lambda value: isinstance(value, list) and all(map(_is_table, value)),
)
_OPTION = _Kind("text, a number, true or false, or a list of them", "See the target's options.", _is_option)


@dataclass(frozen=True)
class _Place:
    """Where a value stands in a recipe file."""

    table: str
    key: str

    def __str__(self) -> str:
        return f"[{self.table}] {self.key}"


@dataclass(frozen=True)
class _Key:
    """What stands in a place.

    Attributes:
        attribute: Of `Given`.
        kind: What may stand there.
        read: Makes the attribute's value of it.
        move: For what may hold a path: the same with its path moved.
    """

    attribute: str
    kind: _Kind
    read: Callable[[Any], Any] = str
    move: Callable[[Any, _Move], Any] | None = None


_KEYS: Mapping[_Place, _Key] = {
    _Place("model", "source"): _Key("source", _TEXT, move=_moved_place),
    _Place("model", "inputs"): _Key("inputs", _TEXTS, _inputs),
    _Place("model", "dims"): _Key("dims", _RANGES, _dims),
    _Place("model", "states"): _Key("states", _NAMES, dict),
    _Place("samples", "preprocessing"): _Key("preprocessing", _SETTINGS, preprocessing_from_json, _moved_settings),
    _Place("calibration", "data"): _Key("calibration", _TEXT, move=_moved_place),
    _Place("calibration", "statistics"): _Key("statistics", _TEXT, Path, lambda text, move: move(text)),
    _Place("calibration", "reader"): _Key("reader", _TEXT),
    _Place("calibration", "samples"): _Key("samples", _WHOLE, int),
    _Place("quantization", "granularity"): _Key("granularity", _TEXT),
    _Place("quantization", "keep"): _Key("keep", _TEXTS, tuple),
    _Place("quantization", "recover"): _Key("recover", _STEPS, _steps),
    _Place("evaluation", "data"): _Key("evaluation", _TEXT, move=_moved_place),
    _Place("parity", "metric"): _Key("metric", _TEXT, move=_moved_callable),
    _Place("parity", "max_drop"): _Key("max_drop", _NUMBER, float),
}
"""All that a recipe file may hold besides its targets, in the order in which it is written."""
