"""A calibration reader for each tensor: the one whose range of that tensor alone costs the output least.

Readers weigh a tensor by its own values, and know nothing of what they are for. Here every layer is stored alone under
each reader's ranges, and what that does to the network's output, measured on a few samples, decides. A tensor that
several layers read takes the reader with the least noise of all of them together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from qdeploy import graph as questions
from qdeploy.affine import Affine, Range
from qdeploy.analysis.operands import layers_of
from qdeploy.analysis.sensitivity import sensitivity
from qdeploy.errors import InputError
from qdeploy.plan import QuantPlan, plan
from qdeploy.reader import CalibrationReader
from qdeploy.recover.recovery import Recovery
from qdeploy.scheme import Scheme
from qdeploy.statistics import TensorStatistics

NAME = "reader-per-tensor"

SAMPLES = 32
"""Enough to tell ranges apart: what is compared are the same samples."""


@dataclass(frozen=True)
class PerTensor(CalibrationReader):
    """Leaves each tensor to a reader of its own.

    Attributes:
        readers: By tensor name.
        others: Reads the tensors that have none.
    """

    readers: Mapping[str, CalibrationReader]
    others: CalibrationReader

    def range(self, statistics: TensorStatistics, scheme: Scheme) -> Range:
        """What the tensor's reader says."""
        return self.readers.get(statistics.name, self.others).range(statistics, scheme)


def reader_per_tensor(recovery: Recovery) -> Recovery:
    """The recovery with each activation's range from the reader that suits it best; weights and biases stay.

    Steps that follow and read ranges anew ask the same reader for each tensor.

    Raises:
        InputError: The recovery has no samples or knows no other readers, or the plan quantizes nothing.
    """
    means, before = recovery.require_means(NAME), recovery.plan
    if not means.readers:
        what = f"The recovery step {NAME!r} knows no readers to choose from."
        raise InputError(what, "Give recover(…, means=Means(…, readers=(MinMax(), Mse()))).")
    planned = partial(plan, before.model, recovery.statistics, before.contract, keep=means.keep)
    readers, plans = [means.reader], [planned(means.reader)]
    for reader in means.readers:
        other = planned(reader)
        if all(other.ranges != known.ranges for known in plans):
            readers.append(reader)
            plans.append(other)
    noise = _noise(recovery, plans)
    chosen = {name: readers[of_reader.index(min(of_reader))] for name, of_reader in noise.items()}
    per_tensor = PerTensor(chosen, means.reader)
    after = planned(per_tensor)
    activations = {id(affine) for affine in after.activations.values()}
    weights = {
        # Constants that are joined to values in flight share their grid.
        name: affine if id(affine) in activations else _roomier(before.weights[name], affine, plans[0].weights[name])
        for name, affine in after.weights.items()
    }
    changed = replace(before, ranges=after.ranges, activations=after.activations, weights=weights)
    return replace(recovery, plan=changed, means=replace(means, reader=per_tensor)).with_step(NAME)


def _roomier(present: Affine, after: Affine, bare: Affine) -> Affine:
    """A weight's grid as it is, but coarser where an int32 bias, of scale input · weight, has no room otherwise.

    Args:
        present: As steps have left it.
        after: As planned for the chosen ranges.
        bare: As planned for the ranges before; only for a bias do the two differ.
    """
    needed = after.scale > bare.scale
    return replace(present, scale=np.where(needed, after.scale, present.scale)) if needed.any() else present


def _noise(recovery: Recovery, plans: Sequence[QuantPlan]) -> Mapping[str, list[float]]:
    """Noise over signal at the output for each tensor that has a range, in the order of the plans.

    Values that are moved have the range of where they came from, and count there.
    """
    samples, folder = recovery.some_samples(NAME, SAMPLES), recovery.require_means(NAME).folder
    names = [str(place) for place in range(len(plans))]
    rows = {row.node: row for row in sensitivity(dict(zip(names, plans, strict=True)), samples, folder).layers}
    grids = plans[0].activations
    origins = {id(grids[name]): name for name in reversed([*grids])}
    noise: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(plans))
    for layer in layers_of(questions.load_graph(plans[0].model.path), plans[0]):
        for name in {origins[id(grids[name])] for name in layer.inputs}:
            for place, effect in enumerate(rows[layer.name].effects[each] for each in names):
                noise[name][place] += 10 ** (-effect.sqnr_db / 10)
    return noise
