"""A live server against a bundle: golden samples are replayed through the Open Inference Protocol v2.

An answer is wrong if it is further from what the bundle's runner gave than quantization itself moved the golden
outputs from FP32: another processor may round differently, a changed model or preprocessing is off by more.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from qdeploy.backend import Arrays
from qdeploy.bundle.golden import GoldenSample, read_golden
from qdeploy.bundle.load import open_bundle
from qdeploy.bundle.packages.package import targets_named
from qdeploy.bundle.packages.triton import TYPES, require_client
from qdeploy.errors import InputError, UnavailableError

if TYPE_CHECKING:
    from qdeploy.bundle.manifest import Manifest
    from qdeploy.model import TensorSpec

FLOAT = "float"
ROUNDING = 1e-5
"""What float32 sums in another order may differ by, as a part of the largest value."""

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
        timeout: Seconds that a request may take.
    """

    url: str
    model: str
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
    """

    versions: tuple[str, ...]
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]

    @classmethod
    def parse(cls, said: Mapping[str, Any]) -> Metadata:
        """From the protocol's answer as JSON; gRPC writes its integers as texts."""

        def tensors(listed: Any) -> dict[str, str]:
            return {each["name"]: f"{each['datatype']}{list(map(int, each['shape']))}" for each in listed}

        versions = tuple(map(str, said.get("versions", ())))
        return cls(versions, tensors(said["inputs"]), tensors(said["outputs"]))


@dataclass(frozen=True)
class Case:
    """A golden sample to send: its index, its inputs, and what the bundle's runner gave for it."""

    sample: int
    inputs: Arrays
    expected: Arrays


@dataclass(frozen=True)
class Answer:
    """What came of one request.

    Attributes:
        sample: Index of the golden sample.
        milliseconds: From sending to having the arrays.
        off: By output, the largest absolute difference from the bundle's; empty if there was an error.
        agreement: Share of rows of the first output whose largest value stands where the bundle's does, if it has rows.
        error: Why there are no arrays.
    """

    sample: int
    milliseconds: float
    off: Mapping[str, float] = field(default_factory=dict)
    agreement: float | None = None
    error: str = ""


@dataclass(frozen=True)
class Replay:
    """Requests that were sent, and what came of them.

    Attributes:
        requests: How many were to be answered.
        answers: As they came.
        seconds: From the first request to the last answer.
    """

    requests: int
    answers: Sequence[Answer]
    seconds: float


@dataclass(frozen=True)
class Verification:
    """What a server made of the golden samples.

    Attributes:
        url: Of the server.
        model: Its name there.
        versions: That the server says it serves.
        target: The folder of the bundle that its answers are compared with.
        differences: Where its metadata are not the bundle's; then no sample was sent.
        requests: How many were to be answered.
        answered: How many were.
        max_abs_error: Of each output, against the bundle's runner.
        wrong_samples: Golden samples, by index, with an answer off by more than quantization explains.
        agreement: Share of answers whose first output has its largest value where the bundle's has.
        latency_ms: p50, p90, p99 over the answers.
        throughput: Answers a second.
        errors: Message → how often it came.
    """

    url: str
    model: str
    versions: tuple[str, ...]
    target: str
    differences: tuple[str, ...]
    requests: int
    answered: int = 0
    max_abs_error: Mapping[str, float] = field(default_factory=dict)
    wrong_samples: tuple[int, ...] = ()
    agreement: float | None = None
    latency_ms: Mapping[str, float] | None = None
    throughput: float | None = None
    errors: Mapping[str, int] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """3 if requests were left without an answer, 1 if the server is not the bundle, otherwise 0."""
        if self.differences:
            return 1
        return UnavailableError.exit_code if self.answered < self.requests else int(bool(self.wrong_samples))

    def to_json(self) -> dict[str, Any]:
        """All fields as plain JSON values; what is no number is null."""
        status = {0: "pass", 1: "fail", 3: "unanswered"}[self.exit_code]
        fields = {name: dict(value) if isinstance(value, Mapping) else value for name, value in vars(self).items()}
        errors = {name: value if np.isfinite(value) else None for name, value in self.max_abs_error.items()}
        return {"schema": 1, "status": status, **fields, "max_abs_error": errors}


