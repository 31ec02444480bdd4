"""A reference is run once for each of its inputs, whatever is compared with it."""

import numpy as np

from qdeploy.backend import Evidence, Runner
from qdeploy.parity.remembered import Remembered


class Counting(Runner):
    """Gives two outputs, and counts its runs and how often it is left."""

    evidence = Evidence.EXECUTED

    def __init__(self):
        self.runs = self.entered = 0

    def run(self, inputs):
        assert self.entered == 1
        self.runs += 1
        return {"file": inputs["x"] * 2, "classes": np.array([self.runs])}

    def __enter__(self):
        self.entered += 1
        return self

    def __exit__(self, *_):
        self.entered -= 1


def test_equal_inputs_are_run_once(tmp_path):
    inner = Counting()
    reference = Remembered(inner, tmp_path)
    first, second = ({"x": np.full(3, value, np.float32)} for value in (1, 2))

    for _ in range(2):  # candidates, each of which enters the reference anew
        with reference as runner:
            for place, inputs in enumerate((first, second)):
                outputs = runner.run({"x": inputs["x"].copy()})

                assert list(outputs) == ["file", "classes"]
                np.testing.assert_array_equal(outputs["file"], 2 * inputs["x"])
                assert outputs["classes"] == [place + 1]

    assert inner.runs == 2
    assert inner.entered == 0
