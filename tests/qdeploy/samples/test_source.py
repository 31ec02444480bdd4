"""Halves of a source: together they are all of it, and pairs stay together."""

import numpy as np
import pytest

from qdeploy.samples.source import Sample, SampleSource, half


@pytest.mark.parametrize("count", range(9))
def test_halves_take_turns_of_two(count):
    given = [Sample({"x": np.array([index])}) for index in range(count)]
    source = SampleSource("numbers", lambda: iter(given), size=count)

    first, second = (half(source, which) for which in (0, 1))

    numbers = [[int(sample.inputs["x"][0]) for sample in part] for part in (first, second)]
    assert numbers == [[i for i in range(count) if i % 4 < 2], [i for i in range(count) if i % 4 >= 2]]
    assert [first.size, second.size] == [len(part) for part in numbers]
    assert [part.description for part in (first, second)] == [
        "numbers, every other two from the first on",
        "numbers, every other two from the third on",
    ]