def verify(
    path: Path,
    url: str,
    *,
    model: str | None = None,
    target: str | None = None,
    requests: int | None = None,
    concurrency: int = 1,
    timeout: float = 10.0,
) -> Verification:
    """Replay a bundle's golden samples on a server.

    Args:
        path: The bundle.
        url: "http://host:port" or "grpc://host:port".
        model: Its name on the server; None for the name that `package_triton` gives it.
        target: A folder of the bundle or a backend to compare with; None for the first.
        requests: How many to send, in turn over the golden samples; None for each sample once.
        concurrency: Requests under way at a time.
        timeout: Seconds for one request.

    Raises:
        InputError: The bundle is damaged or has no golden samples, or the URL or a number cannot be used.
        UnavailableError: tritonclient is not installed, or the server does not serve the model.
    """
    _require_sense(url, requests, concurrency, timeout)
    require_client()
    bundle = open_bundle(path)
    entry = targets_named(bundle, [target] if target else [])[0]
    golden = read_golden(bundle)
    if not golden:
        raise InputError(
            f"The bundle {path} holds no golden samples.", "Export it with evaluation samples below 16 MB."
        )
    server = Server(url, model or f"{path.resolve().name}-{entry.folder}", timeout)
    metadata = _metadata(server)
    differences = tuple(_differences(metadata, bundle.manifest))
    count = requests or len(golden)
    if differences:
        return Verification(url, server.model, metadata.versions, entry.folder, differences, count)
    cases = [Case(i, sample.inputs, sample.outputs[entry.folder]) for i, sample in enumerate(golden)]
    replay = _replay(server, cases, count, concurrency)
    return _verification(server, metadata.versions, entry.folder, _allowed(golden, entry.folder), replay)


def _require_sense(url: str, requests: int | None, concurrency: int, timeout: float) -> None:
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "grpc") and bool(parts.hostname) and parts.port is not None
    except ValueError:
        sound = False
    if not sound:
        raise InputError(f"--url cannot be {url!r}.", "Write http://HOST:PORT or grpc://HOST:PORT.")
    for name, number in (("--samples", requests), ("--concurrency", concurrency), ("--timeout", timeout)):
        if number is not None and not number > 0:
            raise InputError(f"{name} cannot be {number}.", "Give a number above 0.")


def _metadata(server: Server) -> Metadata:
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
                said = client.get_model_metadata(server.model, **calling, **as_json)
            answer.put(Metadata.parse(said))
        except Exception as error:  # noqa: BLE001 - the client raises whatever its transport does
            answer.put(error)

    Thread(target=ask, daemon=True).start()
    try:
        found = answer.get(timeout=server.timeout + GRACE)
    except Empty:
        found = TimeoutError(f"no answer within {server.timeout:g} s")
    if isinstance(found, Exception):
        what = f"The server {server.url} does not serve the model {server.model!r}: {_message(found)}"
        cure = "Start it, or name the model with --model; --timeout gives it more time."
        raise UnavailableError(what, cure) from found
    return found


