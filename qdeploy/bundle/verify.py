"""A live server against a bundle: golden samples are replayed through the Open Inference Protocol v2.

An answer is wrong if it is further from what the bundle's runner gave than quantization itself moved the golden
outputs from FP32: another processor may round differently, a changed model or preprocessing is off by more.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread
from types import MappingProxyType
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
    from qdeploy.bundle.manifest import BundledTarget, Manifest

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
class Answer:
    """What came of one request.

    Attributes:
        sample: Index of the golden sample.
        milliseconds: From sending to having the arrays.
        outputs: By name; empty if there was an error.
        error: Why there are none.
    """

    sample: int
    milliseconds: float
    outputs: Arrays
    error: str = ""


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
    max_abs_error: Mapping[str, float] = MappingProxyType({})
    wrong_samples: tuple[int, ...] = ()
    agreement: float | None = None
    latency_ms: Mapping[str, float] | None = None
    throughput: float | None = None
    errors: Mapping[str, int] = MappingProxyType({})

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
        raise InputError(f"The bundle {path} holds no golden samples.", "Export it with evaluation samples below 16 MB.")
    server = Server(url, model or f"{path.resolve().name}-{entry.folder}", timeout)
    metadata = _metadata(server)
    versions = tuple(map(str, metadata.get("versions", ())))
    differences = tuple(_differences(metadata, bundle.manifest))
    count = requests or len(golden)
    if differences:
        return Verification(url, server.model, versions, entry.folder, differences, count)
    names = [spec.name for spec in bundle.manifest.outputs]
    start = time.perf_counter()
    answers = _replay(server, [sample.inputs for sample in golden], names, count, concurrency)
    seconds = time.perf_counter() - start
    return _verification(server, versions, entry, golden, answers, count, seconds)


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


def _metadata(server: Server) -> Mapping[str, Any]:
    """What the server says of the model.

    Raises:
        UnavailableError: It does not answer, or does not know the model.
    """
    making, calling = server.limits
    as_json = {"as_json": True} if calling else {}
    try:
        client = server.protocol.InferenceServerClient(server.address, **making)
        with client:
            found: Mapping[str, Any] = client.get_model_metadata(server.model, **calling, **as_json)
    except Exception as error:  # the client raises whatever its transport does
        what = f"The server {server.url} does not serve the model {server.model!r}: {_message(error)}"
        raise UnavailableError(what, "Start it, or name the model with --model; --timeout gives it more time.") from error
    return found


def _message(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith(".") else f"{text}."


def _differences(metadata: Mapping[str, Any], manifest: Manifest) -> list[str]:
    """Where the server's inputs and outputs are not the bundle's, one sentence each."""
    differences = []
    for kind, specs in (("input", manifest.inputs), ("output", manifest.outputs)):
        served = {each["name"]: each for each in metadata.get(f"{kind}s", ())}
        for spec in specs:
            dims = [dim if isinstance(dim, int) else -1 for dim in spec.shape] or [1]
            wanted = (TYPES[spec.dtype].removeprefix("TYPE_"), dims)
            if spec.name not in served:
                differences.append(f"The server has no {kind} {spec.name!r}; it has: {', '.join(served) or 'none'}.")
                continue
            found = (served[spec.name]["datatype"], [int(dim) for dim in served[spec.name]["shape"]])
            if found != wanted:
                differences.append(
                    f"The {kind} {spec.name!r} is {found[0]}{found[1]} on the server and {wanted[0]}{wanted[1]} in the bundle."
                )
        known = {spec.name for spec in specs}
        differences += [f"The bundle has no {kind} {name!r}, the server has." for name in served if name not in known]
    return differences


def _replay(
    server: Server, samples: Sequence[Arrays], outputs: Sequence[str], count: int, concurrency: int
) -> list[Answer]:
    """Answers to `count` requests, as they come; fewer once the server leaves too many without one."""
    waiting: SimpleQueue[int] = SimpleQueue()
    answers: SimpleQueue[Answer] = SimpleQueue()
    stopped = Event()
    for i in range(count):
        waiting.put(i % len(samples))

    def work() -> None:
        making, calling = server.limits
        with server.protocol.InferenceServerClient(server.address, **making) as client:
            while not stopped.is_set():
                try:
                    index = waiting.get_nowait()
                except Empty:
                    return
                answers.put(_answer(client, server, samples, index, outputs, calling))

    for _ in range(min(concurrency, count)):  # a client is not shared: that of HTTP serves one thread
        Thread(target=work, daemon=True).start()
    found: list[Answer] = []
    while len(found) < count and sum(bool(each.error) for each in found) < MOST_FAILURES:
        try:
            found.append(answers.get(timeout=server.timeout + GRACE))
        except Empty:
            break
    stopped.set()
    return found


def _answer(
    client: Any, server: Server, samples: Sequence[Arrays], index: int, outputs: Sequence[str], calling: Mapping[str, Any]
) -> Answer:
    from tritonclient.utils import np_to_triton_dtype

    start = time.perf_counter()
    try:
        tensors = []
        for name, array in samples[index].items():
            array = np.ascontiguousarray(array)
            tensor = server.protocol.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
            tensor.set_data_from_numpy(array)
            tensors.append(tensor)
        result = client.infer(server.model, tensors, **calling)
        given = {name: result.as_numpy(name) for name in outputs}
        missing = [name for name, array in given.items() if array is None]
        error = f"The answer lacks {', '.join(missing)}." if missing else ""
    except Exception as failure:  # the client raises whatever its transport does
        given, error = {}, _message(failure)
    return Answer(index, (time.perf_counter() - start) * 1000, {} if error else given, error)
