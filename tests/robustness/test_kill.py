"""An export or a calibration that is ended at any moment leaves its output as it was, or whole."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qdeploy.bundle.load import open_bundle
from qdeploy.statistics import Statistics

PROGRAM = Path(sys.executable).with_name("qdeploy")
EXPORT = "quantize net.onnx --target ort-cpu --calibration samples.npz --quiet"
CALIBRATE = "calibrate net.onnx --calibration samples.npz --quiet -o out"
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}
WORDS = {signal.SIGINT: "interrupted\n", signal.SIGTERM: "terminated\n", signal.SIGKILL: ""}

MOMENTS = int(os.environ.get("QDEPLOY_KILLS", "4"))
"""How many moments of an export's life each signal is sent at; more in a longer run."""

each_signal = pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)


def copied(problem, folder):
    """A folder with the problem's files, and one for temporary files."""
    for name in ("net.onnx", "samples.npz"):
        shutil.copy(problem / name, folder)
    (folder / "temporary").mkdir()
    return folder


@pytest.fixture
def here(problem, tmp_path):
    return copied(problem, tmp_path)


@pytest.fixture(scope="module")
def whole(problem, tmp_path_factory):
    """What an export makes when nobody ends it, and how many seconds it takes."""
    folder = copied(problem, tmp_path_factory.mktemp("whole"))
    start = time.monotonic()
    finish(EXPORT, folder)
    return folder / "out", time.monotonic() - start


def started(command, here):
    environment = {**os.environ, "TMPDIR": str(here / "temporary")}
    return subprocess.Popen(
        [PROGRAM, *command.split()],
        cwd=here,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(command, here):
    with started(command, here) as process:
        _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")


def stop(command, here, number, delay):
    """Send a signal after a delay; True if the command was done before.

    The end is orderly and leaves no temporary file, but for SIGKILL, after which no program can tidy up.
    """
    with started(command, here) as process:
        time.sleep(delay)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    code = process.returncode
    if "Traceback" in err:  # Python itself was still starting: its answer to an interrupt before our first line
        assert number == signal.SIGINT, err
        assert "in main" not in err
    else:
        assert (code, err) in [(0, ""), (CODES[number], WORDS[number]), (-number, "")]
    left = {path.name for path in here.iterdir()} - {"net.onnx", "samples.npz", "temporary", "out"}
    if number != signal.SIGKILL:
        assert left == set()
        assert list((here / "temporary").glob("qdeploy-*")) == []
    assert all(name.startswith(".out.") for name in left)
    return code == 0


def moments(number, command, length, count):
    """Delays spread over a whole life, with chance in each part of it."""
    dice = random.Random(f"{number} {command}")
    return [length * (part + dice.random()) / count for part in range(count)]


@each_signal
def test_an_export_leaves_no_bundle_or_a_whole_one(here, whole, number):
    _, length = whole
    for delay in moments(number, EXPORT, length, MOMENTS):
        done = stop(EXPORT, here, number, delay)

        assert not done or (here / "out").exists()
        if (here / "out").exists():
            open_bundle(here / "out")
            shutil.rmtree(here / "out")

    if number == signal.SIGKILL:
        finish(EXPORT, here)  # whatever killed runs left beside it
        open_bundle(here / "out")


@each_signal
def test_a_bundle_that_is_replaced_stays_or_is_the_new_one(here, whole, number):
    old, length = whole
    shutil.copytree(old, here / "out")
    for delay in moments(number, "--force", length, (MOMENTS + 1) // 2):
        stop(f"{EXPORT} --force", here, number, delay)

        open_bundle(here / "out")


@each_signal
def test_a_calibration_leaves_no_statistics_or_whole_ones(here, whole, number):
    _, length = whole
    for delay in moments(number, CALIBRATE, length, (MOMENTS + 1) // 2):
        done = stop(CALIBRATE, here, number, delay)

        assert not done or (here / "out").exists()
        if (here / "out").exists():
            assert Statistics.load(here / "out").samples == 120
            (here / "out").unlink()
