"""A live server against a bundle: golden and evaluation samples are replayed on it, and its answers are judged.

An answer is wrong if it is further from what the bundle's runner gives than quantization itself moved the golden
outputs from FP32: another processor may round differently, a changed model or preprocessing is off by more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from io import BytesIO
from itertools import chain, islice, repeat
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from qdeploy.backend import Arrays, Runner
from qdeploy.bundle.golden import GoldenSample, read_golden
from qdeploy.bundle.load import Bundle, open_bundle
from qdeploy.bundle.packages.package import targets_named
from qdeploy.bundle.packages.triton import NATIVE, RAW_IMAGE, RAW_IMAGE_SPEC, TYPES, require_client, served_digest
from qdeploy.bundle.replay import Answer, Case, Metadata, Replayed, Server, distance, metadata, replay
from qdeploy.errors import InputError, UnavailableError
from qdeploy.parity.bootstrap import Interval, paired_interval
from qdeploy.parity.metrics import Metric, Scorer
from qdeploy.samples.images import require_pillow
from qdeploy.samples.source import Sample, SampleSource

if TYPE_CHECKING:
    from qdeploy.bundle.manifest import BundledTarget, Manifest
    from qdeploy.model import TensorSpec

FLOAT = "float"
GOLDEN, EVALUATION = "golden", "evaluation"

ROUNDING = 1e-5
"""What float32 sums in another order may differ by, as a part of the largest value."""

PART = 64
"""Evaluation samples that are held in memory at a time."""


@dataclass(frozen=True)
class Evaluation:
    """Samples to send beside the golden ones.

    Attributes:
        samples: Whole model inputs, checked.
        runner: Of the bundle's target: it says what a good server answers.
        metric: Of labelled samples; None without one.
    """

    samples: SampleSource
    runner: Runner
    metric: Metric | None


@dataclass(frozen=True)
class Accuracy:
    """What a metric says of the server and of the bundle, over the same samples.

    Attributes:
        metric: Its name.
        samples: Evaluation samples that were answered.
        server: Its figure; None if an answer is not comparable.
        bundle: The figure of the bundle's runner.
        drop: Bundle − server.
        drop_interval: Paired bootstrap interval of `drop`, 95 %.
        reported: What the bundle's own report says of the target; None if it has another metric.
    """

    metric: str
    samples: int
    server: float | None
    bundle: float
    drop: float | None
    drop_interval: Interval | None
    reported: float | None


@dataclass(frozen=True)
class Verification:
    """What a server made of the samples.

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
        wrong_evaluation_samples: Likewise of the evaluation samples.
        accuracy: Over the evaluation samples; None without labels.
        agreement: Share of answers whose first output has its largest value where the bundle's has.
        latency_ms: p50, p90, p99 over the answers.
        throughput: Answers a second, while requests were under way.
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
    wrong_evaluation_samples: tuple[int, ...] = ()
    accuracy: Accuracy | None = None
    agreement: float | None = None
    latency_ms: Mapping[str, float] | None = None
    throughput: float | None = None
    errors: Mapping[str, int] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """3 if requests were left without an answer, 1 if the server is not the bundle, otherwise 0."""
        if self.differences:
            return 1
        wrong = self.wrong_samples or self.wrong_evaluation_samples
        return UnavailableError.exit_code if self.answered < self.requests else int(bool(wrong))

    def to_json(self) -> dict[str, Any]:
        """All fields as plain JSON values; what is no number is null."""
        status = {0: "pass", 1: "fail", 3: "unanswered"}[self.exit_code]
        fields = {name: dict(value) if isinstance(value, Mapping) else value for name, value in vars(self).items()}
        errors = {name: value if isfinite(value) else None for name, value in self.max_abs_error.items()}
        accuracy = asdict(self.accuracy) if self.accuracy else None
        return {"schema": 1, "status": status, **fields, "max_abs_error": errors, "accuracy": accuracy}


