"""Models as people have them, through the one command: several inputs and outputs, masks, integers, other lengths."""

import json

import numpy as np
import onnxruntime as ort
import pytest
import torch
from scipy import stats
from torch import nn

import qdeploy
from qdeploy.parity import harness

TARGETS = ("ort-cpu:int8", "ort-cpu:int8-dynamic")


@pytest.fixture(scope="module", autouse=True)
def _no_time_to_lose():
    """The fewest rounds are enough here: what the clock says is of no interest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "LATENCY_BUDGET_S", 0.0)
        yield


def export(model, examples, folder, samples, **settings):
    """A model's bundle at both precisions, calibrated on 24 of the samples and compared on the others."""
    torch.manual_seed(0)
    return qdeploy.export(
        model().eval(),
        examples,
        targets=TARGETS,
        calibration=samples[:24],
        evaluation=samples[24:],
        output=folder / "out",
        **settings,
    )


def outputs_of(path, samples, *, optimized=True):
    """Each sample's outputs by name, from an ONNX Runtime session of our own."""
    options = ort.SessionOptions()
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    inputs = [sample[0] if isinstance(sample, tuple) else sample for sample in samples]
    return [dict(zip(names, session.run(names, each), strict=True)) for each in inputs]


def assert_figures_of_every_output(deployment, samples):
    """The report's figures of each output against numpy's, and that the row passed."""
    reference = outputs_of(deployment.path / "float/model.onnx", samples, optimized=False)
    rows = json.loads((deployment.path / "report.json").read_text())["targets"]
    for row in rows:
        assert row["status"] == "pass", row["reason"]
        found = outputs_of(deployment.path / row["artifact"], samples)
        assert list(row["outputs"]) == list(reference[0])
        for name, figures in row["outputs"].items():
            x, y = (np.concatenate([each[name].reshape(-1) for each in run]) for run in (reference, found))
            assert figures["equal"] == pytest.approx((x == y).mean(), abs=1e-6)
            if x.dtype.kind != "f":
                assert (figures["sqnr_db"], figures["cosine"], figures["max_abs_error"]) == (None, None, None)
                continue
            x, y = x.astype(np.float64), y.astype(np.float64)
            assert figures["max_abs_error"] == pytest.approx(np.abs(x - y).max(), rel=1e-5, abs=1e-6)
            if (x != y).any():
                sqnr = 10 * np.log10((x**2).sum() / ((x - y) ** 2).sum())
                assert figures["sqnr_db"] == pytest.approx(sqnr, abs=1e-4)
            cosine = (x / np.linalg.norm(x)) @ (y / np.linalg.norm(y))
            assert figures["cosine"] == pytest.approx(cosine, abs=1e-5)
    return rows


class Detector(nn.Module):
    """Boxes in the photograph's own pixels, and their scores."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU())
        self.boxes, self.scores = nn.Conv2d(16, 4, 1), nn.Conv2d(16, 5, 1)

    def forward(self, image, size):
        found = self.body(image)
        pixels = torch.cat([size, size], 1).to(torch.float32)[:, None]
        boxes = torch.sigmoid(self.boxes(found)).flatten(2).transpose(1, 2) * pixels
        return {"boxes": boxes, "scores": torch.sigmoid(self.scores(found)).flatten(2).transpose(1, 2)}


def test_a_detector_takes_an_image_and_a_size_and_gives_boxes_and_scores(tmp_path):
    random = np.random.default_rng(0)
    samples = [
        {
            "size": random.integers(100, 900, (1, 2)),
            "image": random.normal(size=(1, 3, 32, 32)).astype(np.float32),
        }
        for _ in range(40)
    ]
    examples = {"image": torch.zeros(1, 3, 32, 32), "size": torch.tensor([[480, 640]])}

    deployment = export(Detector, examples, tmp_path, samples)

    rows = assert_figures_of_every_output(deployment, samples[24:])
    assert list(rows[0]["outputs"]) == ["boxes", "scores"]
    assert rows[0]["quantized_ops"]["int8"] > 4
    page = (deployment.path / "report.html").read_text()
    assert '<th scope="col">Output</th>' in page
    assert '<th scope="row">scores</th>' in page


class Encoder(nn.Module):
    """Token ids and a mask of ones and zeros → one vector a text, by one layer of attention."""

    hidden = -3e38
    """What is added to the attention to tokens that are none."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(50, 24)
        self.merged, self.after = nn.Linear(24, 72), nn.Linear(24, 24)
        self.wide, self.narrow = nn.Linear(24, 48), nn.Linear(48, 24)

    def forward(self, ids, mask):
        x = self.words(ids)
        query, key, value = self.merged(x).chunk(3, dim=-1)
        addend = torch.zeros(1).masked_fill(mask[:, None] == 0, self.hidden)
        x = x + self.after(torch.softmax(query @ key.transpose(1, 2) / 24**0.5 + addend, -1) @ value)
        x = x + self.narrow(nn.functional.gelu(self.wide(x)))
        counted = mask[..., None].to(x.dtype)
        return (x * counted).sum(1) / counted.sum(1)


