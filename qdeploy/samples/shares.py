"""A source's samples shared among several who each read it: share i of n has the samples i, i + n, i + 2n and so on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import TypeVar

from qdeploy.errors import InputError
from qdeploy.samples.source import Sample, SampleSource
from qdeploy.samples.warnings import sample_digest

Each = TypeVar("Each")


class Share:
    """The samples of one share, to be iterated once; no others are read where the source can pick.

    Attributes:
        seen: Digest of all samples that were read, in their order; empty where only the share's own were.
    """

    def __init__(self, source: SampleSource, index: int, count: int) -> None:
        self._source = source
        self._index = index
        self._count = count
        self.seen = ""

    def __iter__(self) -> Iterator[Sample]:
        pick, size = self._source.pick, self._source.size
        if pick is not None and size is not None:
            places = range(self._index, size, self._count)
            return pick(places) if places else iter(())
        return self._own()

    def _own(self) -> Iterator[Sample]:
        seen = hashlib.sha256()
        for position, sample in enumerate(self._source):
            seen.update(sample_digest(sample.inputs).encode())
            if position % self._count == self._index:
                yield sample
        self.seen = seen.hexdigest()


def require_same(seen: Iterable[str]) -> None:
    """Refuse shares whose readers have seen different samples."""
    if len(set(seen)) > 1:
        what = "The samples differ from pass to pass, so that they cannot be shared among workers."
        raise InputError(what, "Yield the same ones in the same order (seed what is random), or leave out --workers.")


def interleaved(shares: Sequence[Sequence[Each]]) -> Iterator[Each]:
    """What the shares' samples came to, in the samples' order."""
    missing = object()
    return (each for turn in zip_longest(*shares, fillvalue=missing) for each in turn if each is not missing)  # type: ignore[misc]
