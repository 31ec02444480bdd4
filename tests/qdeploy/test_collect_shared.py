"""One pass shared among workers: to the bit what one process finds, for every kind of source and whoever dies."""

import itertools
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdeploy import pipeline
from qdeploy.collect import collect_shared
from qdeploy.errors import InputError
from qdeploy.model import ModelSource
from qdeploy.recipe import Recipe, TargetRequest
from qdeploy.samples.check import checked
from qdeploy.samples.open import open_samples
from qdeploy.samples.preprocessing import Preprocessing
from qdeploy.workers import Processes, ray_cluster
from tests.qdeploy.in_turn import FarInTurn, InTurn

CALLABLES = """
import os, signal
from pathlib import Path
import numpy as np

def samples():
    random = np.random.default_rng(0)
    for index in range(11):
        yield {"x": random.normal(size=(1, 3, 4, 4)).astype(np.float32) * (1 + index)}, np.array([7])

def other_ones_each_time():
    random = np.random.default_rng()
    for _ in range(6):
        yield {"x": random.normal(size=(1, 3, 4, 4)).astype(np.float32)}

def fewer_each_time():
    number = len(list(Path(__file__).parent.glob("pass*")))
    (Path(__file__).parent / f"pass{number}").touch()
    for _ in range(9 - number):
        yield {"x": np.zeros((1, 3, 4, 4), np.float32)}

def killing():
    for index, sample in enumerate(samples()):
        life = Path(__file__).with_name("life")
        if index == 5 and life.exists():
            life.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        yield sample
"""


@pytest.fixture
def network(build, node):
    """x [1, 3, 4, 4] → y: what a convolution and a Relu give, which has zeros of both signs."""
    weight = np.random.default_rng(1).normal(size=(4, 3, 3, 3)).astype(np.float32)
    nodes = [node("Conv", "x w", "c"), node("Relu", "c", "r"), node("Mul", "r minus", "m"), node("Sigmoid", "m", "y")]
    return build(nodes, {"x": [1, 3, 4, 4]}, {"y": [1, 4, 2, 2]}, {"w": weight, "minus": np.float32(-1)})


@pytest.fixture
def calibrated(network, tmp_path):
    """Calibrates with data as text; the bytes of the file."""
    numbers = itertools.count()

    def run(data, workers=None, **more):
        path = tmp_path / f"statistics{next(numbers)}.npz"
        recipe = Recipe(ModelSource.parse(str(network.path)), (), calibration=str(data), **more)
        pipeline.calibrate(recipe, path, workers=workers)
        return path.read_bytes()

    return run


@pytest.fixture
def arrays(tmp_path):
    """Samples whose ranges still grow at the end, of one class."""
    x = np.random.default_rng(2).normal(size=(13, 3, 4, 4)) * np.linspace(0.1, 2, 13).reshape(-1, 1, 1, 1)
    np.savez(tmp_path / "x.npz", x=x.astype(np.float32), labels=np.full(13, 3))
    return tmp_path / "x.npz"


@pytest.fixture
def callables(tmp_path):
    path = tmp_path / "data.py"
    path.write_text(CALLABLES)
    return lambda name: f"{path}:{name}"


@pytest.fixture
def images(tmp_path):
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(5):
        pixels = np.random.default_rng(index).integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def test_processes_leave_the_very_file_that_one_leaves(calibrated, arrays):
    one = calibrated(arrays)

    assert one == calibrated(arrays, Processes(2))


@pytest.mark.parametrize("count", [1, 2, 5, 13, 20])
def test_any_number_of_workers_counts_the_same(count, calibrated, arrays):
    assert calibrated(arrays, InTurn(count)) == calibrated(arrays, FarInTurn(count)) == calibrated(arrays)


def test_notes_are_those_of_all_samples_together(network, arrays):
    source = partial(opened, str(arrays))

    notes = collect_shared(network, source, InTurn(3)).notes

    assert "13 calibration samples; 500–2,000 diverse ones are usual." in notes
    assert "All calibration samples are of one class, 3." in notes
    assert any("still grew by more than 5 % over the last 1 of 13 samples" in note for note in notes)


def opened(data, model, **more):
    return checked(open_samples(data, input_names=("x",), ranks={"x": 4}, **more), model.inputs)


def test_every_sample_is_announced_once(network, arrays):
    announced = []

    collect_shared(network, partial(opened, str(arrays)), InTurn(4), lambda: announced.append(1))

    assert len(announced) == 13


def test_samples_of_a_callable_are_shared_too(calibrated, callables):
    one = calibrated(callables("samples"))

    assert one == calibrated(callables("samples"), InTurn(2)) == calibrated(callables("samples"), InTurn(12))