def verify(  # noqa: PLR0913 - one parameter an option
    path: Path,
    url: str,
    *,
    model: str | None = None,
    version: int | None = None,
    target: str | None = None,
    evaluation: Evaluation | None = None,
    requests: int | None = None,
    concurrency: int = 1,
    timeout: float = 10.0,
) -> Verification:
    """Replay a bundle's golden samples on a server, and evaluation samples if there are any.

    An entry that takes raw images is sent those that the samples were made of.

    Args:
        path: The bundle.
        url: "http://host:port" or "grpc://host:port".
        model: Its name on the server; None for the name that `package_triton` gives it.
        version: Of the model; None for the one that the server chooses.
        target: A folder of the bundle or a backend to compare with; None for the first.
        evaluation: Further samples.
        requests: How many to send, in turn over the golden and then the evaluation samples; None for each once.
        concurrency: Requests under way at a time.
        timeout: Seconds for one request.

    Raises:
        InputError: The bundle is damaged or has no golden samples, or the URL or a number cannot be used.
        UnavailableError: tritonclient is not installed, or the server does not serve the model.
    """
    require_sense(url, requests, concurrency, timeout)
    require_client()
    bundle = open_bundle(path)
    entry = targets_named(bundle, [target] if target else [])[0]
    golden = read_golden(bundle)
    if not golden:
        raise InputError(
            f"The bundle {path} holds no golden samples.", "Export it with evaluation samples below 16 MB."
        )
    name = model or f"{path.resolve().name}-{entry.folder}"
    server = Server(url, name, str(version or ""), timeout)
    served = metadata(server)
    asked = requests or len(golden) + ((evaluation.samples.size or 0) if evaluation else 0)
    differences = tuple(_differences(served, bundle, entry))
    if differences:
        return Verification(url, name, served.versions, entry.folder, differences, asked)
    own = [Sample(each.inputs, None, f"golden sample {i}", each.raw) for i, each in enumerate(golden)]
    to_send = partial(_to_send, images=_takes_images(served, bundle.manifest))
    cases = [Case(GOLDEN, i, to_send(own[i]), each.outputs[entry.folder]) for i, each in enumerate(golden)]
    tally = _Tally(allowed(golden, entry.folder), evaluation.metric if evaluation else None)
    if evaluation is None:
        # All are at hand, so that none waits for the next part.
        tally.add_all(replay(server, [list(_in_turn(lambda: cases, requests))], min(concurrency, asked)))
    else:
        with evaluation.runner as runner:
            everything = _in_turn(lambda: chain(cases, _evaluation_cases(evaluation, runner, to_send)), requests)
            tally.add_all(replay(server, _parts(everything), concurrency))
    return tally.verification(server, served.versions, bundle, entry, asked)


def require_sense(url: str, requests: int | None, concurrency: int, timeout: float) -> None:
    """Refuse, before any work, what cannot be asked.

    Raises:
        InputError: The URL or a number cannot be used.
    """
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


def _in_turn(cases: Callable[[], Iterable[Case]], count: int | None) -> Iterator[Case]:
    """Each case once, or so many, beginning again as often as needed."""
    if count is None:
        return iter(cases())
    return islice(chain.from_iterable(cases() for _ in repeat(None)), count)


def _parts(cases: Iterator[Case]) -> Iterator[list[Case]]:
    while part := list(islice(cases, PART)):
        yield part


def _evaluation_cases(evaluation: Evaluation, runner: Runner, to_send: Callable[[Sample], Arrays]) -> Iterator[Case]:
    for i, sample in enumerate(evaluation.samples):
        yield Case(EVALUATION, i, to_send(sample), runner.run(sample.inputs), sample.labels)


def _takes_images(served: Metadata, manifest: Manifest) -> bool:
    return RAW_IMAGE in served.inputs and RAW_IMAGE not in [spec.name for spec in manifest.inputs]


def _to_send(sample: Sample, *, images: bool) -> Arrays:
    """What the server takes of a sample: the model's inputs, or the image that they were made of.

    Raises:
        InputError: There is no image.
        UnavailableError: Pillow is not installed.
    """
    if not images:
        return sample.inputs
    if not sample.raw:
        what = f"The server takes images, and {sample.origin} comes without one."
        raise InputError(what, "Name the model that takes the prepared input, or give a folder of images.")
    require_pillow()
    from PIL import Image

    (content,) = sample.raw.values()
    with Image.open(BytesIO(content.tobytes())) as image:
        return {RAW_IMAGE: np.asarray(image.convert("RGB"))}


def _differences(served: Metadata, bundle: Bundle, entry: BundledTarget) -> Iterator[str]:
    """Where the server's model is not the bundle's, one sentence each."""
    manifest = bundle.manifest
    inputs = (RAW_IMAGE_SPEC,) if _takes_images(served, manifest) else manifest.inputs
    for kind, specs, found in (("input", inputs, served.inputs), ("output", manifest.outputs, served.outputs)):
        wanted = {spec.name: _as_served(spec) for spec in specs}
        for name in (name for name in wanted if name not in found):
            yield f"The server has no {kind} {name!r}; it has: {', '.join(found) or 'none'}."
        for name in (name for name in found if name not in wanted):
            yield f"The server has the {kind} {name!r}, which the bundle has not."
        for name in (name for name in wanted if found.get(name, wanted[name]) != wanted[name]):
            yield f"The {kind} {name!r} is {found[name]} on the server and {wanted[name]} in the bundle."
    if served.digest and (entry.target not in NATIVE or served.digest != served_digest(bundle, entry)):
        what = "The server was given another model than"
        yield f"{what} {entry.folder} of the bundle: an older or a newer one, with the sha256 {served.digest}."


def _as_served(spec: TensorSpec) -> str:
    """Type and shape of a tensor in the protocol's words; a scalar is served as [1]."""
    dims = [dim if isinstance(dim, int) else -1 for dim in spec.shape] or [1]
    return f"{TYPES.get(spec.dtype, spec.dtype).removeprefix('TYPE_')}{dims}"


