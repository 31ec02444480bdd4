"""A reader for each tensor: what each range does to the output decides, computed here with numpy."""

from dataclasses import replace

import numpy as np
import pytest

from qdeploy.calibration_readers.entropy import Entropy
from qdeploy.calibration_readers.minmax import MinMax
from qdeploy.calibration_readers.mse import Mse
from qdeploy.calibration_readers.percentile import Percentile
from qdeploy.collect import collect
from qdeploy.errors import InputError
from qdeploy.plan import plan as make_plan
from qdeploy.recover.bias_correction import bias_correction
from qdeploy.recover.keep_edges import keep_float
from qdeploy.recover.readers import reader_per_tensor
from qdeploy.recover.recovery import Means, Recovery
from qdeploy.samples.source import Sample

READERS = (MinMax(), Entropy(), Percentile(99.0), Mse())


@pytest.fixture
def started(contract, folder):
    """A recovery of a model on samples, ranges read by minmax."""

    def start(model, samples, readers=READERS):
        statistics = collect(model, samples)
        plan = make_plan(model, statistics, contract, MinMax())
        return Recovery(plan, statistics, Means(samples, MinMax(), (), folder(), readers))

    return start


@pytest.fixture
def two_products(build, node, normal_form):
    """y = [a·u, b·v], where u cannot see the feature of `a` that has outliers, and v sees hardly any other of `b`."""
    random = np.random.default_rng(3)
    u, v = (random.normal(size=(8, 4)).astype(np.float32) for _ in range(2))
    u[0] = 0.0
    v[1:] /= 1000
    nodes = [node("MatMul", "a u", "p"), node("MatMul", "b v", "q"), node("Concat", "p q", "y", axis=1)]
    return normal_form(build(nodes, {"a": [1, 8], "b": [1, 8]}, {"y": [1, 8]}, {"u": u, "v": v}))


@pytest.fixture
def samples():
    random = np.random.default_rng(4)
    rows = random.normal(size=(2, 40, 1, 8)).astype(np.float32)
    rows[:, ::3, :, 0] *= 60
    return [Sample({"a": a, "b": b}) for a, b in zip(*rows, strict=True)]


def noise_of(affine, arrays, weight, weight_grid):
    """Σ of the squared error that rounding an operand and its weight leaves in the product, by the ONNX formula."""

    def rounded(array, grid):
        scale, zero = (np.asarray(each, np.float64) for each in (grid.scale, grid.zero_point))
        steps = np.clip(np.rint(array / scale) + zero, grid.integer.qmin, grid.integer.qmax)
        return (steps - zero) * scale

    exact = [array.astype(np.float64) @ weight for array in arrays]
    found = [rounded(array, affine) @ rounded(weight, weight_grid) for array in arrays]
    return sum(float(((e - f) ** 2).sum()) for e, f in zip(exact, found, strict=True))


def test_the_range_that_costs_the_output_least_is_taken(started, two_products, samples, contract):
    recovery = started(two_products, samples)

    found = reader_per_tensor(recovery)

    from onnx import load, numpy_helper

    weights = {each.name: numpy_helper.to_array(each) for each in load(two_products.path).graph.initializer}
    plans = [make_plan(two_products, recovery.statistics, contract, reader) for reader in READERS]
    for tensor, weight in (("a", "u"), ("b", "v")):
        arrays = [sample.inputs[tensor] for sample in samples[:32]]
        noises = [noise_of(plan.activations[tensor], arrays, weights[weight], plan.weights[weight]) for plan in plans]
        best = plans[int(np.argmin(noises))]
        assert found.plan.ranges[tensor] == best.ranges[tensor]
        assert min(noises) < max(noises) / 2
    assert found.plan.ranges["a"] != recovery.plan.ranges["a"]
    assert found.plan.ranges["b"] == recovery.plan.ranges["b"]
    assert found.plan.steps == ("reader-per-tensor",)


def test_weights_and_what_steps_have_done_for_them_stay(started, two_products, samples):
    recovery = started(two_products, samples)
    corrected = bias_correction(recovery.plan, recovery.statistics)
    coarse = replace(corrected.weights["u"], scale=2 * corrected.weights["u"].scale)
    changed = replace(corrected, weights={**corrected.weights, "u": coarse}, replaced={"u": np.ones((8, 4), "f")})

    found = reader_per_tensor(replace(recovery, plan=changed)).plan

    np.testing.assert_array_equal(found.weights["u"].scale, coarse.scale)
    assert found.replaced is changed.replaced
    assert found.biases is changed.biases
    assert found.steps == ("bias-correction", "reader-per-tensor")


def test_values_that_are_moved_keep_the_grid_of_where_they_came_from(started, build, node, normal_form):
    random = np.random.default_rng(5)
    weights = {"w": random.normal(size=(4, 4, 1, 1)), "v": random.normal(size=(16, 3))}
    nodes = [node("Conv", "x w", "c"), node("Flatten", "c", "f"), node("MatMul", "f v", "y")]
    arrays = {name: array.astype(np.float32) for name, array in weights.items()}
    model = normal_form(build(nodes, {"x": [1, 4, 2, 2]}, {"y": [1, 3]}, arrays))
    inputs = random.standard_t(2, size=(40, 1, 4, 2, 2)).astype(np.float32)

    found = reader_per_tensor(started(model, [Sample({"x": x}) for x in inputs])).plan

    assert found.activations["f"] is found.activations["c"]
    assert found.ranges["f"] == found.ranges["c"]


def test_steps_that_follow_ask_the_same_readers(started, two_products, samples):
    found = reader_per_tensor(started(two_products, samples))

    kept = keep_float(found, ("q",))

    assert kept.plan.ranges["a"] == found.plan.ranges["a"]
    again = make_plan(two_products, found.statistics, found.plan.contract, found.require_means("").reader)
    assert again.ranges == found.plan.ranges


def test_without_other_readers_there_is_no_choice(started, two_products, samples):
    recovery = started(two_products, samples, readers=())

    with pytest.raises(InputError, match="The recovery step 'reader-per-tensor' knows no readers to choose from"):
        reader_per_tensor(recovery)


def test_samples_are_needed(started, two_products, samples):
    recovery = started(two_products, samples)
    without = replace(recovery, means=replace(recovery.means, samples=None))

    with pytest.raises(InputError, match="'reader-per-tensor' runs the calibration samples, and only their statistics"):
        reader_per_tensor(without)


def test_an_int32_bias_still_fits_where_the_input_has_a_finer_grid(started, build, node, normal_form):
    """A bias counts in units of the input's scale times the weight's; it would saturate if only the input's shrank."""
    random = np.random.default_rng(17)
    rows = random.normal(size=(8, 64, 4)).astype(np.float32)
    rows[:, 0, 0] = 3000.0
    weight = random.normal(size=(4, 3)).astype(np.float32)
    weight[0], weight[:, 2] = 0.0, 1e-12
    bias = np.array([0.1, -0.2, 5.0], np.float32)
    nodes, shapes = [node("Gemm", "x w b", "y")], ({"x": [64, 4]}, {"y": [64, 3]})
    recovery = started(normal_form(build(nodes, *shapes, {"w": weight, "b": bias})), [Sample({"x": x}) for x in rows])

    found = reader_per_tensor(recovery).plan

    assert found.ranges["x"].maximum < 5.0 < recovery.plan.ranges["x"].maximum
    (grid,) = found.weights.values()
    unit = float(found.activations["x"].scale) * grid.scale.astype(np.float64)
    assert (np.abs(bias) <= unit * (2**31 - 1)).all()
