"""The files of an .mlpackage: which is the model, and how constants lie in its weights file."""

from __future__ import annotations

import json
import logging
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.backends.coreml.interpreter.values import BITS
from qdeploy.errors import InputError, UnavailableError

STORED = {
    "fp16": (1, "<f2"),
    "fp32": (2, "<f4"),
    "bool": (3, "|b1"),
    "int4": (8, "|u1"),
    "int8": (4, "|i1"),
    "int16": (6, "<i2"),
    "int32": (14, "<i4"),
    "uint1": (9, "|u1"),
    "uint2": (10, "|u1"),
    "uint3": (12, "|u1"),
    "uint4": (11, "|u1"),
    "uint6": (13, "|u1"),
    "uint8": (3, "|u1"),
    "uint16": (7, "<u2"),
    "uint32": (15, "<u4"),
}
"""Element type → its number in a weights file, and the numpy dtype of its bytes."""

_BLOB = struct.Struct("<IIQQ")
_SENTINEL = 0xDEADBEEF
_COPY = "Copy or convert the model again."


@dataclass(frozen=True)
class Package:
    """An .mlpackage on disk.

    Attributes:
        path: The folder.
        model: Its model file.
    """

    path: Path
    model: Path

    @classmethod
    def find(cls, path: Path) -> Package:
        """Look up the model file in the manifest.

        Raises:
            InputError: The folder is no .mlpackage, or files are missing.
        """
        manifest = path / "Manifest.json"
        if not manifest.is_file():
            raise InputError(f"{path} is not an .mlpackage: it has no Manifest.json.", _COPY)
        try:
            content = json.loads(manifest.read_text())
            model = path / "Data" / content["itemInfoEntries"][content["rootModelIdentifier"]]["path"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{manifest} does not name a model: {error!r}.", _COPY) from error
        if not model.is_file():
            raise InputError(f"{path.name} lacks its model file {model.name}.", _COPY)
        return cls(path, model)

    def read_model(self) -> Any:
        """The model as the protobuf message `Model`.

        Raises:
            UnavailableError: coremltools, which defines the message, is not installed.
            InputError: The file is damaged.
        """
        logging.getLogger("coremltools").setLevel(logging.ERROR)  # it warns of what only converting and a Mac need
        try:
            from coremltools.proto.Model_pb2 import Model  # type: ignore[import-untyped,unused-ignore]
            from google.protobuf.message import DecodeError
        except ModuleNotFoundError as error:
            raise UnavailableError(
                "coremltools is not installed.", "Install it: pip install 'qdeploy[coreml]'"
            ) from error
        try:
            return Model.FromString(self.model.read_bytes())
        except DecodeError as error:
            raise InputError(f"{self.path.name}/{self.model.name} is damaged: {error}.", _COPY) from error

    def read_blob(self, file_name: str, offset: int, dtype: str) -> bytes:
        """The bytes of one constant in a weights file.

        At `offset` stand a sentinel, the number of the element type, the size in bytes and where the data begin (32,
        32, 64 and 64 bits, little endian).

        Raises:
            InputError: The file is missing or cut short, or holds something else there.
        """
        path = self.model.parent / file_name.removeprefix("@model_path/")
        if not path.resolve().is_relative_to(self.path.resolve()):
            raise InputError(f"{self.path.name} keeps weights outside itself, in {file_name}.", _COPY)
        if not path.is_file():
            raise InputError(f"{self.path.name} lacks its weights file {path.name}.", _COPY)
        with path.open("rb") as file:
            file.seek(offset)
            header = file.read(_BLOB.size)
            if len(header) < _BLOB.size:
                raise InputError(f"{self.path.name}/{path.name} is cut short: it ends before byte {offset}.", _COPY)
            sentinel, number, size, begin = _BLOB.unpack(header)
            if sentinel != _SENTINEL or number != STORED[dtype][0]:
                raise InputError(f"{self.path.name}/{path.name} holds no {dtype} constant at byte {offset}.", _COPY)
            file.seek(begin)
            data = file.read(size)
        if len(data) < size:
            raise InputError(f"{self.path.name}/{path.name} is cut short: it ends before byte {begin + size}.", _COPY)
        return data


def decode(data: bytes, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Bytes as an array; integers of fewer than eight bits become one byte each."""
    raw = np.frombuffer(data, STORED[dtype][1])
    count = int(np.prod(shape))
    if BITS[dtype] >= 8:
        return raw.reshape(shape)
    values = unpack(raw, BITS[dtype], count).reshape(shape)
    return ((values ^ 8).astype(np.int8) - 8).astype(np.int8) if dtype == "int4" else values  # two's complement


def unpack(data: NDArray[Any], bits: int, count: int) -> NDArray[np.uint8]:
    """The first `count` unsigned integers of a bit stream that fills each byte from its lowest bit on."""
    stream = np.unpackbits(data.view(np.uint8), bitorder="little")[: count * bits].reshape(count, bits)
    return np.packbits(stream, axis=1, bitorder="little")[:, 0]
