"""Work in equal parts, each done by a worker: a process of this machine, or a task of a Ray cluster.

A worker that dies is replaced, and its part begun anew. What comes out is in the order of the parts, so that it does
not depend on who did which, when, or how often.
"""

from __future__ import annotations

import os
import pickle
import signal
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from qdeploy.errors import InputError, InternalError, UnavailableError
from qdeploy.model import FloatModel, model_files

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

ATTEMPTS = 3
"""How often a part is begun before its workers' deaths are taken for its own fault."""

Result = TypeVar("Result")
Step = Callable[[], None]
Task = Callable[[int, Step], Result]
"""Does one part, by its number, and calls a function once for each step done. Anything that pickle takes."""


class Workers(ABC):
    """Those who do the parts.

    Attributes:
        count: Into how many parts work is cut.
        threads: Threads that each of them may use.
        far: Whether they may be on machines that see other files.
    """

    count: int
    threads: int
    far: ClassVar[bool]

    @abstractmethod
    def run(self, task: Task[Result], on_step: Step = lambda: None) -> list[Result]:
        """The result of each part, in order.

        Args:
            task: Done once a part; must give the same each time.
            on_step: Called for each step of any worker, once even if a part is begun again.

        Raises:
            UnavailableError: Workers died on the same part again and again.
            Exception: What the task raised.
        """


