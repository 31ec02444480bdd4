"""How a text becomes model inputs: the tokenizer, and what it is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from qdeploy.errors import InputError, UnavailableError
from qdeploy.registry import suggestion
from qdeploy.samples.callables import UserCallable, load_callable
from qdeploy.samples.settings import Conversions, converted, key_values, whole

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EXAMPLE = "tokenizer=tokenizer.json max_length=128"
PAIRS = ["together", "apart"]
PAD_TOKENS = ("[PAD]", "<pad>")

Encode = Callable[..., Mapping[str, NDArray[Any]]]
"""Takes one text, or two to be encoded together; gives arrays by input name, batch included."""


@dataclass(frozen=True)
class Tokenization:
    """What is done to texts, so that they become model inputs of a batch of one.

    Attributes:
        tokenizer: A tokenizer.json, a folder that holds one, or `file.py:callable`, which returns a tokenizer: a
            function of one text, or of two, that gives a mapping from input name to token numbers.
        max_length: Most tokens of an input, special ones included; None for the limit in the tokenizer's own file.
        pad: Whether to fill every input up to `max_length`; otherwise each text has its own length.
        pairs: What becomes of two texts in a row: "together" gives one input of both, as cross-encoders take it;
            "apart" gives two samples, one after the other, as embedding models take them.
        columns: The text columns of a .csv file with a header, one or two; empty to find them.
    """

    shaping: ClassVar[str] = "max_length, pad"

    tokenizer: str
    max_length: int | None = None
    pad: bool = False
    pairs: Literal["together", "apart"] = "together"
    columns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.pairs not in PAIRS:
            raise InputError(f"The tokenization's pairs cannot be {self.pairs!r}.", suggestion(self.pairs, PAIRS))
        if self.max_length is not None and self.max_length < 1:
            raise InputError(f"The tokenization's max_length is {self.max_length}.", "Give at least 1.")
        if self.pad and self.max_length is None:
            raise InputError("Texts are to be padded, and no length says how far.", "Give max_length.")
        if len(self.columns) > 2:
            what = f"The tokenization names {len(self.columns)} text columns: {', '.join(self.columns)}."
            raise InputError(what, "Give one, or two for pairs.")

    @classmethod
    def parse(cls, text: str) -> Tokenization:
        """From `key=value` words, for example "tokenizer=tokenizer.json max_length=128 pairs=apart".

        Raises:
            InputError: A word without "=", an unknown key, or a value that does not fit.
        """
        return cls.from_json(key_values(text, EXAMPLE))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Tokenization:
        """From what `to_json` gave, or the same settings as a table of a recipe; those left out keep their defaults.

        Raises:
            InputError: An unknown key, no tokenizer, or a value that does not fit.
        """
        if values.get("tokenizer") is None:
            raise InputError("The tokenization names no tokenizer.", f"For example: {EXAMPLE}")
        return cls(**converted("tokenization", values, _CONVERSIONS, EXAMPLE))

    def to_json(self) -> dict[str, Any]:
        """All settings as plain JSON values, from which `from_json` makes an equal object."""
        return {**asdict(self), "columns": list(self.columns)}

    def encoder(self) -> Encode:
        """The tokenizer, ready to encode.

        Raises:
            InputError: There is no such tokenizer, it cannot be read, or it does not suit the settings.
            UnavailableError: The package tokenizers is not installed.
        """
        path = Path(self.tokenizer)
        if path.is_dir():
            path /= "tokenizer.json"
        if path.suffix == ".json":
            return partial(_encode, _read(path, self), self)
        if ":" in self.tokenizer:
            return partial(_encode_by_callable, _own_tokenizer(self))
        what = f"There is no tokenizer {self.tokenizer}."
        if path.is_file():
            what = f"The file {self.tokenizer} is no tokenizer.json."
        cure = "Give a tokenizer.json, a folder that holds one (save_pretrained writes it), or file.py:callable; "
        raise InputError(what, f"{cure}nothing is downloaded.")


def _truth(value: Any) -> bool:
    return {"true": True, "false": False}[str(value).lower()]


def _names(value: Any) -> tuple[str, ...]:
    return tuple(value.split(",") if isinstance(value, str) else map(str, value))


_CONVERSIONS: Conversions = {
    "tokenizer": str,
    "max_length": whole,
    "pad": _truth,
    "pairs": str,
    "columns": _names,
}


def _read(path: Path, tokenization: Tokenization) -> Tokenizer:
    """A tokenizer from its file. Padding that the file asks for is left out, unless the settings ask for it, too."""
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise UnavailableError("tokenizers is not installed.", "Install it: pip install 'qdeploy[text]'") from error
    if not path.is_file():
        cure = "Give a tokenizer.json, or a folder that holds one: tokenizer.save_pretrained(FOLDER) writes it."
        raise InputError(f"There is no file {path}.", cure)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises no narrower class
        raise InputError(f"The tokenizer {path} cannot be read: {error}.", "Write it with save_pretrained.") from error
    if tokenization.max_length is not None:
        tokenizer.enable_truncation(tokenization.max_length)
    if tokenization.pad:
        tokenizer.enable_padding(**_padding(tokenizer, path), length=tokenization.max_length)
    else:
        tokenizer.no_padding()
    return tokenizer


def _padding(tokenizer: Tokenizer, path: Path) -> dict[str, Any]:
    """The token to pad with and the side to pad on: as the tokenizer's file has it, or the customary token."""
    own = tokenizer.padding
    if own is not None:
        return {key: own[key] for key in ("direction", "pad_id", "pad_token", "pad_type_id")}
    for token in PAD_TOKENS:
        number = tokenizer.token_to_id(token)
        if number is not None:
            return {"pad_id": number, "pad_token": token}
    what = f"The tokenizer {path} says nothing of padding, and has none of the tokens {', '.join(PAD_TOKENS)}."
    raise InputError(what, "Leave out pad.")


