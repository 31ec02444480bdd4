"""The first samples of a source are taken from it once."""

from itertools import islice

import numpy as np
import pytest

from qdeploy.samples import head
from qdeploy.samples.head import remembering
from qdeploy.samples.source import Sample, SampleSource


class Slow:
    """A source that counts its passes and what it made, and fills one array again and again."""

    def __init__(self, count):
        self.count, self.passes, self.made = count, 0, 0

    def __call__(self):
        self.passes += 1
        buffer, label = np.zeros((1, 4), np.float32), np.zeros(1, np.int64)
        for i in range(self.count):
            self.made += 1
            buffer[:], label[:] = i, -i
            yield Sample({"x": buffer}, label, f"sample {i}")


def seen(samples):
    return [(float(s.inputs["x"][0, 3]), int(s.labels[0]), s.origin) for s in samples]


def expected(count):
    return [(i, -i, f"sample {i}") for i in range(count)]


def remembered(count):
    slow = Slow(count)
    return slow, remembering(SampleSource("slow ones", slow, count))


def test_every_pass_yields_the_same_samples():
    slow, source = remembered(100)

    for first in (1, 4, 100, 8, 64, 70, 100):
        assert seen(islice(source, first)) == expected(first)
    assert (source.description, source.size) == ("slow ones", 100)
    assert slow.passes == 5  # those of 1, 4, 100, 70 and 100 samples


def test_few_samples_are_made_once():
    slow, source = remembered(30)

    for _ in range(3):
        assert seen(source) == expected(30)
    assert (slow.passes, slow.made) == (1, 30)


def test_passes_at_the_same_time_do_not_disturb_one_another():
    _, source = remembered(10)

    assert [(a, b) for a, b in zip(*map(map, (lambda s: seen([s])[0],) * 2, (source, source)), strict=True)] == [
        (each, each) for each in expected(10)
    ]
    assert seen(source) == expected(10)


@pytest.mark.parametrize("room", [0, 15, 16, 47, 48])
def test_no_more_is_kept_than_there_is_room_for(monkeypatch, room):
    monkeypatch.setattr(head, "BYTES", room)
    slow, source = remembered(5)

    assert seen(source) == expected(5)
    slow.passes = 0

    assert seen(islice(source, room // 16)) == expected(room // 16)
    assert slow.passes == 0
    assert seen(islice(source, room // 16 + 1)) == expected(room // 16 + 1)
    assert slow.passes == 1


def test_no_samples_stay_none():
    _, source = remembered(0)

    assert list(source) == list(source) == []
