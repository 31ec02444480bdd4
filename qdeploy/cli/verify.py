"""`qdeploy verify`: a live server against a bundle."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from qdeploy.cli import options
from qdeploy.cli.output import printable, results

if TYPE_CHECKING:
    from qdeploy.bundle.verify import Verification


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
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples",
            metavar="N",
            help="Requests to send, in turn over the golden samples.",
            show_default="each once",
        ),
    ] = None,
    concurrency: Annotated[int, typer.Option("--concurrency", metavar="N", help="Requests under way at a time.")] = 1,
    timeout: Annotated[float, typer.Option("--timeout", metavar="S", help="Seconds for one request.")] = 10.0,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Replay a bundle's golden samples on a server that speaks the Open Inference Protocol v2, such as Triton."""
    from qdeploy.bundle.verify import verify as run

    with results() as file:
        found = run(bundle, url, model=model, target=target, requests=samples, concurrency=concurrency, timeout=timeout)
        if as_json:
            file.write(json.dumps(found.to_json(), indent=2, ensure_ascii=False) + "\n")
        elif not quiet:
            file.writelines(f"{printable(line)}\n" for line in _lines(found))
    return found.exit_code


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
        yield f"wrong       {_indices(found.wrong_samples)}"
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
"""How many golden samples are named one by one."""


def _indices(samples: tuple[int, ...]) -> str:
    if not samples:
        return "none"
    more = f" and {len(samples) - SHOWN} more" if len(samples) > SHOWN else ""
    return f"golden samples {', '.join(map(str, samples[:SHOWN]))}{more}"
