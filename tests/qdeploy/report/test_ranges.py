"""What a page shows of each activation agrees with the values themselves."""

import numpy as np
import pytest

from qdeploy.backend import Arrays
from qdeploy.collect import collect
from qdeploy.recover.recovery import Recovery
from qdeploy.report.ranges import COLUMNS, tensor_ranges
from qdeploy.report.schema import Ranges
from qdeploy.samples.source import Sample

RANDOM = np.random.default_rng(7)
VALUES = np.concatenate([RANDOM.normal(size=3998), [-5.0, 9.0]]).astype(np.float32).reshape(20, 1, 200)


@pytest.fixture
def recovery(build, node, normal_form, planned):
    """x → Gemm → y, calibrated on VALUES."""
    weight = RANDOM.normal(size=(200, 3)).astype(np.float32)
    model = normal_form(build([node("Gemm", "x w", "y")], {"x": [1, 200]}, {"y": [1, 3]}, {"w": weight}))
    samples = [Sample({"x": each}) for each in VALUES]
    return Recovery(planned(model, samples), collect(model, samples, threads=1))


def values_of(recovery: Recovery) -> Arrays:
    return {"x": VALUES.ravel()}


def test_every_quantized_activation_is_there_with_its_grid(recovery):
    found = tensor_ranges(recovery)

    assert [each.name for each in found] == [name for name in recovery.plan.activations if name in ("x", "y")]
    for each in found:
        affine = recovery.plan.activations[each.name]
        ends = [float(affine.scale) * (end - int(affine.zero_point)) for end in (0, 255)]
        assert each.integer == "uint8"
        assert each.range == pytest.approx(ends, rel=1e-6)
        assert (each.scale, each.zero_point) == (pytest.approx(float(affine.scale), rel=1e-6), int(affine.zero_point))


def test_the_histogram_is_that_of_the_values(recovery):
    (x, *_) = tensor_ranges(recovery)
    values = values_of(recovery)["x"]

    counts, _ = np.histogram(values, COLUMNS, (values.min(), values.max()))

    assert x.observed == (-5.0, 9.0)
    assert len(x.counts) == COLUMNS
    assert sum(x.counts) == values.size
    # Bins of the statistics are up to 1.6 % wide and may straddle a column's edge.
    assert np.abs(np.cumsum(x.counts) - np.cumsum(counts)).max() <= 0.01 * values.size


def test_nothing_is_clipped_by_the_extremes(recovery):
    assert [each.clipped for each in tensor_ranges(recovery)] == [0.0] * len(tensor_ranges(recovery))


def test_what_lies_outside_the_range_is_counted(recovery):
    affine = recovery.plan.activations["x"]
    narrow = type(affine)(np.float32(4 / 255), np.uint8(128), affine.integer)
    plan = type(recovery.plan)(**{**vars(recovery.plan), "activations": {"x": narrow}})

    (x,) = tensor_ranges(Recovery(plan, recovery.statistics))

    values = values_of(recovery)["x"].astype(np.float64)
    low, high = 4 / 255 * (0 - 128.5), 4 / 255 * (255 - 127.5)
    assert x.clipped == pytest.approx(((values < low) | (values > high)).mean(), abs=0.002)


def test_a_constant_tensor_has_one_column(build, node, normal_form, planned):
    model = normal_form(
        build([node("Gemm", "x w", "y")], {"x": [1, 4]}, {"y": [1, 2]}, {"w": np.ones((4, 2), np.float32)})
    )
    samples = [Sample({"x": np.full((1, 4), 2.0, np.float32)})] * 3

    (x, *_) = tensor_ranges(Recovery(planned(model, samples), collect(model, samples, threads=1)))

    assert (x.observed, x.counts) == ((2.0, 2.0), (12,))


def test_ranges_survive_their_file(recovery, tmp_path):
    ranges = Ranges(tensors=tensor_ranges(recovery))
    path = tmp_path / "ort-cpu.json"
    path.write_text(ranges.text(), "utf-8")

    assert Ranges.read(path) == ranges
    assert len(path.read_text().splitlines()) == 2 + len(ranges.tensors)
