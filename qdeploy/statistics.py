"""What one pass over the samples leaves behind: mergeable, exact where it can be, and of bounded size.

Histogram bins are float32 bit patterns cut short to sign, exponent and the six highest mantissa bits: 1.6 % wide
at every magnitude. No range is chosen beforehand and merging is addition. Sums are fixed-point integers, so that
merging is exact and its order does not matter.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.archive import require_modest
from qdeploy.errors import InputError, InternalError

BIN_SHIFT = 17
"""Low bits of a float32 pattern that a bin leaves out."""

BINS = 1 << (32 - BIN_SHIFT)
_HALF = BINS // 2
_FIRST_NON_FINITE = 0x7F800000 >> BIN_SHIFT

LIMBS = 5
LIMB_BITS = 48
LOWEST_LIMB_EXPONENT = -60
"""A fixed-point sum is Σ limbs[k] · 2^(48·k − 60): steps of 1e-18, up to 2^195, beyond any sum of float32 values."""

FORMAT = 1

_DAMAGE = (OSError, EOFError, ValueError, KeyError, TypeError, IndexError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What numpy, zipfile and zlib raise over damaged bytes; RuntimeError is for a flag that says encrypted or unknown."""


def keys_of(values: NDArray[np.float32]) -> NDArray[np.int32]:
    """Integers in the same order as the floats: −NaN < −Inf < … < −0 < 0 < … < Inf < NaN. Its own inverse on bits."""
    bits = values.view(np.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def values_of(keys: NDArray[np.int32]) -> NDArray[np.float32]:
    """The floats that keys stand for."""
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).view(np.float32)


def fixed_point(x: NDArray[np.float64]) -> NDArray[np.int64]:
    """Real numbers as limbs, shape x.shape + (5,), truncated towards zero.

    Each limb but the highest is below 2^48 in magnitude, and all have the number's sign.
    """
    limbs = np.empty((*x.shape, LIMBS), np.int64)
    rest = np.asarray(x, np.float64)
    for k in reversed(range(LIMBS)):
        unit = 2.0 ** (LIMB_BITS * k + LOWEST_LIMB_EXPONENT)
        whole = np.trunc(rest / unit)
        limbs[..., k] = whole
        rest = rest - whole * unit
    return limbs


def carry(limbs: NDArray[np.int64]) -> NDArray[np.int64]:
    """The same sums in canonical form: every limb but the highest within [0, 2^48), so that equal sums are equal."""
    result = limbs.copy()
    for k in range(LIMBS - 1):
        overflow = result[..., k] >> LIMB_BITS
        result[..., k] -= overflow << LIMB_BITS
        result[..., k + 1] += overflow
    return result


def real(limbs: NDArray[np.int64]) -> NDArray[np.float64]:
    """Limbs as real numbers, to within a rounding error of float64."""
    total = np.zeros(limbs.shape[:-1])
    # From the highest limb down: a negative sum has −1 there and large limbs below, which must cancel exactly.
    for k in reversed(range(LIMBS)):
        total = total + limbs[..., k] * 2.0 ** (LIMB_BITS * k + LOWEST_LIMB_EXPONENT)
    return np.asarray(total)


@dataclass(frozen=True)
class Bins:
    """The occupied part of a histogram, from the lowest values to the highest.

    Attributes:
        low: Lower edges, shape [n].
        high: Upper edges, shape [n]; a bin's values are taken as evenly spread between its edges.
        count: Values in each bin, shape [n].
    """

    low: NDArray[np.float64]
    high: NDArray[np.float64]
    count: NDArray[np.int64]


