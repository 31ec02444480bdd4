"""Fixtures that tests of several rooms share."""

import os
import shutil
import signal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from qdeploy.statistics import TensorStatistics
from tests.browser import Browser

pytest.register_assert_rewrite("tests.contracts")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell lets what it runs in the background ignore interrupts, and so would every process that a test starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)


APART = ("exhaustive", "load")
"""Markers of tests that take minutes: they run where `-m` names them, as CI does in a second step."""


def pytest_collection_modifyitems(config, items):
    apart = [mark for mark in APART if mark not in config.option.markexpr]
    left_out = [item for item in items if any(item.get_closest_marker(mark) for mark in apart)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of images, sentences and weights that QDEPLOY_DATA names; without one the test is skipped."""
    if "QDEPLOY_DATA" not in os.environ:
        pytest.skip("needs QDEPLOY_DATA, the folder of images, sentences and weights")
    return Path(os.environ["QDEPLOY_DATA"])


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """A headless Chromium; without one the test is skipped."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    found = Browser(program, tmp_path_factory.mktemp("chromium"))
    yield found
    found.close()


@pytest.fixture(scope="session")
def statistics_of():
    """Makes the statistics of an array in plain numpy, apart from the code that collects them."""
    return _statistics_of


def _statistics_of(values, name="x", channel_axis=None):
    values = np.asarray(values, np.float32)
    channels = [values.ravel()] if channel_axis is None else np.moveaxis(values, channel_axis, 0)
    finite = [channel[np.isfinite(channel)] for channel in channels]
    bits = np.concatenate(finite).view(np.uint32)
    return TensorStatistics(
        name,
        channel_axis,
        np.bincount(bits >> 17, minlength=1 << 15).astype(np.int64),
        values.size - bits.size,
        np.array([channel.min(initial=np.inf) for channel in finite], np.float32),
        np.array([channel.max(initial=-np.inf) for channel in finite], np.float32),
        np.array([channel.size for channel in finite], np.int64),
        np.array([_limbs(channel.sum(dtype=np.float64)) for channel in finite], np.int64),
    )


def _limbs(total):
    """Five limbs of 48 bits, the highest with the sign, of a number in steps of 2^-60."""
    steps = int(Fraction(float(total)) * 2**60)
    return [*(steps >> 48 * k & 2**48 - 1 for k in range(4)), steps >> 192]