class _Tally:
    """What the answers say of the server, added up as they come.

    Args:
        allowed: How far an answer may be off, by output.
        metric: Of labelled evaluation samples; None without one.
    """

    def __init__(self, allowed: Mapping[str, float], metric: Metric | None) -> None:
        self._allowed = allowed
        self._scores = _Scores(metric) if metric else None
        self._requests = 0
        self._seconds = 0.0
        self._off = dict.fromkeys(allowed, 0.0)
        self._wrong: dict[str, set[int]] = {GOLDEN: set(), EVALUATION: set()}
        self._milliseconds: list[float] = []
        self._agreements: list[float] = []
        self._errors: Counter[str] = Counter()

    def add_all(self, parts: Iterable[Replayed]) -> None:
        """Take what came of each part."""
        for part in parts:
            self._requests += part.requests
            self._seconds += part.seconds
            for answer in part.answers:
                self._add(answer)

    def _add(self, answer: Answer) -> None:
        if answer.error:
            self._errors[answer.error] += 1
            return
        self._milliseconds.append(answer.milliseconds)
        if answer.agreement is not None:
            self._agreements.append(answer.agreement)
        if any(not answer.off[name] <= most for name, most in self._allowed.items()):
            self._wrong[answer.case.kind].add(answer.case.sample)
        self._off = {name: max(most, answer.off[name]) for name, most in self._off.items()}
        if self._scores and answer.case.labels is not None:
            self._scores.add(answer, answer.case.labels)

    def verification(
        self, server: Server, versions: tuple[str, ...], bundle: Bundle, entry: BundledTarget, asked: int
    ) -> Verification:
        """The verdict.

        Args:
            server: That answered.
            versions: That it says it serves.
            bundle: That it is compared with.
            entry: The target.
            asked: How many requests were to be sent, as far as that was known beforehand.
        """
        answered = len(self._milliseconds)
        times = np.percentile(self._milliseconds, (50, 90, 99)).tolist() if answered else None
        return Verification(
            server.url,
            server.model,
            versions,
            entry.folder,
            (),
            max(self._requests, asked),
            answered,
            max_abs_error=self._off if answered else {},
            wrong_samples=tuple(sorted(self._wrong[GOLDEN])),
            wrong_evaluation_samples=tuple(sorted(self._wrong[EVALUATION])),
            accuracy=self._scores.accuracy(bundle, entry) if self._scores else None,
            agreement=float(np.mean(self._agreements)) if self._agreements else None,
            latency_ms=dict(zip(("p50", "p90", "p99"), times, strict=True)) if times else None,
            throughput=answered / self._seconds if answered else None,
            errors=self._errors,
        )


class _Scores:
    """A metric of the server and of the bundle's runner, over evaluation samples, each once."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric
        self._server: Scorer = metric.scorer()
        self._bundle: Scorer = metric.scorer()
        self._seen: set[int] = set()
        self._comparable = True

    def add(self, answer: Answer, labels: NDArray[Any]) -> None:
        """Take an answer to a labelled sample."""
        if answer.case.sample in self._seen:
            return
        self._seen.add(answer.case.sample)
        expected = answer.case.expected
        self._bundle.add(self._metric.measure(expected, labels))
        self._comparable &= all(map(isfinite, answer.off.values()))
        if self._comparable:  # a metric is not to be blamed for what it makes of NaN
            outputs = {name: array.reshape(expected[name].shape) for name, array in answer.outputs.items()}
            self._server.add(self._metric.measure(outputs, labels))

    def accuracy(self, bundle: Bundle, entry: BundledTarget) -> Accuracy | None:
        """Both figures, and that of the bundle's report; None if no labelled sample was answered."""
        if not self._seen:
            return None
        ours, name = self._bundle.rows(), self._metric.name
        figure, reported = self._metric.figure(ours), _reported(bundle, entry, name)
        if not self._comparable:
            return Accuracy(name, len(self._seen), None, figure, None, None, reported)
        theirs = self._server.rows()
        served = self._metric.figure(theirs)
        interval = paired_interval(ours, theirs, self._metric.summarize)
        return Accuracy(name, len(self._seen), served, figure, figure - served, interval, reported)


def _reported(bundle: Bundle, entry: BundledTarget, metric: str) -> float | None:
    """The figure of a target in the bundle's report, if it is of this metric."""
    from qdeploy.report.schema import Report

    report = Report.read(bundle.path / "report.json")
    reference = report.reference.metric
    figures = [row.metric for row in report.targets if row.folder == entry.folder]
    return figures[0] if figures and reference is not None and reference.name == metric else None


def allowed(golden: Sequence[GoldenSample], target: str) -> dict[str, float]:
    """How far an answer may be off, by output: as far as the golden outputs are from FP32, or float32's rounding."""
    tolerances = {}
    for name in golden[0].outputs[target]:
        pairs = [(sample.outputs[target][name], sample.outputs[FLOAT][name]) for sample in golden]
        moved = [distance(*pair) for pair in pairs]
        rounding = [ROUNDING * distance(ours, np.zeros_like(ours)) for ours, _ in pairs]
        # A sample with values that are not finite says nothing of how far the others may be off.
        tolerances[name] = max((each for each in (*moved, *rounding) if np.isfinite(each)), default=0.0)
    return tolerances