@dataclass(frozen=True)
class TensorStatistics:
    """What is known of one tensor's values over all samples. C is the number of channels, 1 without a channel axis.

    Attributes:
        name: The tensor's name in the graph.
        channel_axis: Which axis the per-channel figures follow (negative counts from the end), or None.
        histogram: Values in each bit-pattern bin, int64 [32768]; NaN and ±Inf are not in it.
        non_finite: How many values were NaN or ±Inf.
        channel_minimum: Exact smallest value, float32 [C]; +inf where a channel held no finite value.
        channel_maximum: Exact largest value, float32 [C]; −inf where a channel held no finite value.
        channel_count: Finite values, int64 [C].
        channel_sum: Fixed-point sum of the finite values, int64 [C, 5], canonical.
    """

    name: str
    channel_axis: int | None
    histogram: NDArray[np.int64]
    non_finite: int
    channel_minimum: NDArray[np.float32]
    channel_maximum: NDArray[np.float32]
    channel_count: NDArray[np.int64]
    channel_sum: NDArray[np.int64]

    @property
    def count(self) -> int:
        """Finite values seen."""
        return int(self.channel_count.sum())

    @property
    def minimum(self) -> float:
        """Exact smallest finite value; 0 for a tensor that held none."""
        return float(self.channel_minimum.min()) if self.count else 0.0

    @property
    def maximum(self) -> float:
        """Exact largest finite value; 0 for a tensor that held none."""
        return float(self.channel_maximum.max()) if self.count else 0.0

    @property
    def channel_mean(self) -> NDArray[np.float64]:
        """Mean of the finite values, float64 [C]; 0 where a channel held none."""
        return real(self.channel_sum) / np.maximum(self.channel_count, 1)

    @cached_property
    def bins(self) -> Bins:
        """The occupied bins in ascending order, the outermost cut at the exact minimum and maximum."""
        patterns = np.arange(_FIRST_NON_FINITE + 1, dtype=np.uint32) << BIN_SHIFT
        magnitude_edges = patterns.view(np.float32).astype(np.float64)
        negative = np.flatnonzero(self.histogram[_HALF:])[::-1]
        positive = np.flatnonzero(self.histogram[:_HALF])
        low = np.concatenate([-magnitude_edges[negative + 1], magnitude_edges[positive]])
        high = np.concatenate([-magnitude_edges[negative], magnitude_edges[positive + 1]])
        count = np.concatenate([self.histogram[_HALF + negative], self.histogram[positive]])
        return Bins(np.clip(low, self.minimum, self.maximum), np.clip(high, self.minimum, self.maximum), count)

    def merge(self, other: TensorStatistics) -> TensorStatistics:
        """The statistics of both sets of samples together. Commutative, associative and exact."""
        if (self.name, self.channel_axis, self.channel_count.size) != (
            other.name,
            other.channel_axis,
            other.channel_count.size,
        ):
            message = f"statistics of different tensors cannot be merged: {self.name!r} and {other.name!r}"
            raise InternalError(message)
        return TensorStatistics(
            self.name,
            self.channel_axis,
            self.histogram + other.histogram,
            self.non_finite + other.non_finite,
            values_of(np.minimum(keys_of(self.channel_minimum), keys_of(other.channel_minimum))),
            values_of(np.maximum(keys_of(self.channel_maximum), keys_of(other.channel_maximum))),
            self.channel_count + other.channel_count,
            carry(self.channel_sum + other.channel_sum),
        )