def _message(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith(".") else f"{text}."


def _differences(metadata: Metadata, manifest: Manifest) -> Iterator[str]:
    """Where the server's inputs and outputs are not the bundle's, one sentence each."""
    both = (("input", manifest.inputs, metadata.inputs), ("output", manifest.outputs, metadata.outputs))
    for kind, specs, served in both:
        wanted = {spec.name: _as_served(spec) for spec in specs}
        for name in (name for name in wanted if name not in served):
            yield f"The server has no {kind} {name!r}; it has: {', '.join(served) or 'none'}."
        for name in (name for name in served if name not in wanted):
            yield f"The server has the {kind} {name!r}, which the bundle has not."
        for name in (name for name in wanted if served.get(name, wanted[name]) != wanted[name]):
            yield f"The {kind} {name!r} is {served[name]} on the server and {wanted[name]} in the bundle."


def _as_served(spec: TensorSpec) -> str:
    """Type and shape of a tensor in the protocol's words; a scalar is served as [1]."""
    dims = [dim if isinstance(dim, int) else -1 for dim in spec.shape] or [1]
    return f"{TYPES.get(spec.dtype, spec.dtype).removeprefix('TYPE_')}{dims}"


def _replay(server: Server, cases: Sequence[Case], count: int, concurrency: int) -> Replay:
    """Answers to `count` requests, as they come; fewer once the server leaves too many without one."""
    waiting: SimpleQueue[Case] = SimpleQueue()
    answers: SimpleQueue[Answer] = SimpleQueue()
    stopped = Event()
    for i in range(count):
        waiting.put(cases[i % len(cases)])

    def work() -> None:
        making, calling = server.limits
        with server.protocol.InferenceServerClient(server.address, **making) as client:
            while not stopped.is_set():
                try:
                    case = waiting.get_nowait()
                except Empty:
                    return
                answers.put(_answer(client, server, case, calling))

    # A client is not shared: that of HTTP serves one thread.
    threads = [Thread(target=work, daemon=True) for _ in range(min(concurrency, count))]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    try:
        found = list(_until_hopeless(answers, count, server.timeout + GRACE))
        return Replay(count, found, time.perf_counter() - start)
    finally:
        stopped.set()
        deadline = time.monotonic() + server.timeout + GRACE
        for thread in threads:  # a client that is at work when the process ends can crash it
            thread.join(max(0.0, deadline - time.monotonic()))


def _until_hopeless(answers: SimpleQueue[Answer], count: int, patience: float) -> Iterator[Answer]:
    """Up to `count` answers, until too many are failures or none comes for `patience` seconds."""
    failures = 0
    for _ in range(count):
        try:
            answer = answers.get(timeout=patience)
        except Empty:
            return
        yield answer
        failures += bool(answer.error)
        if failures == MOST_FAILURES:
            return


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
        result = client.infer(server.model, tensors, **calling)
        outputs = {name: result.as_numpy(name) for name in case.expected}
    except Exception as error:  # noqa: BLE001 - the client raises whatever its transport does
        return Answer(case.sample, 0.0, error=_message(error))
    milliseconds = (time.perf_counter() - start) * 1000
    odd = [name for name, wanted in case.expected.items() if getattr(outputs[name], "dtype", None) != wanted.dtype]
    if odd:
        return Answer(
            case.sample, milliseconds, error=f"The answer lacks {', '.join(odd)}, or has another type for it."
        )
    off = {name: _distance(outputs[name], wanted) for name, wanted in case.expected.items()}
    first = next(iter(case.expected))
    return Answer(case.sample, milliseconds, off, _agreement(outputs[first], case.expected[first]))


def _verification(
    server: Server, versions: tuple[str, ...], target: str, allowed: Mapping[str, float], replay: Replay
) -> Verification:
    """What the answers say of the server."""
    answered = [each for each in replay.answers if not each.error]
    wrong = {each.sample for each in answered for name, most in allowed.items() if not each.off[name] <= most}
    times = np.percentile([each.milliseconds for each in answered], (50, 90, 99)).tolist() if answered else None
    agreements = [each.agreement for each in answered if each.agreement is not None]
    return Verification(
        server.url,
        server.model,
        versions,
        target,
        (),
        replay.requests,
        len(answered),
        max_abs_error={name: max(each.off[name] for each in answered) for name in allowed} if answered else {},
        wrong_samples=tuple(sorted(wrong)),
        agreement=float(np.mean(agreements)) if agreements else None,
        latency_ms=dict(zip(("p50", "p90", "p99"), times, strict=True)) if times else None,
        throughput=len(answered) / replay.seconds if answered else None,
        errors=Counter(each.error for each in replay.answers if each.error),
    )


def _allowed(golden: Sequence[GoldenSample], target: str) -> dict[str, float]:
    """How far an answer may be off, by output: as far as the golden outputs are from FP32, or float32's rounding."""
    allowed = {}
    for name in golden[0].outputs[target]:
        pairs = [(sample.outputs[target][name], sample.outputs[FLOAT][name]) for sample in golden]
        moved = [_distance(*pair) for pair in pairs]
        rounding = [ROUNDING * _distance(ours, np.zeros_like(ours)) for ours, _ in pairs]
        # A sample with values that are not finite says nothing of how far the others may be off.
        allowed[name] = max((each for each in (*moved, *rounding) if np.isfinite(each)), default=0.0)
    return allowed


def _distance(found: Any, expected: Any) -> float:
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
