"""Work in parts: results in order whoever does them, dead workers replaced, and what tasks raise."""

import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from qdeploy.errors import InputError, InternalError, UnavailableError
from qdeploy.workers import PackedModel, Processes, hired, ray_cluster


@dataclass(frozen=True)
class Square:
    """Squares its part, with so many steps before."""

    steps: int = 3

    def __call__(self, part, on_step):
        for _ in range(self.steps):
            on_step()
        return part**2, os.getpid()


@dataclass(frozen=True)
class Dying:
    """Is killed in the middle of part 1, as often as there are files to take away."""

    folder: Path

    def __call__(self, part, on_step):
        on_step()
        lives = sorted(self.folder.iterdir())
        if part == 1 and lives:
            lives[0].unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        on_step()
        return part


class PickyError(Exception):
    """Cannot be made again from its arguments."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


@dataclass(frozen=True)
class Failing:
    """Raises."""

    error: str

    def __call__(self, part, on_step):
        on_step()
        if part == 1:
            if self.error == "input":
                raise InputError("The sample is torn.", "Mend it.")
            if self.error == "picky":
                raise PickyError("cheese", "wine")
            raise KeyError("lost")
        return part


def lives(folder, number):
    for index in range(number):
        (folder / str(index)).touch()
    return folder


def test_results_come_in_the_order_of_the_parts():
    steps = []

    found = Processes(3).run(Square(), lambda: steps.append(1))

    assert [square for square, _ in found] == [0, 1, 4]
    assert len({process for _, process in found} | {os.getpid()}) == 4
    assert len(steps) == 9


def test_the_cores_are_shared_among_the_processes():
    cores = os.cpu_count()

    assert [Processes(count).threads for count in (1, cores, cores + 1)] == [cores, 1, 1]


@pytest.mark.parametrize("deaths", [1, 2])
def test_a_worker_that_dies_is_replaced_and_its_steps_count_once(deaths, tmp_path):
    steps = []

    found = Processes(2).run(Dying(lives(tmp_path, deaths)), lambda: steps.append(1))

    assert found == [0, 1]
    assert len(steps) == 4
    assert not any(tmp_path.iterdir())


def test_a_part_that_kills_every_worker_is_given_up(tmp_path):
    with pytest.raises(UnavailableError) as caught:
        Processes(2).run(Dying(lives(tmp_path, 9)))

    assert str(caught.value) == (
        "Worker 1 died 3 times, at last killed by signal 9. "
        "If memory was short, use fewer --workers; else do without, to see why."
    )
    assert len([*tmp_path.iterdir()]) == 6


def test_what_the_user_can_mend_comes_through():
    with pytest.raises(InputError) as caught:
        Processes(2).run(Failing("input"))

    assert (caught.value.what, caught.value.cure) == ("The sample is torn.", "Mend it.")


def test_a_bug_comes_through_with_the_workers_own_traceback():
    with pytest.raises(KeyError, match="lost") as caught:
        Processes(2).run(Failing("key"))

    assert 'raise KeyError("lost")' in str(caught.value.__cause__)


def test_an_exception_that_no_pickle_holds_is_told_all_the_same():
    with pytest.raises(InternalError, match="PickyError: cheese and wine"):
        Processes(2).run(Failing("picky"))


@dataclass(frozen=True)
class Endless:
    """Never ends by itself."""

    def __call__(self, part, on_step):
        on_step()
        time.sleep(600 + part)


def test_who_interrupts_the_work_leaves_no_process_behind():
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Processes(2).run(Endless(), interrupt)

    assert multiprocessing.active_children() == []


@dataclass(frozen=True)
class Leaving:
    """Ends its process with an exit code of its own."""

    def __call__(self, part, on_step):
        on_step()
        os._exit(5 + part)


def test_the_exit_code_of_dead_workers_is_told():
    with pytest.raises(UnavailableError, match="Worker 0 died 3 times, at last exit code 5"):
        Processes(1).run(Leaving())


@pytest.mark.parametrize("count", [None, 1])
def test_one_worker_is_this_process(count):
    with hired(count, None) as workers:
        assert workers is None


def test_several_workers_are_processes():
    with hired(3, None) as workers:
        assert isinstance(workers, Processes)
        assert workers.count == 3


@pytest.mark.parametrize("count", [0, -2])
def test_no_workers_are_refused(count):
    with pytest.raises(InputError, match=f"--workers cannot be {count}. Give at least 1."), hired(count, None):
        pass


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)

    with pytest.raises(UnavailableError) as caught, ray_cluster("auto"):
        pass

    assert str(caught.value) == "Ray is not installed. Install it: pip install 'qdeploy[distributed]'"


class Far(Processes):
    """Workers that see other files."""

    far = True


def test_a_model_travels_with_all_of_its_files(build, node, tmp_path):
    import numpy as np
    import onnx

    weight = np.ones((300, 300), np.float32)
    model = build([node("MatMul", "x w", "y")], {"x": [1, 300]}, {"y": [1, 300]}, {"w": weight})
    proto = onnx.load(model.path)
    onnx.save(proto, model.path, save_as_external_data=True, location="weights.bin", size_threshold=0)

    packed = PackedModel.of(model, Far(2))

    assert set(packed.luggage.files) == {model.path.name, "weights.bin"}
    with packed.unpacked() as there:
        assert there.path != model.path
        assert there.digest == model.digest
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(onnx.load(there.path).graph.initializer[0]), weight)
    assert not there.path.exists()


def test_a_model_stays_where_workers_see_it(build, node):
    model = build([node("Relu", "x", "y")], {"x": [1]}, {"y": [1]})

    packed = PackedModel.of(model, Processes(2))

    assert packed.luggage.files == {}
    with packed.unpacked() as there:
        assert there == model


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="NOT TESTED: Ray is not installed")
def test_a_ray_cluster_does_the_same(tmp_path):
    steps = []
    (tmp_path / "lives").mkdir()

    with ray_cluster("local", 3) as workers:
        found = workers.run(Square(), lambda: steps.append(1))
        died = workers.run(Dying(lives(tmp_path / "lives", 1)))
        with pytest.raises(InputError, match=r"The sample is torn\. Mend it\."):
            workers.run(Failing("input"))
        with pytest.raises(UnavailableError, match="The Ray cluster lost a task"):
            workers.run(Dying(lives(tmp_path / "lives", 9)))

    assert [square for square, _ in found] == [0, 1, 4]
    assert len(steps) == 9
    assert died == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="NOT TESTED: Ray is not installed")
def test_where_there_is_no_cluster_it_is_said():
    with (
        pytest.raises(UnavailableError, match=r"There is no Ray cluster at '127\.0\.0\.1:1'"),
        ray_cluster("127.0.0.1:1"),
    ):
        pass
