"""Requests to a live server, through the Open Inference Protocol v2: what it says of a model, and what it answers."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from qdeploy.backend import Arrays
from qdeploy.bundle.packages.triton import MODEL_DIGEST
from qdeploy.errors import UnavailableError

MOST_FAILURES = 8
"""Requests without an answer after which no more are sent."""

GRACE = 2.0
"""Seconds that a request may take beyond its time limit, which the client keeps for each part of it alone."""


@dataclass(frozen=True)
class Server:
    """A model on a server.

    Attributes:
        url: As the user gave it, "http://host:port" or "grpc://host:port".
        model: Its name there.
        version: Of the model; empty for the one that the server chooses.
        timeout: Seconds that a request may take.
    """

    url: str
    model: str
    version: str
    timeout: float

    @property
    def protocol(self) -> Any:
        """The client's module for the URL's scheme."""
        if urlsplit(self.url).scheme == "http":
            from tritonclient import http as protocol
        else:
            from tritonclient import grpc as protocol
        return protocol

    @property
    def address(self) -> str:
        """The URL without its scheme."""
        return self.url.partition("://")[2].rstrip("/")

    @property
    def limits(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """How the time limit is told: what the client is made with, and what each call of it takes."""
        if urlsplit(self.url).scheme == "http":
            return {"connection_timeout": self.timeout, "network_timeout": self.timeout}, {}
        return {}, {"client_timeout": self.timeout}


@dataclass(frozen=True)
class Metadata:
    """What a server says of a model.

    Attributes:
        versions: That it serves.
        inputs: Type and shape by name, for example "FP32[1, 10]".
        outputs: Likewise.
        digest: Of the model that its configuration was written for; empty if it does not say.
    """

    versions: tuple[str, ...]
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    digest: str = ""

    @classmethod
    def parse(cls, said: Mapping[str, Any], config: Mapping[str, Any]) -> Metadata:
        """From the protocol's answers as JSON; gRPC writes its integers as texts."""

        def tensors(listed: Any) -> dict[str, str]:
            return {each["name"]: f"{each['datatype']}{list(map(int, each['shape']))}" for each in listed}

        versions = tuple(map(str, said.get("versions", ())))
        digest = config.get("parameters", {}).get(MODEL_DIGEST, {}).get("string_value", "")
        return cls(versions, tensors(said["inputs"]), tensors(said["outputs"]), digest)


@dataclass(frozen=True)
class Case:
    """A sample to send, and what the bundle's runner gave for it.

    Attributes:
        kind: "golden" or "evaluation".
        sample: Its index among those.
        inputs: As the server takes them.
        expected: The outputs.
        labels: If it has any.
    """

    kind: str
    sample: int
    inputs: Arrays
    expected: Arrays
    labels: NDArray[Any] | None = None


@dataclass(frozen=True)
class Answer:
    """What came of one request.

    Attributes:
        case: What was sent.
        milliseconds: From sending to having the arrays.
        off: By output, the largest absolute difference from the bundle's; empty if there was an error.
        agreement: Share of rows of the first output whose largest value stands where the bundle's does, if it has rows.
        outputs: Kept of a labelled sample alone.
        error: Why there are no outputs.
    """

    case: Case
    milliseconds: float = 0.0
    off: Mapping[str, float] = field(default_factory=dict)
    agreement: float | None = None
    outputs: Arrays = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True)
class Replayed:
    """Requests that were sent, and what came of them.

    Attributes:
        requests: How many were to be answered.
        answers: As they came.
        seconds: From the first request to the last answer.
    """

    requests: int
    answers: Sequence[Answer]
    seconds: float


def metadata(server: Server) -> Metadata:
    """What the server says of the model.

    Raises:
        UnavailableError: It does not answer, or does not know the model.
    """
    answer: SimpleQueue[Metadata | Exception] = SimpleQueue()

    def ask() -> None:
        making, calling = server.limits
        as_json = {"as_json": True} if calling else {}
        try:
            with server.protocol.InferenceServerClient(server.address, **making) as client:
                said = client.get_model_metadata(server.model, server.version, **calling, **as_json)
                answer.put(Metadata.parse(said, _config(client, server, {**calling, **as_json})))
        except Exception as error:  # noqa: BLE001 - the client raises whatever its transport does
            answer.put(error)

    Thread(target=ask, daemon=True).start()
    try:
        found = answer.get(timeout=2 * server.timeout + GRACE)
    except Empty:
        found = TimeoutError(f"no answer within {server.timeout:g} s")
    if isinstance(found, Exception):
        which = f"version {server.version} of the model" if server.version else "the model"
        what = f"The server {server.url} does not serve {which} {server.model!r}: {_message(found)}"
        cure = "Start it, or name the model with --model; --timeout gives it more time."
        raise UnavailableError(what, cure) from found
    return found