class HardMasked(Encoder):
    hidden = -torch.inf


class Lowest(Encoder):
    hidden = torch.finfo(torch.float32).min


def texts(dtype, count=64):
    """Texts of two to nine tokens, two of them a batch and padded to the longer, with a similarity each."""
    random = np.random.default_rng(1)
    for _ in range(count):
        lengths = random.integers(2, 10, 2)
        mask = (np.arange(lengths.max()) < lengths[:, None]).astype(dtype)
        ids = random.integers(1, 50, mask.shape).astype(dtype) * mask
        yield {"ids": ids, "mask": mask}, np.repeat(random.normal(), 2)


@pytest.mark.parametrize(("model", "dtype"), [(Encoder, "int64"), (HardMasked, "int32"), (Lowest, "int32")])
def test_an_encoder_takes_integers_alone_masks_by_huge_values_and_texts_of_other_lengths(tmp_path, model, dtype):
    samples = list(texts(dtype))
    examples = tuple(torch.ones(2, 7, dtype=getattr(torch, dtype)) for _ in range(2))
    names = [f"{name}={dtype}[batch,length]" for name in ("ids", "mask")]

    deployment = export(model, examples, tmp_path, samples, input_names=names, metric="spearman")

    rows = assert_figures_of_every_output(deployment, samples[24:])
    for row in rows:
        assert row["cosine"] > 0.995
        assert sum(count for kind, count in row["quantized_ops"].items() if kind.startswith("int")) >= 4
        assert row["evaluation_samples"] == 80
    labels = [labels[0] for _, labels in samples[24:]]
    first, second = np.stack(
        [run["output"] for run in outputs_of(deployment.path / "float/model.onnx", samples[24:], optimized=False)], 1
    ).astype(np.float64)
    cosines = (first * second).sum(1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)
    reference = deployment.report.reference.metric
    assert reference.value == pytest.approx(stats.spearmanr(cosines, labels).statistic, abs=1e-4)


class Segmenter(nn.Module):
    """A class for each pixel: its logits, and which it is."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 12, 3, 2, 1), nn.ConvTranspose2d(12, 4, 2, 2)

    def forward(self, image):
        logits = self.up(torch.relu(self.down(image)))
        return {"mask": logits.argmax(1), "logits": logits}


def overlap(outputs, labels):
    """Share of the pixels that are where the label has them, an array for each image."""
    return (outputs["mask"] == labels).mean(axis=(1, 2))


def test_a_segmenter_gives_masks_and_is_scored_by_a_callable_on_images_of_other_sizes(tmp_path):
    random = np.random.default_rng(2)
    samples = []
    for _ in range(40):
        height, width = 2 * random.integers(6, 12, 2)
        image = random.normal(size=(1, 3, height, width)).astype(np.float32)
        samples.append(({"image": image}, random.integers(0, 4, (1, height, width))))
    names = ["image=float32[batch,3,height,width]"]
    example = torch.zeros(2, 3, 16, 24)

    deployment = export(Segmenter, example, tmp_path, samples, input_names=names, metric=overlap)

    rows = assert_figures_of_every_output(deployment, samples[24:])
    reference = outputs_of(deployment.path / "float/model.onnx", samples[24:], optimized=False)
    for row in rows:
        found = outputs_of(deployment.path / row["artifact"], samples[24:])
        before, after = (
            np.mean([overlap(run, labels) for run, (_, labels) in zip(runs, samples[24:], strict=True)])
            for runs in (reference, found)
        )
        assert row["metric"] == pytest.approx(after, abs=1e-6)
        assert row["drop"] == pytest.approx(before - after, abs=2e-6)
