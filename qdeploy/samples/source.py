"""The values of this room: a sample, and a source that streams samples as often as it is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Protocol

from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Sample:
    """One set of model inputs.

    Attributes:
        inputs: Whole model inputs by name, batch included.
        labels: One entry for each item of the batch, or None.
        origin: Where it came from, as messages say it: "sample 3 (photos/cat/1.jpg)".
        raw: What preprocessing made the inputs from, by input name, as bytes in uint8; else empty. Of an image its
            file, of text a JSON list of the texts (under the first input), of audio the window as stored.
    """

    inputs: Mapping[str, NDArray[Any]]
    labels: NDArray[Any] | None = None
    origin: str = "a sample"
    raw: Mapping[str, NDArray[Any]] = field(default_factory=dict)


class RawForm(Protocol):
    """What makes model inputs from images, texts or audio: `Preprocessing`, `Tokenization` or `Windows`."""

    shaping: ClassVar[str]
    """The settings that decide the shape of the inputs, as messages list them."""

    def to_json(self) -> dict[str, Any]:
        """All settings as plain JSON values."""


@dataclass(frozen=True, eq=False)
class SampleSource:
    """Samples, streamed anew on each iteration and never held in memory together.

    Attributes:
        description: For reports: "images in photos/ (200 files)"; never an absolute path.
        stream: Begins a pass over the samples.
        size: How many samples a pass yields, or None when only a pass can tell.
        preprocessing: What is done to raw files, or None if they are taken as they are.
        class_names: The class sub-folders of a folder of samples, sorted; otherwise empty.
        pick: Streams the samples at these places and reads no others; None where the others must be read, too.
    """

    description: str
    stream: Callable[[], Iterator[Sample]]
    size: int | None = None
    preprocessing: RawForm | None = None
    class_names: tuple[str, ...] = ()
    pick: Callable[[Sequence[int]], Iterator[Sample]] | None = None

    def __iter__(self) -> Iterator[Sample]:
        return self.stream()


def half(source: SampleSource, which: int) -> SampleSource:
    """The first or the second half (0 or 1) of a source's samples, which take turns of two: pairs stay together."""
    places = None if source.size is None else [index for index in range(source.size) if _is_in_half(index, which)]
    pick = source.pick
    return replace(
        source,
        stream=partial(_half, source, which),
        size=None if places is None else len(places),
        description=f"{source.description}, every other two from {'the first' if which == 0 else 'the third'} on",
        pick=None if pick is None or places is None else lambda part: pick([places[i] for i in part]),
    )


def _half(source: SampleSource, which: int) -> Iterator[Sample]:
    return (sample for index, sample in enumerate(source) if _is_in_half(index, which))


def _is_in_half(index: int, which: int) -> bool:
    return index // 2 % 2 == which


def evenly_spaced(count: int, limit: int | None) -> Sequence[int]:
    """At most `limit` ascending positions spread evenly over `count`, so that data sorted by class stay diverse."""
    if limit is None or limit >= count:
        return range(count)
    return [i * count // limit for i in range(limit)]


def how_many(picked: int, count: int, unit: str) -> str:
    """The size of a source for its description: "200 files", or "200 of 5,000 files" under a limit."""
    return f"{count:,} {unit}" if picked == count else f"{picked:,} of {count:,} {unit}"


def native(array: NDArray[Any]) -> NDArray[Any]:
    """The array in this machine's byte order, which runtimes take for granted."""
    return array.astype(array.dtype.newbyteorder("="), copy=False)