class Processes(Workers):
    """New processes of this machine, which share its cores."""

    far = False

    def __init__(self, count: int) -> None:
        self.count = count
        self.threads = max(1, (os.cpu_count() or 1) // count)

    def run(self, task: Task[Result], on_step: Step = lambda: None) -> list[Result]:
        """As `Workers.run`, each part in a process of its own."""
        results: dict[int, Result] = {}
        running: dict[Connection, _Child] = {}
        try:
            for part in range(self.count):
                child = _Child(task, part)
                running[child.connection] = child
            while running:
                for connection in wait(running):
                    child = running[connection]  # type: ignore[index]  # it was among the keys
                    message = child.receive()
                    if isinstance(message, _StepDone):
                        if child.is_new_step():
                            on_step()
                        continue
                    del running[child.connection]
                    if isinstance(message, _Failed):
                        raise message.error from _WorkerTracebackError(message.trace)
                    if message is None:
                        child = child.replaced()
                        running[child.connection] = child
                    else:
                        results[child.part] = message.result
        finally:
            for child in running.values():
                child.end()
        return [results[part] for part in range(self.count)]


@dataclass(frozen=True)
class _StepDone:
    """A worker tells of a step."""


@dataclass(frozen=True)
class _Finished:
    """A worker's last word."""

    result: Any


@dataclass(frozen=True)
class _Failed:
    """A worker's last word if its task raised."""

    error: Exception
    trace: str


class _WorkerTracebackError(Exception):
    """The traceback of another process, to be shown above our own."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class _Child:
    """A process at work on a part."""

    def __init__(self, task: Task[Any], part: int, attempt: int = 1, known_steps: int = 0) -> None:
        self.part = part
        self._task = task
        self._attempt = attempt
        self._steps = 0
        self._known_steps = known_steps
        context = get_context("spawn")  # a fork would copy the locks of ONNX Runtime's threads, but not the threads
        self.connection, theirs = context.Pipe(duplex=False)
        self._process: SpawnProcess = context.Process(target=_serve, args=(task, part, theirs))
        self._process.start()
        theirs.close()  # so that its end shows here

    def receive(self) -> _StepDone | _Finished | _Failed | None:
        """What it says, or None if it died."""
        try:
            message: _StepDone | _Finished | _Failed = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join(1)  # else its exit code would be that of our kill
            message = None  # type: ignore[assignment]
        if not isinstance(message, _StepDone):
            self.end()
        return message

    def is_new_step(self) -> bool:
        """Whether none that died before had done this step already."""
        self._steps += 1
        return self._steps > self._known_steps

    def replaced(self) -> _Child:
        """Another one in the place of this one, which died.

        Raises:
            UnavailableError: Too many died.
        """
        if self._attempt == ATTEMPTS:
            code = self._process.exitcode
            how = f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
            what = f"Worker {self.part} died {ATTEMPTS} times, at last {how}."
            raise UnavailableError(what, "If memory was short, use fewer --workers; else do without, to see why.")
        return _Child(self._task, self.part, self._attempt + 1, max(self._steps, self._known_steps))

    def end(self) -> None:
        """Kill it, if it still runs."""
        self._process.kill()
        self._process.join()
        self.connection.close()


def _serve(task: Task[Any], part: int, connection: Connection) -> None:
    """What a worker process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal interrupts all its processes; ours answers for them
    try:
        last: _Finished | _Failed = _Finished(task(part, partial(connection.send, _StepDone())))
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent raises it
        last = _Failed(_picklable(error), traceback.format_exc())
    connection.send(last)


def _picklable(error: Exception) -> Exception:
    """The exception, or one that says the same and survives pickling."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    except Exception:  # noqa: BLE001 - an exception of the user's may do anything here
        return InternalError(f"{type(error).__name__}: {error}")
    return error


class _RayTasks(Workers):
    """Tasks of a Ray cluster, one a core; they may run on other machines."""

    far = True
    threads = 1

    def __init__(self, count: int) -> None:
        self.count = count

    def run(self, task: Task[Result], on_step: Step = lambda: None) -> list[Result]:
        """As `Workers.run`; steps are told when a part is done."""
        import ray

        remote = ray.remote(max_retries=ATTEMPTS - 1, num_cpus=1)(_counted)
        shared = ray.put(task)  # once for all parts
        references = [remote.remote(shared, part) for part in range(self.count)]
        results: dict[Any, Result] = {}
        waiting = list(references)
        try:
            while waiting:
                (done, *_), waiting = ray.wait(waiting)
                results[done], steps = ray.get(done)
                for _ in range(steps):
                    on_step()
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayError as error:
            raise UnavailableError(f"The Ray cluster lost a task: {error}", "See its logs: ray status.") from error
        finally:
            for reference in waiting:
                ray.cancel(reference, force=True)
        return [results[reference] for reference in references]


def _counted(task: Task[Result], part: int) -> tuple[Result, int]:
    """The result of a part, and the number of its steps."""
    steps: list[None] = []
    return task(part, partial(steps.append, None)), len(steps)


@contextmanager
def ray_cluster(address: str, count: int | None = None) -> Iterator[Workers]:
    """The workers of a Ray cluster.

    Args:
        address: Of a running cluster, as `ray.init` takes it: "ray://host:10001", "host:6379", "auto"; "local" starts
            one on this machine for the time being. A connection that there is already is used, and left open.
        count: How many; None for one a core of the cluster.

    Raises:
        UnavailableError: Ray is not installed, or there is no cluster.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise UnavailableError("Ray is not installed.", "Install it: pip install 'qdeploy[distributed]'") from error
    connected = ray.is_initialized()  # by the user's own script
    try:
        if not connected:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        what = f"There is no Ray cluster at {address!r}: {error}"
        cure = "Start one (ray start --head), set RAY_AUTH_TOKEN if it asks for a token, or give --ray local."
        raise UnavailableError(what, cure) from error
    try:
        yield _RayTasks(count or max(1, int(ray.cluster_resources().get("CPU", 1))))
    finally:
        if not connected:
            ray.shutdown()


@contextmanager
def hired(count: int | None, ray_address: str | None) -> Iterator[Workers | None]:
    """The workers that --workers and --ray ask for; None where this process is enough.

    Raises:
        InputError: The number is no number of workers.
        UnavailableError: Ray is not installed, or there is no cluster.
    """
    if count is not None and count < 1:
        raise InputError(f"--workers cannot be {count}.", "Give at least 1.")
    if ray_address is not None:
        with ray_cluster(ray_address, count) as workers:
            yield workers
    else:
        yield None if count in (None, 1) else Processes(count)


@dataclass(frozen=True)
class Luggage:
    """A folder on its way to workers: by its path, and with its files where they may see others.

    Attributes:
        folder: Where it lies here.
        files: Their contents by name; empty for workers that see the same files.
    """

    folder: Path
    files: Mapping[str, bytes]

    @classmethod
    def of(cls, folder: Path, paths: Iterable[Path], workers: Workers) -> Luggage:
        """These files of a folder as the workers need them."""
        if not workers.far:
            return cls(folder, {})
        return cls(folder, {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths})

    @contextmanager
    def unpacked(self) -> Iterator[Path]:
        """The folder where its files can be opened."""
        if not self.files:
            yield self.folder
            return
        with TemporaryDirectory(prefix="qdeploy-") as folder:
            for name, content in self.files.items():
                path = Path(folder) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            yield Path(folder)


@dataclass(frozen=True)
class PackedModel:
    """A float model on its way to workers."""

    model: FloatModel
    luggage: Luggage

    @classmethod
    def of(cls, model: FloatModel, workers: Workers) -> PackedModel:
        """The model as these workers need it."""
        return cls(model, Luggage.of(model.path.parent, model_files(model.path), workers))

    @contextmanager
    def unpacked(self) -> Iterator[FloatModel]:
        """The model where it can be opened."""
        with self.luggage.unpacked() as folder:
            yield replace(self.model, path=folder / self.model.path.name)
