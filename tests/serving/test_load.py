"""A real Triton Inference Server under load for a minute."""

import time
from itertools import cycle, product

import pytest

from tests.serving.conftest import add

pytestmark = [pytest.mark.slow, pytest.mark.load]

SECONDS = 60
CONCURRENCY = 8


def test_no_answer_is_wrong_or_missing_in_a_minute(serve, bundles, tmp_path):
    from qdeploy.bundle.verify import verify

    bundle = add(bundles / "new", "loaded", tmp_path / "models")
    answered = 0
    with serve(tmp_path / "models", tmp_path / "triton.log") as server:
        ways = cycle(product((server.http, server.grpc), ("loaded-ort-cpu", "loaded-ort-cpu-image")))
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            url, model = next(ways)
            found = verify(bundle, url, model=model, requests=1000, concurrency=CONCURRENCY)
            assert (found.exit_code, found.errors, found.max_abs_error) == (0, {}, {"logits": 0.0})
            answered += found.answered
    assert answered >= 4000
