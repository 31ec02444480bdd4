"""The first samples of a source, kept, so that who looks at a few does not begin a pass over slow ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from qdeploy.samples.source import Sample, SampleSource

SAMPLES = 64
BYTES = 64_000_000


def remembering(source: SampleSource) -> SampleSource:
    """The same samples, of which the first 64 (64 MB at most) are taken from the source once and kept."""
    return replace(source, stream=_Head(source).stream, pick=None)


class _Head:
    """What was kept of a source so far: copies, since a source may fill the same arrays again and again."""

    def __init__(self, source: SampleSource) -> None:
        self._source = source
        self._kept: list[Sample] = []
        self._whole = False

    def stream(self) -> Iterator[Sample]:
        position = 0
        while position < len(self._kept):  # it may grow meanwhile
            yield self._kept[position]
            position += 1
        if self._whole:
            return
        for sample in islice(self._source, position, None):
            if position == len(self._kept) < SAMPLES and sum(map(_size, (*self._kept, sample))) <= BYTES:
                self._kept.append(_copy(sample))
            position += 1
            yield sample
        self._whole = position == len(self._kept)


def _size(sample: Sample) -> int:
    return sum(array.nbytes for array in (*sample.inputs.values(), *sample.raw.values()))


def _copy(sample: Sample) -> Sample:
    inputs = {name: array.copy() for name, array in sample.inputs.items()}
    return replace(sample, inputs=inputs, labels=None if sample.labels is None else sample.labels.copy())