def test_limits_count_for_all_workers_together(calibrated, arrays, callables):
    for data in (arrays, callables("samples")):
        assert calibrated(data, samples=5) == calibrated(data, InTurn(2), samples=5)


def test_of_images_each_worker_reads_its_own_only(calibrated, images, monkeypatch):
    read = []
    inner = Preprocessing.apply
    monkeypatch.setattr(Preprocessing, "apply", lambda self, image: read.append(1) or inner(self, image))
    preprocessing = Preprocessing.parse("scale=1")
    one = calibrated(images, preprocessing=preprocessing)
    alone = len(read)

    assert calibrated(images, InTurn(2), preprocessing=preprocessing) == one
    assert len(read) == 2 * alone


def test_a_worker_that_dies_changes_nothing(calibrated, callables, tmp_path):
    one = calibrated(callables("samples"))
    (tmp_path / "life").touch()
    recipe_name = callables("killing")

    class OnlyWorkersDie(Processes):
        """The samples are looked at before; a life is there only once the workers are."""

        def run(self, task, on_step=lambda: None):
            (tmp_path / "life").touch()
            return super().run(task, on_step)

    (tmp_path / "life").unlink()

    assert calibrated(recipe_name, OnlyWorkersDie(2)) == one
    assert not (tmp_path / "life").exists()


@pytest.mark.parametrize("name", ["other_ones_each_time", "fewer_each_time"])
def test_samples_that_differ_from_pass_to_pass_are_refused(name, calibrated, callables):
    with pytest.raises(InputError) as caught:
        calibrated(callables(name), InTurn(2))

    assert str(caught.value) == (
        "The samples differ from pass to pass, so that they cannot be shared among workers. "
        "Yield the same ones in the same order (seed what is random), or leave out --workers."
    )


def test_what_only_this_process_has_is_refused(network, tmp_path):
    recipe = Recipe(ModelSource.parse(str(network.path)), (), calibration=[{"x": np.zeros((1, 3, 4, 4), np.float32)}])

    with pytest.raises(InputError) as caught:
        pipeline.calibrate(recipe, tmp_path / "out.npz", workers=InTurn(2))

    assert str(caught.value) == (
        "A list given from Python cannot be shared: each worker opens data for itself. "
        "Name a folder, a file, or file.py:callable; or do without workers."
    )


def test_states_are_carried_in_every_worker(build, node, tmp_path):
    nodes = [node("Add", "x h", "s"), node("Sigmoid", "s", "next"), node("Identity", "next", "y")]
    model = build(nodes, {"x": [1, 4], "h": [1, 4]}, {"y": [1, 4], "next": [1, 4]})
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32))
    source = ModelSource.parse(str(model.path))
    recipe = Recipe(source, (), calibration=str(tmp_path / "x.npz"), states={"h": "next"})

    found = []
    for place, workers in enumerate([None, InTurn(3)]):
        pipeline.calibrate(recipe, tmp_path / f"{place}", workers=workers)
        found.append((tmp_path / f"{place}").read_bytes())

    assert found[0] == found[1]


values = st.lists(st.sampled_from([-0.0, 0.0, -1.5, 2.0, float("inf"), float("nan")]), min_size=1, max_size=4)


@settings(deadline=None)  # what the clock says is of no interest
@given(values, values)
def test_merging_is_exact_to_the_sign_of_zero(statistics_of, first, second):
    a, b = (statistics_of(np.array(each, np.float32)) for each in (first, second))
    whole = statistics_of(np.array(first + second, np.float32))

    for found in (a.merge(b), b.merge(a)):
        for name in ("channel_minimum", "channel_maximum"):
            assert getattr(found, name) == getattr(whole, name)
        assert np.signbit(found.channel_minimum) == np.signbit(a.merge(b).channel_minimum)
        assert np.signbit(found.channel_maximum) == np.signbit(a.merge(b).channel_maximum)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="NOT TESTED: Ray is not installed")
def test_a_ray_cluster_leaves_the_same_file(calibrated, arrays):
    with ray_cluster("local", 2) as workers:
        assert calibrated(arrays, workers) == calibrated(arrays)


def test_an_export_shares_its_calibration(network, arrays, tmp_path):
    np.savez(tmp_path / "unlabelled.npz", x=np.load(arrays)["x"])
    data, source = str(tmp_path / "unlabelled.npz"), ModelSource.parse(str(network.path))
    recipe = Recipe(source, (TargetRequest("ort-cpu"),), calibration=data)
    pipeline.run(recipe, tmp_path / "alone")

    pipeline.run(recipe, tmp_path / "shared", workers=InTurn(3))

    for name in ("calibration/statistics.npz", "ort-cpu/model.onnx"):
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "shared" / name).read_bytes()