def _encode(
    tokenizer: Tokenizer, tokenization: Tokenization, text: str, second: str | None = None
) -> dict[str, NDArray[Any]]:
    encoding = tokenizer.encode(text, second)
    length, limit = len(encoding.ids), tokenization.max_length
    if limit is not None and length > limit:  # so short that the package cannot cut to it
        what = f"A max_length of {limit} leaves no room for text beside the tokenizer's special tokens."
        raise InputError(what, "Give more.")
    columns = {
        "input_ids": encoding.ids,
        "attention_mask": encoding.attention_mask,
        "token_type_ids": encoding.type_ids,
    }
    return {name: np.array([column], np.int64) for name, column in columns.items()}


def _own_tokenizer(tokenization: Tokenization) -> UserCallable:
    if tokenization.max_length is not None or tokenization.pad:
        what = f"The tokenizer {tokenization.tokenizer} is your own code; max_length and pad have no hold on it."
        raise InputError(what, "Cut and pad there.")
    maker = load_callable(tokenization.tokenizer)
    made = maker()
    if not callable(made):
        what = f"{maker.name} returned a {type(made).__name__}, which is no tokenizer."
        raise InputError(what, "Return a callable that takes a text, and gives a mapping from input name to numbers.")
    return UserCallable(maker.name, made, maker.folder)


def _encode_by_callable(tokenizer: UserCallable, *texts: str) -> dict[str, NDArray[Any]]:
    given = tokenizer(*texts)
    if not isinstance(given, Mapping):
        what = f"The tokenizer {tokenizer.name} gave a {type(given).__name__}."
        raise InputError(what, "It must give a mapping from input name to token numbers.")
    arrays = {}
    for name, value in given.items():
        array = np.asarray(value)
        if array.dtype.kind not in "iufb":
            raise InputError(f"The tokenizer {tokenizer.name} gave no numbers for {name!r}.", "Give lists or arrays.")
        arrays[name] = array[np.newaxis] if array.ndim == 1 else array
    return arrays
