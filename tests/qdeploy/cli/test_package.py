"""package: folders that run where there is no qdeploy."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    """Runs a package's script in a process that cannot import qdeploy."""
    hiding = tmp_path_factory.mktemp("hiding")
    (hiding / "qdeploy.py").write_text("raise ImportError('a package needs nothing of qdeploy')\n")

    def run(package, *arguments, hidden=()):
        for name in hidden:
            (hiding / f"{name}.py").write_text(f"raise ModuleNotFoundError('hidden', name={name!r})\n")
        environment = {**os.environ, "PYTHONPATH": str(hiding), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, package / "run.py", *arguments]
        try:
            return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
        finally:
            for name in hidden:
                (hiding / f"{name}.py").unlink()

    return run


@pytest.fixture
def package(bundle, tmp_path, qdeploy):
    """An edge package of the problem's bundle."""
    assert qdeploy("package", bundle, "--for edge --quiet -o", tmp_path / "edge").code == 0
    return tmp_path / "edge"


def sums(package):
    command = ["sha256sum", "--strict", "-c", "SHA256SUMS"]
    return subprocess.run(command, cwd=package, capture_output=True, text=True, check=False, timeout=60)


def test_the_golden_samples_come_out_as_they_were_measured(package, device):
    ended = device(package, "--tolerance", "0")

    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("logits: largest difference 0 in 64 golden samples, values up to ")


def test_a_difference_is_found(package, device):
    golden = package / "golden" / "outputs.npz"
    logits = np.load(golden)["logits"]
    logits[7, 1] += 0.5
    np.savez(golden, logits=logits)

    ended = device(package, "--tolerance", "0.4")

    assert ended.returncode == 1
    assert ended.stdout.startswith("logits: largest difference 0.5 in 64")
    assert device(package, "--tolerance", "0.6").returncode == 0
    assert device(package).returncode == 0


def test_a_nan_is_no_agreement(package, device):
    golden = package / "golden" / "outputs.npz"
    logits = np.load(golden)["logits"]
    logits[0, 0] = np.nan
    np.savez(golden, logits=logits)

    assert device(package, "--tolerance", "1000").returncode == 1


def test_own_samples_are_run(package, device, problem, tmp_path):
    import onnxruntime as ort

    images = np.load(problem / "samples.npz")["image"][:5]  # [5, 1, 8, 8] for an input [1, 1, 8, 8]
    np.savez(tmp_path / "own.npz", image=images)
    session = ort.InferenceSession(str(package / "model.onnx"), providers=["CPUExecutionProvider"])
    expected = np.concatenate([session.run(None, {"image": image[None]})[0] for image in images])

    ended = device(package, tmp_path / "own.npz", "--output", tmp_path / "out.npz")

    assert ended.stdout.startswith("logits float32[5, 3]\n")
    np.testing.assert_array_equal(np.load(tmp_path / "out.npz")["logits"], expected)


def test_whole_inputs_are_run(package, device, problem, tmp_path):
    images = np.load(problem / "samples.npz")["image"][:2][:, None]
    np.savez(tmp_path / "own.npz", image=images)

    assert device(package, tmp_path / "own.npz").stdout.startswith("logits float32[2, 1, 3]\n")


def test_what_the_script_cannot_run_is_told_in_a_sentence(package, device, tmp_path):
    np.savez(tmp_path / "own.npz", picture=np.zeros(3))

    wrong = device(package, tmp_path / "own.npz")

    assert wrong.returncode == 1
    assert wrong.stderr == "There is no array for the inputs image; found: picture.\n"
    np.savez(tmp_path / "small.npz", image=np.zeros((2, 1, 4, 4), np.float32))
    small = device(package, tmp_path / "small.npz")
    assert small.returncode == 1
    assert small.stderr.startswith("Sample 0 does not fit the model: ")
    photo = device(package, "photo.jpg")
    assert photo.stderr == "photo.jpg is no .npz, and this model comes without image preprocessing.\n"


def test_the_checksums_cover_every_file(package):
    listed = {line.split("  ", 1)[1] for line in (package / "SHA256SUMS").read_text().splitlines()}
    there = {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()}

    assert there - listed == {"SHA256SUMS"}
    assert sums(package).returncode == 0
    (package / "run.py").write_text("pass")
    changed = sums(package)
    assert (changed.returncode, "run.py: FAILED" in changed.stdout) == (1, True)


def test_equal_bundles_give_equal_packages(bundle, package, tmp_path, qdeploy):
    assert qdeploy("package", bundle, "--for edge -o", tmp_path / "again").code == 0

    assert (tmp_path / "again" / "SHA256SUMS").read_text() == (package / "SHA256SUMS").read_text()


def test_a_target_is_chosen_by_its_folder(bundle, tmp_path, qdeploy, device):
    ended = qdeploy("package", bundle, "--for edge --target ort-cpu-fp32 -o", tmp_path / "edge")

    assert (ended.code, ended.out) == (0, f"{tmp_path / 'edge'}: run it there with python run.py\n")
    origin = json.loads((tmp_path / "edge" / "qdeploy-package.json").read_text())
    assert origin["targets"] == ["ort-cpu:fp32"]
    assert (tmp_path / "edge" / "model.onnx").read_bytes() == (bundle / "ort-cpu-fp32" / "model.onnx").read_bytes()
    assert device(tmp_path / "edge", "--tolerance", "0").returncode == 0


