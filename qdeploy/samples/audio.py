"""Samples from a folder of .wav files, cut into windows."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
from numpy.typing import NDArray

from qdeploy.errors import InputError
from qdeploy.samples.folders import SampleFolder, open_folder
from qdeploy.samples.settings import Conversions, converted, key_values, whole
from qdeploy.samples.source import Sample, SampleSource, evenly_spaced, how_many

SUFFIXES = (".wav",)
EXAMPLE = "rate=16000 length=16000 hop=8000"
EXTENSIBLE = 0xFFFE
"""A format tag that points to another one, further down in the same chunk."""

ENCODINGS: Mapping[tuple[int, int], tuple[np.dtype[Any], float]] = {
    (1, 16): (np.dtype("<i2"), 2**-15),
    (3, 32): (np.dtype("<f4"), 1.0),
}
"""Format tag and bits of a value → how it is stored, and the factor that brings it to −1 … 1."""


@dataclass(frozen=True, kw_only=True)
class Windows:
    """How audio becomes model inputs: windows of equal length, float32 in −1 … 1, a batch of one.

    A window that the end of a file would cut short is left out; a file shorter than one window is filled with silence.

    Attributes:
        rate: Values a second that the files must have; they are not resampled.
        length: Values in a window.
        hop: Values from the start of one window to that of the next; None for `length`, so that they do not overlap.
    """

    shaping: ClassVar[str] = "length"

    rate: int
    length: int
    hop: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("rate", self.rate), ("length", self.length), ("hop", self.hop)):
            if value is not None and value < 1:
                raise InputError(f"The windowing's {name} is {value}.", "Give at least 1.")

    @classmethod
    def parse(cls, text: str) -> Windows:
        """From `key=value` words, for example "rate=16000 length=16000 hop=8000".

        Raises:
            InputError: A word without "=", an unknown key, or a value that does not fit.
        """
        return cls.from_json(key_values(text, EXAMPLE))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Windows:
        """From what `to_json` gave, or the same settings as a table of a recipe.

        Raises:
            InputError: An unknown key, no rate or length, or a value that does not fit.
        """
        for name in ("rate", "length"):
            if values.get(name) is None:
                raise InputError(f"The windowing has no {name}.", f"For example: {EXAMPLE}")
        return cls(**converted("windowing", values, _CONVERSIONS, EXAMPLE))

    def to_json(self) -> dict[str, Any]:
        """All settings as plain JSON values, from which `from_json` makes an equal object."""
        return asdict(self)

    def starts(self, frames: int) -> range:
        """Where the windows begin in a file of so many frames; at least one does."""
        return range(0, max(frames - self.length, 0) + 1, self.hop or self.length)


_CONVERSIONS: Conversions = {"rate": whole, "length": whole, "hop": whole}


@dataclass(frozen=True)
class _Wave:
    """The header of a .wav file.

    Attributes:
        file: Relative to the folder.
        offset: Bytes before the first frame.
        frames: How many there are; one holds a value a channel.
        channels: Values in a frame.
        encoding: A key of ENCODINGS.
    """

    file: Path
    offset: int
    frames: int
    channels: int
    encoding: tuple[int, int]


def open_audio(
    folder: Path, input_names: tuple[str, ...], ranks: Mapping[str, int], windows: Windows | None, limit: int | None
) -> SampleSource:
    """The windows of the .wav files of a folder and its sub-folders, sorted by path; under a limit, evenly spaced ones.

    A window has shape [1, length], or [1, channels, length] if the input has three dimensions or there are channels.

    Raises:
        InputError: No .wav file, no windows, a file of another rate or encoding, or a model with several inputs.
    """
    clips = open_folder(folder, SUFFIXES)
    if not clips.files:
        raise InputError(f"The folder {folder} holds no audio.", "Audio ends in .wav.")
    if len(input_names) != 1:
        what = f"The folder {folder} holds audio, and the model has the inputs {', '.join(input_names)}."
        raise InputError(what, "Yield all of them from a callable: file.py:callable.")
    if windows is None:
        what = f"The folder {folder} holds audio, and nothing says how it is cut into the model's inputs."
        raise InputError(what, f"Give --preprocess, or preprocessing in the recipe, for example: {EXAMPLE}")
    waves = [_read_header(folder, file, windows.rate) for file in clips.files]
    places = [(wave, start) for wave in waves for start in windows.starts(wave.frames)]
    picked = [(position, *places[i]) for position, i in enumerate(evenly_spaced(len(places), limit))]
    read = partial(_stream, clips, input_names[0], ranks.get(input_names[0]), windows.length)
    count = how_many(len(picked), len(places), "windows")
    return SampleSource(
        description=f"audio in {clips.name} ({count} of {clips.contents(len(clips.files))})",
        stream=partial(read, picked),
        pick=lambda part: read([picked[i] for i in part]),
        size=len(picked),
        preprocessing=windows,
        class_names=clips.classes,
    )


def _stream(
    clips: SampleFolder, input_name: str, rank: int | None, length: int, places: Sequence[tuple[int, _Wave, int]]
) -> Iterator[Sample]:
    for position, wave, start in places:
        stored = _stored(clips.path, wave, start, length)
        kind, factor = ENCODINGS[wave.encoding]
        values = stored.view(kind).reshape(-1, wave.channels).T.astype(np.float32) * np.float32(factor)
        values = np.pad(values, ((0, 0), (0, length - values.shape[1])))
        window = values[np.newaxis] if rank == 3 or wave.channels > 1 else values
        origin = clips.origin(position, wave.file)
        yield Sample({input_name: np.ascontiguousarray(window)}, clips.label(wave.file), origin, {input_name: stored})


def _stored(folder: Path, wave: _Wave, start: int, length: int) -> NDArray[np.uint8]:
    """The bytes of a window as they stand in the file; fewer if the file is shorter."""
    frame = wave.channels * ENCODINGS[wave.encoding][0].itemsize
    size = min(length, wave.frames - start) * frame
    stored = np.fromfile(folder / wave.file, np.uint8, size, offset=wave.offset + start * frame)
    if stored.size < size:
        raise InputError(f"The file {folder / wave.file} was cut short meanwhile.", "Mend or remove it.")
    return stored


def _read_header(folder: Path, file: Path, rate: int) -> _Wave:
    path = folder / file
    try:
        with path.open("rb") as stream:
            encoding, channels, own_rate, size = _format(stream)
            offset = stream.tell()
            complete = stream.seek(0, 2) >= offset + size
    except (OSError, ValueError, struct.error) as error:
        raise InputError(f"The file {path} is no .wav file, or is damaged: {error}.", "Mend or remove it.") from error
    if encoding not in ENCODINGS:
        what = f"The file {path} is encoded in a way that is not read (format {encoding[0]}, {encoding[1]} bits)."
        raise InputError(what, f"Convert it: ffmpeg -i {path.name} -c:a pcm_s16le converted.wav")
    if own_rate != rate:
        what = f"The file {path} has {own_rate} values a second; the windows are for {rate}."
        raise InputError(what, f"Resample it: ffmpeg -i {path.name} -ar {rate} resampled.wav")
    frames = size // (channels * ENCODINGS[encoding][0].itemsize)
    if not complete or not frames:
        raise InputError(f"The file {path} {'ends early' if not complete else 'is empty'}.", "Mend or remove it.")
    return _Wave(file, offset, frames, channels, encoding)


def _format(stream: BinaryIO) -> tuple[tuple[int, int], int, int, int]:
    """Encoding, channels, rate, and bytes of data of a .wav file, which is left at its first frame.

    A RIFF file is a row of chunks: four letters, the length of the body, and the body, filled up to an even length.
    """
    riff, _, kind = struct.unpack("<4sI4s", stream.read(12))
    if (riff, kind) != (b"RIFF", b"WAVE"):
        raise ValueError("it does not begin as one")
    encoding, channels, rate = (0, 0), 0, 0
    while True:
        name, size = struct.unpack("<4sI", stream.read(8))
        if name == b"data" and channels:
            return encoding, channels, rate, size
        body = stream.read(size + size % 2) if name == b"fmt " else b""
        if body:
            tag, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", body)
            encoding = (struct.unpack_from("<H", body, 24)[0] if tag == EXTENSIBLE else tag, bits)
        else:
            stream.seek(size + size % 2, 1)