def _config(client: Any, server: Server, calling: Mapping[str, Any]) -> Mapping[str, Any]:
    """The model's configuration; empty from a server without Triton's extension of the protocol that tells it."""
    from tritonclient.utils import InferenceServerException

    try:
        said: Mapping[str, Any] = client.get_model_config(server.model, server.version, **calling)
    except InferenceServerException:
        return {}
    found: Mapping[str, Any] = said.get("config", said)
    return found


def _message(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith(".") else f"{text}."


def replay(server: Server, parts: Iterable[Sequence[Case]], concurrency: int) -> Iterator[Replayed]:
    """Send cases part by part; no more once the server leaves too many without an answer.

    Args:
        server: To send them to.
        parts: Each is taken when the one before is answered, so that making it ready disturbs no measurement.
        concurrency: Requests under way at a time.
    """
    waiting: SimpleQueue[Case | None] = SimpleQueue()
    answers: SimpleQueue[Answer] = SimpleQueue()
    stopped = Event()
    # A client is not shared: that of HTTP serves one thread.
    threads = [Thread(target=_work, args=(server, waiting, answers, stopped), daemon=True) for _ in range(concurrency)]
    for thread in threads:
        thread.start()
    failures = 0
    try:
        for part in parts:
            start = time.perf_counter()
            for case in part:
                waiting.put(case)
            found = list(_until_hopeless(answers, len(part), MOST_FAILURES - failures, server.timeout + GRACE))
            yield Replayed(len(part), found, time.perf_counter() - start)
            failures += sum(bool(answer.error) for answer in found)
            if len(found) < len(part) or failures >= MOST_FAILURES:
                return
    finally:
        stopped.set()
        for _ in threads:
            waiting.put(None)
        deadline = time.monotonic() + server.timeout + GRACE
        for thread in threads:  # a client that is at work when the process ends can crash it
            thread.join(max(0.0, deadline - time.monotonic()))


def _until_hopeless(answers: SimpleQueue[Answer], count: int, failures: int, patience: float) -> Iterator[Answer]:
    """Up to `count` answers, until so many are failures or none comes for `patience` seconds."""
    for _ in range(count):
        try:
            answer = answers.get(timeout=patience)
        except Empty:
            return
        yield answer
        failures -= bool(answer.error)
        if not failures:
            return


def _work(server: Server, waiting: SimpleQueue[Case | None], answers: SimpleQueue[Answer], stopped: Event) -> None:
    """Send what waits, one after the other, until there is None."""
    making, calling = server.limits
    with server.protocol.InferenceServerClient(server.address, **making) as client:
        while (case := waiting.get()) is not None and not stopped.is_set():
            answers.put(_answer(client, server, case, calling))


def _answer(client: Any, server: Server, case: Case, calling: Mapping[str, Any]) -> Answer:
    from tritonclient.utils import np_to_triton_dtype

    start = time.perf_counter()
    try:
        tensors = []
        for name, given in case.inputs.items():
            array = np.ascontiguousarray(given)  # a scalar becomes [1], as Triton has it
            tensor = server.protocol.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
            tensor.set_data_from_numpy(array)
            tensors.append(tensor)
        result = client.infer(server.model, tensors, server.version, **calling)
        outputs = {name: result.as_numpy(name) for name in case.expected}
    except Exception as error:  # noqa: BLE001 - the client raises whatever its transport does
        return Answer(case, error=_message(error))
    milliseconds = (time.perf_counter() - start) * 1000
    odd = [name for name, wanted in case.expected.items() if getattr(outputs[name], "dtype", None) != wanted.dtype]
    if odd:
        return Answer(case, milliseconds, error=f"The answer lacks {', '.join(odd)}, or has another type for it.")
    off = {name: distance(outputs[name], wanted) for name, wanted in case.expected.items()}
    first = next(iter(case.expected))
    kept = outputs if case.labels is not None else {}
    return Answer(case, milliseconds, off, _agreement(outputs[first], case.expected[first]), kept)


def distance(found: Any, expected: Any) -> float:
    """The largest absolute difference; infinite if one alone is not a number, or the shapes differ."""
    if found.size != expected.size:
        return float("inf")
    found, expected = (np.asarray(array, np.float64).ravel() for array in (found, expected))
    same = (found == expected) | (np.isnan(found) & np.isnan(expected))
    with np.errstate(invalid="ignore"):  # two equal infinities
        distances = np.where(same, 0.0, np.abs(found - expected))
    return float(np.max(np.where(np.isnan(distances), np.inf, distances), initial=0.0))


def _agreement(found: Any, expected: Any) -> float | None:
    """Share of rows, along the last axis, with their largest value at the same place; None where there is no choice."""
    if expected.ndim < 2 or expected.shape[-1] < 2 or found.shape != expected.shape:
        return None
    return float(np.mean(np.argmax(found, -1) == np.argmax(expected, -1)))
