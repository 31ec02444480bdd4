"""Fixtures that tests of several rooms share."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of images, sentences and weights that QDEPLOY_DATA names; without one the test is skipped."""
    if "QDEPLOY_DATA" not in os.environ:
        pytest.skip("needs QDEPLOY_DATA, the folder of images, sentences and weights")
    return Path(os.environ["QDEPLOY_DATA"])