@dataclass(frozen=True)
class Statistics:
    """The statistics of every observed tensor of one model.

    Attributes:
        model_digest: Of the prepared FloatModel they were collected on.
        sample_digests: One for each sample, sorted: the order of samples does not matter, their number does.
        tensors: By tensor name.
        notes: Warnings about the samples, for the report.
    """

    model_digest: str
    sample_digests: tuple[str, ...]
    tensors: Mapping[str, TensorStatistics]
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def samples(self) -> int:
        """How many samples were seen."""
        return len(self.sample_digests)

    @property
    def samples_digest(self) -> str:
        """One digest of the whole set of samples."""
        return hashlib.sha256("".join(self.sample_digests).encode()).hexdigest()

    def require_model(self, digest: str) -> None:
        """Refuse to be used with another model than they were collected on."""
        if self.model_digest != digest:
            digests = f"digest {self.model_digest[:12]}…, not {digest[:12]}…"
            what = f"These statistics were collected on another model ({digests})."
            raise InputError(what, "Collect them anew: qdeploy calibrate SOURCE --calibration DATA -o STATS.")

    def merge(self, other: Statistics) -> Statistics:
        """The statistics of both sets of samples together, in either order.

        Raises:
            InputError: They belong to different models.
        """
        other.require_model(self.model_digest)
        tensors = {name: tensor.merge(other.tensors[name]) for name, tensor in self.tensors.items()}
        digests = tuple(sorted(self.sample_digests + other.sample_digests))
        return Statistics(self.model_digest, digests, tensors, tuple(sorted({*self.notes, *other.notes})))

    def save(self, path: Path) -> None:
        """Write an .npz file without pickles; only occupied bins are stored."""
        tensors = list(self.tensors.values())
        occupied = [np.flatnonzero(tensor.histogram).astype(np.uint16) for tensor in tensors]
        header = {
            "format": FORMAT,
            "model_digest": self.model_digest,
            "sample_digests": self.sample_digests,
            "notes": self.notes,
            "tensors": [
                {
                    "name": tensor.name,
                    "channel_axis": tensor.channel_axis,
                    "non_finite": tensor.non_finite,
                    "channels": tensor.channel_count.size,
                    "bins": bins.size,
                }
                for tensor, bins in zip(tensors, occupied, strict=True)
            ],
        }
        arrays: dict[str, NDArray[Any]] = {
            "header": np.frombuffer(json.dumps(header).encode(), np.uint8),
            "bin_index": _joined(occupied, np.uint16),
            "bin_count": _joined([t.histogram[b] for t, b in zip(tensors, occupied, strict=True)], np.int64),
            "channel_minimum": _joined([t.channel_minimum for t in tensors], np.float32),
            "channel_maximum": _joined([t.channel_maximum for t in tensors], np.float32),
            "channel_count": _joined([t.channel_count for t in tensors], np.int64),
            "channel_sum": _joined([t.channel_sum for t in tensors], np.int64, LIMBS),
        }
        with path.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Read what `save` wrote.

        Raises:
            InputError: The file is missing, damaged, or not a statistics file.
        """
        try:
            # Opened here, since numpy leaves a damaged file open.
            with path.open("rb") as file, np.load(file, allow_pickle=False) as members:
                require_modest(members.zip, path.stat().st_size)
                arrays = {name: members[name] for name in members.files}
            return _from_arrays(arrays)
        except FileNotFoundError as error:
            raise InputError(f"There is no statistics file {path}.", "Make one with qdeploy calibrate.") from error
        except _DAMAGE as error:
            what = f"{path} is not a statistics file of this version, or is damaged ({error})."
            raise InputError(what, "Make it anew with qdeploy calibrate.") from error


def _joined(parts: list[NDArray[Any]], dtype: type, *trailing: int) -> NDArray[Any]:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros((0, *trailing), dtype)


def _from_arrays(arrays: Mapping[str, NDArray[Any]]) -> Statistics:
    header = json.loads(arrays["header"].tobytes())
    if header["format"] != FORMAT:
        message = f"format {header['format']}, expected {FORMAT}"
        raise ValueError(message)
    tensors = {}
    bin_start = channel_start = 0
    for entry in header["tensors"]:
        bins = slice(bin_start, bin_start := bin_start + int(entry["bins"]))
        channels = slice(channel_start, channel_start := channel_start + int(entry["channels"]))
        histogram = np.zeros(BINS, np.int64)
        histogram[arrays["bin_index"][bins]] = arrays["bin_count"][bins]
        tensors[str(entry["name"])] = TensorStatistics(
            str(entry["name"]),
            entry["channel_axis"],
            histogram,
            int(entry["non_finite"]),
            arrays["channel_minimum"][channels],
            arrays["channel_maximum"][channels],
            arrays["channel_count"][channels],
            arrays["channel_sum"].reshape(-1, LIMBS)[channels],
        )
    return Statistics(header["model_digest"], tuple(header["sample_digests"]), tensors, tuple(header["notes"]))
