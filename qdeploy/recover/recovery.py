"""What recovery steps work on, and hand from one to the next."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING

from qdeploy.collect import collect
from qdeploy.errors import InputError
from qdeploy.graph import describe, save_graph
from qdeploy.model import FloatModel
from qdeploy.plan import QuantPlan, plan
from qdeploy.reader import CalibrationReader
from qdeploy.samples.source import Sample
from qdeploy.statistics import Statistics

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class Means:
    """What a step may use beside the plan and its statistics.

    Attributes:
        samples: The calibration samples, re-iterable; None where only their statistics are at hand.
        reader: Chose the plan's ranges, and chooses them anew when a step has changed the float graph.
        keep: Patterns of the nodes that stay float.
        folder: Where steps write the float graphs that they change.
        readers: Those that could choose a tensor's range.
    """

    samples: Iterable[Sample] | None
    reader: CalibrationReader
    keep: Sequence[str]
    folder: Path
    readers: tuple[CalibrationReader, ...] = ()


@dataclass(frozen=True)
class Recovery:
    """A plan on its way through the steps.

    Attributes:
        plan: As far as it is recovered.
        statistics: Of the plan's model.
        means: What else there is; None where steps must do with plan and statistics.
    """

    plan: QuantPlan
    statistics: Statistics
    means: Means | None = None

    def require_means(self, step: str) -> Means:
        """What else there is.

        Raises:
            InputError: Nothing else was given.
        """
        if self.means is None:
            what = f"The recovery step {step!r} needs more than a plan and its statistics."
            raise InputError(what, "Give recover(…, means=Means(samples, reader, keep, folder)).")
        return self.means

    def require_samples(self, step: str) -> Iterable[Sample]:
        """The calibration samples.

        Raises:
            InputError: They are not at hand.
        """
        samples = self.require_means(step).samples
        if samples is None:
            what = f"The recovery step {step!r} runs the calibration samples, and only their statistics were given."
            raise InputError(what, "Give --calibration DATA, with or without --statistics.")
        return samples

    def some_samples(self, step: str, count: int) -> list[Sample]:
        """At most so many of the calibration samples, evenly spread: of samples sorted by class, the first are of one.

        Raises:
            InputError: They are not at hand.
        """
        apart = max(1, self.statistics.samples // count)
        return list(islice(self.require_samples(step), 0, count * apart, apart))

    def with_step(self, step: str) -> Recovery:
        """The recovery after a step that found nothing to change."""
        return replace(self, plan=replace(self.plan, steps=(*self.plan.steps, step)))

    def on_graph(self, graph: ir.Model, step: str) -> Recovery:
        """The recovery on a float graph that a step has changed in memory; as `on_changed`, once it is written."""
        before = self.plan.model
        path = Path(mkdtemp(prefix=f"{step}-", dir=self.require_means(step).folder)) / "model.onnx"
        save_graph(graph, path)
        return self.on_changed(replace(describe(path, before.name, before.dims), image=before.image), step)

    def on_changed(self, model: FloatModel, step: str) -> Recovery:
        """The recovery on a float graph that a step has changed: activations differ, so they are counted anew.

        Steps taken before stay in the record; what they put into the plan belonged to the graph before, and is gone.
        """
        means = self.require_means(step)
        statistics = collect(model, self.require_samples(step))
        again = plan(model, statistics, self.plan.contract, means.reader, means.keep)
        return replace(self, plan=replace(again, steps=(*self.plan.steps, step)), statistics=statistics)