def test_what_cannot_be_packaged_is_refused(bundle, tmp_path, qdeploy):
    unknown = qdeploy("package", bundle, "--for edge --target ort-gpu -o", tmp_path / "edge")
    inside = qdeploy("package", bundle, "--for edge -o", bundle / "edge")
    itself = qdeploy("package", bundle, "--for edge --force -o", bundle)
    several = qdeploy("package", bundle, "--for edge --target ort-cpu --target ort-cpu-fp32 -o", tmp_path / "edge")
    nowhere = qdeploy("package", tmp_path, "--for edge -o", tmp_path / "edge")

    assert {each.code for each in (unknown, inside, itself, several, nowhere)} == {2}
    assert f"The bundle {bundle} has no target 'ort-gpu'." in unknown.err
    assert f"{bundle / 'edge'} lies in the bundle {bundle}, which stays as it is." in inside.err
    assert "which stays as it is" in itself.err
    assert several.err == "error: A package for edge holds one target.\nGive --target once.\n"
    assert "is not a qdeploy bundle" in nowhere.err
    assert not (tmp_path / "edge").exists()


def test_a_target_of_another_runtime_is_no_edge_package(bundle, tmp_path, qdeploy):
    from qdeploy.bundle.manifest import read_manifest, seal

    other = tmp_path / "other"
    shutil.copytree(bundle, other)
    manifest = read_manifest(other / "bundle.json")
    (other / "bundle.json").unlink()
    target = manifest.targets[0].model_copy(update={"target": "tensorrt"})
    seal(other, manifest.model_copy(update={"targets": (target,)}))

    ended = qdeploy("package", other, "--for edge -o", tmp_path / "edge")

    assert ended.code == 2
    assert ended.err == (
        f"error: An edge package cannot run ort-cpu of the bundle {other}.\n"
        "It runs ort-cpu: export for one of them, or choose it with --target.\n"
    )


def test_nothing_is_overwritten_without_force(bundle, package, tmp_path, qdeploy):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "SHA256SUMS").write_text("mine")

    again = qdeploy("package", bundle, "--for edge -o", package)
    forced = qdeploy("package", bundle, "--for edge --force -o", package)
    mine = qdeploy("package", bundle, "--for edge --force -o", tmp_path / "mine")

    assert (again.code, forced.code, mine.code) == (2, 0, 2)
    assert again.err.startswith(f"error: {package} exists already.\n")
    assert (tmp_path / "mine" / "SHA256SUMS").read_text() == "mine"


@pytest.fixture(scope="module")
def pictures(problem, tmp_path_factory):
    """A bundle of the problem that was measured on images, and one of them."""
    from PIL import Image

    from qdeploy import pipeline
    from qdeploy.model import ModelSource
    from qdeploy.recipe import Recipe, TargetRequest
    from qdeploy.samples.preprocessing import Preprocessing

    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(3)
    (folder / "images").mkdir()
    for i in range(8):
        pixels = random.integers(0, 256, (12, 14, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
    recipe = Recipe(
        source=ModelSource.parse(str(problem / "net.onnx")),
        targets=(TargetRequest("ort-cpu"),),
        calibration=str(folder / "images"),
        preprocessing=Preprocessing(resize=9, crop=8, color="gray", mean=(0.5,), std=(0.25,)),
    )
    pipeline.run(recipe, folder / "bundle")
    return folder / "bundle", folder / "images" / "4.png"


def test_an_image_is_prepared_as_in_the_bundle(pictures, tmp_path, qdeploy, device):
    from qdeploy.bundle.golden import read_golden
    from qdeploy.bundle.load import open_bundle

    bundle, image = pictures
    assert qdeploy("package", bundle, "--for edge --quiet -o", tmp_path / "edge").code == 0

    golden = device(tmp_path / "edge")
    ended = device(tmp_path / "edge", image, "--output", tmp_path / "out.npz")

    assert (golden.returncode, golden.stderr) == (0, "")
    assert "preprocessing: largest difference 0 in the inputs" in golden.stdout
    assert ended.returncode == 0
    expected = read_golden(open_bundle(bundle))[4].outputs["ort-cpu"]["logits"]
    np.testing.assert_array_equal(np.load(tmp_path / "out.npz")["logits"], expected)
    assert "pillow" in (tmp_path / "edge" / "requirements.txt").read_text().split()


def test_without_pillow_all_but_images_runs(pictures, tmp_path, qdeploy, device):
    bundle, image = pictures
    assert qdeploy("package", bundle, "--for edge --quiet -o", tmp_path / "edge").code == 0

    golden = device(tmp_path / "edge", hidden=["PIL"])
    ended = device(tmp_path / "edge", image, hidden=["PIL"])

    assert golden.returncode == 0
    assert "preprocessing: not checked, PIL is not installed" in golden.stdout
    assert ended.stderr == "Images need PIL, which is not installed: pip install pillow\n"


def test_a_model_repository_is_written(bundle, tmp_path, qdeploy):
    pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed: pip install 'qdeploy[serving]'")

    ended = qdeploy("package", bundle, "--for triton --target ort-cpu-fp32 --target ort-cpu -o", tmp_path / "models")

    assert (ended.code, ended.out) == (0, f"{tmp_path / 'models'}: bundle-ort-cpu, bundle-ort-cpu-fp32\n")
    for folder in ("ort-cpu", "ort-cpu-fp32"):
        served = tmp_path / "models" / f"bundle-{folder}" / "1" / "model.onnx"
        assert served.read_bytes() == (bundle / folder / "model.onnx").read_bytes()
    assert sums(tmp_path / "models").returncode == 0


def test_without_tritonclient_a_repository_is_unavailable(bundle, tmp_path, qdeploy, monkeypatch):
    monkeypatch.setitem(sys.modules, "tritonclient", None)
    monkeypatch.delitem(sys.modules, "tritonclient.grpc", raising=False)

    ended = qdeploy("package", bundle, "--for triton -o", tmp_path / "models")

    assert ended.code == 3
    assert ended.err == "error: tritonclient is not installed.\nInstall it: pip install 'qdeploy[serving]'\n"
