"""One pass over the samples: the figures of every observed tensor, whoever counts them and in whatever order."""

import importlib
import threading
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from qdeploy import counting
from qdeploy import graph as questions
from qdeploy.collect import collect
from qdeploy.errors import InputError
from qdeploy.samples.source import Sample

COLLECTING = importlib.import_module("qdeploy.collect")
"""The module; the package has a function of that name."""

RANDOM = np.random.default_rng(11)


def floats(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


@pytest.fixture
def network(build, node, normal_form):
    """Conv, Relu, pooling and a MatMul with dynamic batch and height."""
    nodes = [
        node("Conv", "image k b", "conv"),
        node("Relu", "conv", "relu"),
        node("Transpose", "relu", "last", perm=[0, 2, 3, 1]),
        node("MatMul", "last w", "product"),
        node("Sigmoid", "product", "out"),
    ]
    weights = {"k": floats(4, 3, 3, 3), "b": floats(4), "w": floats(4, 2)}
    shapes = {"image": ["batch", 3, "height", 6]}, {"out": ["batch", "rows", 4, 2]}
    return normal_form(build(nodes, *shapes, weights))


def samples_of(*shapes, name="image"):
    return [Sample({name: floats(*shape)}) for shape in shapes]


def values_of_tensors(run_onnx, model, samples, names, path):
    """Tensors by name for each sample, from a file that has them as outputs."""
    import onnx

    proto = onnx.load(model.path)
    present = {output.name for output in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in present)
    onnx.save(proto, path)
    return [dict(sample.inputs) | run_onnx(path, sample.inputs, optimized=True) for sample in samples]


def test_figures_equal_numpys_over_all_samples(network, run_onnx, tmp_path, statistics_of):
    samples = samples_of((1, 3, 5, 6), (2, 3, 5, 6), (1, 3, 8, 6), (1, 3, 8, 6), (1, 3, 5, 6))

    found = collect(network, samples, threads=2)

    assert found.model_digest == network.digest
    assert found.samples == 5
    assert list(found.tensors) == ["image", "relu", "last", "product", "out"]
    axes = {"image": 1, "relu": 1, "last": -1, "product": -1, "out": None}
    values = values_of_tensors(run_onnx, network, samples, list(axes)[1:], tmp_path / "all.onnx")
    for name, axis in axes.items():
        by_channel = [np.moveaxis(v[name], axis or -1, -1).reshape(-1, v[name].shape[axis or -1]) for v in values]
        expected = statistics_of(np.concatenate(by_channel), name, None if axis is None else 1)
        tensor = found.tensors[name]
        assert tensor.channel_axis == axis
        np.testing.assert_array_equal(tensor.histogram, expected.histogram)
        np.testing.assert_array_equal(tensor.channel_minimum, expected.channel_minimum)
        np.testing.assert_array_equal(tensor.channel_maximum, expected.channel_maximum)
        np.testing.assert_array_equal(tensor.channel_count, expected.channel_count)
        np.testing.assert_allclose(tensor.channel_mean, expected.channel_mean, rtol=1e-9, atol=1e-9)


def saved(statistics, path):
    statistics.save(path)
    return path.read_bytes()


def test_threads_and_the_order_of_samples_do_not_matter(network, tmp_path):
    samples = samples_of(*[(1, 3, 5, 6)] * 7, *[(2, 3, 8, 6)] * 6)
    one = collect(network, samples, threads=1)

    others = [
        collect(network, samples, threads=3),
        collect(network, samples[::-1], threads=1),
        collect(network, samples[::2] + samples[1::2], threads=2),
    ]

    assert saved(others[0], tmp_path / "other") == saved(one, tmp_path / "one")
    for other in others[1:]:  # only whether ranges still grow at the end depends on the order
        same = saved(replace(other, notes=()), tmp_path / "other")
        assert same == saved(replace(one, notes=()), tmp_path / "one")


def test_two_halves_merge_into_the_whole(network, tmp_path):
    samples = samples_of(*[(1, 3, 5, 6)] * 6)
    whole = collect(network, samples)
    halves = collect(network, samples[:2]).merge(collect(network, samples[2:]))

    assert halves.sample_digests == whole.sample_digests
    for name, tensor in whole.tensors.items():
        for field in ("histogram", "channel_minimum", "channel_maximum", "channel_count", "channel_sum"):
            np.testing.assert_array_equal(getattr(halves.tensors[name], field), getattr(tensor, field))


def test_the_tables_may_be_emptied_in_between(network, monkeypatch, tmp_path):
    samples = samples_of(*[(1, 3, 5, 6)] * 9)
    expected = saved(collect(network, samples, threads=2), tmp_path / "expected")
    monkeypatch.setattr(counting, "FLUSH_AFTER", 100)

    assert saved(collect(network, samples, threads=2), tmp_path / "found") == expected


def test_infinities_within_the_network_are_counted_left_out_and_warned_of(build, node, normal_form):
    nodes = [node("Log", "x", "log"), node("Sigmoid", "log", "out")]
    model = normal_form(build(nodes, {"x": [2, 2]}, {"out": [2, 2]}))
    samples = [Sample({"x": np.array(rows, np.float32)}) for rows in ([[0, 1], [-1, 2]], [[4, 0], [1, 1]])]

    found = collect(model, samples)

    log = found.tensors["log"]
    assert (log.non_finite, log.count) == (3, 5)
    assert (log.minimum, log.maximum) == (0.0, float(np.log(np.float32(4))))
    assert "3 values of 'log' were NaN or infinite; they count for no range." in found.notes


def test_masks_are_counted_as_they_are(build, node, normal_form):
    from onnx import TensorProto

    weights = {"lowest": np.float32(-3e38), "infinite": np.float32(-np.inf)}
    nodes = [
        node("Where", "m x lowest", "finite"),
        node("Softmax", "finite", "a"),
        node("Where", "m x infinite", "masked"),
        node("Softmax", "masked", "b"),
    ]
    inputs = {"m": ([2, 4], TensorProto.BOOL), "x": [2, 4]}
    model = normal_form(build(nodes, inputs, {"a": [2, 4], "b": [2, 4]}, weights))
    mask = np.array([[1, 1, 0, 0], [1, 0, 0, 0]], bool)

    found = collect(model, [Sample({"m": mask, "x": floats(2, 4)}) for _ in range(3)], threads=2)

    assert found.tensors["finite"].minimum == float(np.float32(-3e38))
    assert (found.tensors["finite"].count, found.tensors["finite"].non_finite) == (24, 0)
    assert (found.tensors["masked"].count, found.tensors["masked"].non_finite) == (9, 15)


def test_shapes_that_depend_on_the_values(build, node, normal_form, statistics_of, capfd):
    nodes = [
        node("NonZero", "x", "places"),
        node("Transpose", "places", "rows"),
        node("GatherND", "x rows", "chosen"),
        node("Sigmoid", "chosen", "out"),
    ]
    model = normal_form(build(nodes, {"x": [4, 4]}, {"out": ["n"]}))
    arrays = [np.where(RANDOM.random((4, 4)) < share, floats(4, 4), 0) for share in (0.3, 0.3, 0.9, 0.0, 0.6, 1.0)]

    found = collect(model, [Sample({"x": array.astype(np.float32)}) for array in arrays], threads=1)

    chosen = np.concatenate([array[array != 0] for array in arrays])
    np.testing.assert_array_equal(found.tensors["chosen"].histogram, statistics_of(chosen).histogram)
    assert found.tensors["out"].count == chosen.size
    assert capfd.readouterr().err == ""


def test_empty_tensors_are_no_error(build, node, normal_form, recwarn):
    nodes = [node("Slice", "x start end", "none"), node("Sigmoid", "none", "nothing"), node("Sigmoid", "x", "out")]
    weights = {"start": np.array([0]), "end": np.array([0])}
    model = normal_form(build(nodes, {"x": [3]}, {"nothing": [0], "out": [3]}, weights))

    found = collect(model, [Sample({"x": floats(3)}) for _ in range(20)])

    assert (found.tensors["nothing"].count, found.tensors["out"].count) == (0, 60)
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


def test_integer_inputs_are_run_and_not_observed(build, node, normal_form):
    from onnx import TensorProto

    table = floats(10, 4)
    nodes = [node("Gather", "table ids", "rows"), node("MatMul", "rows w", "out")]
    inputs = {"ids": (["n", "length"], TensorProto.INT64)}
    model = normal_form(build(nodes, inputs, {"out": ["n", "length", 2]}, {"table": table, "w": floats(4, 2)}))
    ids = [np.array([[1, 2, 3]]), np.array([[4, 4], [9, 0]]), np.array([[5, 6, 7]])]

    found = collect(model, [Sample({"ids": array}) for array in ids])

    rows = np.concatenate([table[array].reshape(-1, 4) for array in ids])
    assert list(found.tensors) == ["rows", "out"]
    np.testing.assert_array_equal(found.tensors["rows"].channel_minimum, rows.min(axis=0))
    np.testing.assert_array_equal(found.tensors["rows"].channel_maximum, rows.max(axis=0))


def test_an_input_that_is_also_an_output(build, node, normal_form):
    nodes = [node("MatMul", "x w", "y"), node("Identity", "x", "same"), node("Relu", "y", "out")]
    model = normal_form(build(nodes, {"x": [1, 2]}, {"same": [1, 2], "out": [1, 2]}, {"w": floats(2, 2)}))
    samples = samples_of(*[(1, 2)] * 4, name="x")
    before = [sample.inputs["x"].copy() for sample in samples]

    found = collect(model, samples, threads=1)

    for sample, copy in zip(samples, before, strict=True):
        np.testing.assert_array_equal(sample.inputs["x"], copy)
    assert found.tensors["x"].minimum == min(float(sample.inputs["x"].min()) for sample in samples)


def test_a_model_with_nothing_to_observe(build, node, normal_form):
    model = normal_form(build([node("Cos", "x", "out")], {"x": [2]}, {"out": [2]}))

    found = collect(model, samples_of(*[(2,)] * 12, name="x"), threads=2)

    assert (dict(found.tensors), found.samples) == ({}, 12)


def test_the_samples_themselves_are_not_changed(network):
    samples = samples_of(*[(1, 3, 5, 6)] * 4)
    before = [sample.inputs["image"].copy() for sample in samples]

    collect(network, samples, threads=1)

    for sample, copy in zip(samples, before, strict=True):
        np.testing.assert_array_equal(sample.inputs["image"], copy)


def test_no_samples_is_an_error(network):
    with pytest.raises(InputError, match=r"There are no calibration samples. Give a source that yields at least one."):
        collect(network, [])


def test_a_sample_that_the_model_fails_on_is_named(build, node, normal_form):
    from onnx import TensorProto

    nodes = [node("Gather", "table ids", "rows"), node("Sigmoid", "rows", "out")]
    model = normal_form(build(nodes, {"ids": ([1], TensorProto.INT64)}, {"out": [1, 4]}, {"table": floats(10, 4)}))
    for position in (0, 2):
        ids = [3] * position + [99]
        samples = [Sample({"ids": np.array([i])}, origin=f"sample {n} of ids.npz") for n, i in enumerate(ids)]

        with pytest.raises(InputError, match=rf"The model fails on sample {position} of ids.npz: .*99"):
            collect(model, samples, threads=1)


def test_what_a_sample_source_raises_comes_through(network):
    def broken():
        yield from samples_of((1, 3, 5, 6))
        raise InputError("The second image is torn.", "Take another.")

    with pytest.raises(InputError, match="The second image is torn"):
        collect(network, broken(), threads=2)


def test_every_sample_is_announced(network):
    announced = []

    collect(network, samples_of(*[(1, 3, 5, 6)] * 9), threads=2, on_sample=lambda: announced.append(1))

    assert len(announced) == 9


def test_labels_of_one_class_are_warned_of(network):
    samples = [Sample(sample.inputs, np.array([4])) for sample in samples_of(*[(1, 3, 5, 6)] * 3)]

    assert "All calibration samples are of one class, 4." in collect(network, samples).notes


@pytest.mark.parametrize("labels", [[4.1, 4.2, 4.9], [4.0, 4.0, 4.0]])
def test_real_labels_are_no_classes(network, labels):
    shapes = [(1, 3, 5, 6)] * 3
    samples = [Sample(s.inputs, np.array([label])) for s, label in zip(samples_of(*shapes), labels, strict=True)]

    assert not any("of one class" in note for note in collect(network, samples).notes)


def growing(sizes):
    return [Sample({"x": np.full((1, 2), size, np.float32)}) for size in sizes]


@pytest.fixture
def sigmoid(build, node, normal_form):
    return normal_form(build([node("Sigmoid", "x", "out")], {"x": [1, 2]}, {"out": [1, 2]}))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_ranges_that_still_grow_at_the_end_are_warned_of(sigmoid, workers):
    samples = growing([0.0, *np.linspace(0.5, 1.0, 17), 1.0, 1.06])

    notes = collect(sigmoid, samples, threads=workers).notes

    # The input's range grows by 6 %; the sigmoid's, from 0.5 … 0.731 to 0.5 … 0.743, by 5.1 %.
    warning = "The ranges of 2 of 2 tensors still grew by more than 5 % over the last 2 of 20 samples: use more."
    assert warning in notes


@pytest.mark.parametrize("last", [1.0, 1.04])
def test_ranges_that_have_settled_are_not(sigmoid, last):
    samples = growing([-1.0, *np.linspace(0.5, 1.0, 18), last])

    assert not any("still grew" in note for note in collect(sigmoid, samples).notes)


@pytest.mark.parametrize(("last", "grows"), [(0.0, False), (float(np.finfo(np.float32).max), True)])
def test_ranges_of_masks_do_not_overflow(sigmoid, recwarn, last, grows):
    samples = growing([float(np.finfo(np.float32).min), *[0.0] * 18, last])

    assert any("2 of 2 tensors still grew" in note for note in collect(sigmoid, samples).notes) == grows
    assert not recwarn.list


def test_a_sample_without_any_number_does_not_hide_that_ranges_grow(sigmoid, recwarn):
    samples = growing([float("nan"), 0.0, *np.linspace(0.5, 1.0, 17), 1.06])

    assert any("2 of 2 tensors still grew" in note for note in collect(sigmoid, samples).notes)
    assert not recwarn.list


@pytest.mark.parametrize("workers", [2, 4])
def test_slow_workers_change_nothing(network, monkeypatch, workers):
    """Samples may be counted in any order."""
    random = np.random.default_rng(0)
    samples = [Sample({"image": random.normal(size=(1, 3, 8, 6)).astype(np.float32)}) for _ in range(12)]
    wanted = collect(network, samples, threads=1)
    inner = COLLECTING._Thread.run

    def slow_at_first(worker, sample):
        if sample is samples[0]:
            threading.Event().wait(0.1)
        return inner(worker, sample)

    monkeypatch.setattr(COLLECTING._Thread, "run", slow_at_first)
    found = collect(network, samples, threads=workers)

    assert [*found.tensors] == [*wanted.tensors]
    assert found.notes == wanted.notes
    for name, tensor in wanted.tensors.items():
        for figure in ("histogram", "channel_minimum", "channel_maximum", "channel_count", "channel_sum"):
            np.testing.assert_array_equal(getattr(found.tensors[name], figure), getattr(tensor, figure))


def test_memory_does_not_grow_with_the_number_of_samples(network):
    def stream(number):
        random = np.random.default_rng(0)
        for _ in range(number):
            yield Sample({"image": random.normal(size=(1, 3, 64, 6)).astype(np.float32)})

    collect(network, stream(3), threads=2)

    def peak(number):
        tracemalloc.start()
        try:
            collect(network, stream(number), threads=2)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    sample_bytes = 3 * 64 * 6 * 4
    assert peak(200) - peak(50) < 60 * sample_bytes


def test_models_with_external_data(build, node, normal_form, monkeypatch, tmp_path):
    model = build([node("MatMul", "x w", "out")], {"x": [2, 32]}, {"out": [2, 32]}, {"w": floats(32, 32)})
    samples = samples_of(*[(2, 32)] * 3, name="x")
    inside = collect(normal_form(model), samples)
    monkeypatch.setattr(questions, "EXTERNAL_DATA_BYTES", 100)
    external = normal_form(model)

    outside = collect(external, samples)

    assert outside.model_digest == external.digest != inside.model_digest
    for name, tensor in inside.tensors.items():
        np.testing.assert_array_equal(outside.tensors[name].histogram, tensor.histogram)
