"""Calibration shared among processes: the same images through one and through two, by turns.

Time on the clock says nothing on a machine that does other work; the processor time of the busiest process does, since
nobody has to wait for more than it.

python benchmarks/scale.py [--samples 200] [--times 10] [--repeats 3]
"""

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

from common import images, prepared_model, print_environment, print_table

from qdeploy.collect import collect_shared
from qdeploy.model import FloatModel
from qdeploy.samples.check import checked
from qdeploy.samples.source import Sample, SampleSource
from qdeploy.workers import Processes, Result, Step, Task

SHAPES = ((1, 1), (1, 2), (2, 1))
"""Processes, and threads of each."""


class Threaded(Processes):
    """Processes with as many threads as told, which notes the processor time of the busiest."""

    def __init__(self, count: int, threads: int) -> None:
        super().__init__(count)
        self.threads = threads
        self.busiest = 0.0

    def run(self, task: Task[Result], on_step: Step = lambda: None) -> list[Result]:
        timed = super().run(partial(with_processor_time, task), on_step)
        self.busiest = max(seconds for _, seconds in timed)
        return [result for result, _ in timed]


def with_processor_time(task: Task[Result], part: int, on_step: Step) -> tuple[Result, float]:
    """What a task gives, and the seconds of processor time of its process, imports included."""
    return task(part, on_step), time.process_time()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--samples", type=int, default=200, help="how many images")
    options.add_argument("--times", type=int, default=10, help="how often each image is read in a pass")
    options.add_argument("--repeats", type=int, default=3, help="how many turns")
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="qdeploy-") as folder:
        source = partial(checked_images, given.samples, given.times)
        model = prepared_model(Path(folder))
        turns = [[seconds(model, source, *shape) for shape in SHAPES] for _ in range(given.repeats)]
    print_environment()
    rows = []
    for place, (count, threads) in enumerate(SHAPES):
        clock, busiest = ([turn[place][kind] for turn in turns] for kind in (0, 1))
        speedups = [turn[0][0] / turn[place][0] for turn in turns]
        spread = f"**{median(speedups):.2f}×**, {min(speedups):.2f} to {max(speedups):.2f}"
        rows.append((f"{count}", f"{threads}", f"{median(clock):.2f} s", spread, f"{median(busiest):.2f} s"))
    size = repeated(images("calibration", given.samples), given.times).size
    titles = ("Processes", "Threads of each", f"Time of {size} images", f"Speed-up, median of {given.repeats}")
    print_table((*titles, "Processor time of the busiest"), rows)


def checked_images(limit: int, times: int, model: FloatModel) -> SampleSource:
    """The images as every worker opens them: files, decoded on the way."""
    return checked(repeated(images("calibration", limit), times), model.inputs)


def repeated(source: SampleSource, times: int) -> SampleSource:
    """The samples of a folder again and again, each time read and decoded anew: a larger folder."""
    pick, size = source.pick, source.size
    assert pick is not None
    assert size is not None

    def picked(places: Sequence[int]) -> Iterator[Sample]:
        return pick([place % size for place in places])

    return replace(source, stream=lambda: picked(range(size * times)), size=size * times, pick=picked)


def seconds(model: FloatModel, source: partial[SampleSource], count: int, threads: int) -> tuple[float, float]:
    """What a pass takes on the clock, with starting processes and opening sessions, and of the busiest processor."""
    workers = Threaded(count, threads)
    start = time.perf_counter()
    collect_shared(model, source, workers)
    return time.perf_counter() - start, workers.busiest


if __name__ == "__main__":
    main()
