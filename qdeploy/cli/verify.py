"""`qdeploy verify`: a live server against a bundle."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qdeploy.cli import options
from qdeploy.cli.output import printable, results
from qdeploy.cli.parity import bundle_recipe
from qdeploy.errors import InputError

if TYPE_CHECKING:
    from qdeploy.bundle.verify import Accuracy, Evaluation, Verification


def verify(  # noqa: PLR0913 - one parameter an option
    bundle: options.BundlePath,
    *,
    url: Annotated[
        str,
        typer.Option(
            "--url", metavar="URL", help="The server: http://HOST:PORT or grpc://HOST:PORT.", show_default=False
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="NAME", help="Its name there.", show_default="as qdeploy package calls it"),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The target, or folder, that it should serve.", show_default="the first"),
    ] = None,
    version: Annotated[
        int | None,
        typer.Option("--model-version", metavar="N", help="Its version there.", show_default="the server's choice"),
    ] = None,
    evaluation: options.Evaluation = None,
    metric: options.Metric = None,
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples",
            metavar="N",
            help="Requests to send, in turn over the golden and the evaluation samples.",
            show_default="each once",
        ),
    ] = None,
    concurrency: Annotated[int, typer.Option("--concurrency", metavar="N", help="Requests under way at a time.")] = 1,
    timeout: Annotated[float, typer.Option("--timeout", metavar="S", help="Seconds for one request.")] = 10.0,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Replay a bundle's golden samples on a server that speaks the Open Inference Protocol v2, such as Triton."""
    from qdeploy.bundle.verify import require_sense
    from qdeploy.bundle.verify import verify as run

    require_sense(url, samples, concurrency, timeout)
    with results() as file:
        found = run(
            bundle,
            url,
            model=model,
            version=version,
            target=target,
            evaluation=_opened(bundle, target, evaluation, metric),
            requests=samples,
            concurrency=concurrency,
            timeout=timeout,
        )
        if as_json:
            file.write(json.dumps(found.to_json(), indent=2, ensure_ascii=False) + "\n")
        elif not quiet:
            file.writelines(f"{printable(line)}\n" for line in _lines(found))
    return found.exit_code


def _opened(path: Path, target: str | None, data: str | None, metric: str | None) -> Evaluation | None:
    """The evaluation samples asked for, if any."""
    if data is None:
        if metric is not None:
            raise InputError("There is nothing to measure --metric on.", "Give --evaluation DATA, with labels.")
        return None
    from qdeploy import bundled

    return bundled.open_evaluation(bundle_recipe(path, data, metric, None), path, target)


def _lines(found: Verification) -> Iterator[str]:
    verdicts = {
        0: f"answers as {found.target} of the bundle does",
        1: f"does not answer as {found.target} of the bundle does",
        3: "left requests without an answer",
    }
    yield f"{found.model} on {found.url} {verdicts[found.exit_code]}."
    yield from found.differences
    if found.differences:
        return
    yield f"answered    {found.answered} of {found.requests} requests; versions served: {', '.join(found.versions)}"
    if found.answered:
        kinds = (("golden", found.wrong_samples), ("evaluation", found.wrong_evaluation_samples))
        wrong = "; ".join(f"{kind} samples {_indices(samples)}" for kind, samples in kinds if samples)
        yield f"wrong       {wrong or 'none'}"
    if found.accuracy is not None:
        yield f"accuracy    {_accuracy(found.accuracy)}"
    for name, error in found.max_abs_error.items():
        yield f"off by      {error:.6g} at most in {name}"
    if found.agreement is not None:
        yield f"agreement   {found.agreement:.2%} of the largest values stand where the bundle's stand"
    if found.latency_ms is not None and found.throughput is not None:
        times = ", ".join(f"{name} {value:.2f} ms" for name, value in found.latency_ms.items())
        yield f"latency     {times}; {found.throughput:.1f} answers a second"
    for message, count in found.errors.items():
        yield f"no answer   {count} times: {message}"


SHOWN = 10
"""How many samples are named one by one."""


def _accuracy(found: Accuracy) -> str:
    served = "cannot be compared" if found.server is None else f"{found.server:.4f}"
    reported = "" if found.reported is None else f"; its report says {found.reported:.4f}"
    return f"{found.metric} {served}, the bundle's {found.bundle:.4f} on the same {found.samples} samples{reported}"


def _indices(samples: tuple[int, ...]) -> str:
    more = f" and {len(samples) - SHOWN} more" if len(samples) > SHOWN else ""
    return f"{', '.join(map(str, samples[:SHOWN]))}{more}"
