from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from qdeploy.backend import Evidence, Runner
from qdeploy.errors import InputError, InternalError
from qdeploy.parity.compare import compare
from qdeploy.parity.metrics import metric_from_callable, metric_from_name

PAIR = ("float", "int8")


@dataclass
class Function(Runner):
    """A runner that computes its outputs with numpy and counts its runs."""

    function: object
    runs: int = 0
    evidence = Evidence.EXECUTED

    def run(self, inputs):
        self.runs += 1
        return self.function(inputs["x"])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def sample(x, labels=None, raw=None):
    labels = None if labels is None else np.asarray(labels)
    return SimpleNamespace(inputs={"x": np.asarray(x)}, labels=labels, raw=raw or {})


def samples(count, batch, classes, *, labelled=True, seed=0):
    rng = np.random.default_rng(seed)
    return [
        sample(rng.normal(size=(batch, classes)), rng.integers(classes, size=batch) if labelled else None)
        for _ in range(count)
    ]


def identity(x):
    return {"logits": x}


def rounded(x):
    return {"logits": np.rint(4 * x) / 4}


def run(data, target, metric=None, reference=identity):
    runners = {"float": Function(reference), "int8": Function(target)}
    return compare(runners, [PAIR], data, metric)[PAIR]


def test_figures_are_those_of_all_samples_at_once():
    from scipy import stats

    data = samples(25, 8, 6)
    x = np.concatenate([each.inputs["x"] for each in data])
    labels = np.concatenate([each.labels for each in data])
    y = rounded(x)["logits"]

    seen = run(data, rounded, metric_from_name("top1"))

    assert seen.samples == 200
    assert seen.reference_metric == (x.argmax(1) == labels).mean()
    assert seen.metric == (y.argmax(1) == labels).mean()
    assert seen.drop == pytest.approx(seen.reference_metric - seen.metric)
    assert seen.agreement == (x.argmax(1) == y.argmax(1)).mean()
    assert seen.sqnr_db == pytest.approx(10 * np.log10((x**2).sum() / ((x - y) ** 2).sum()))
    assert seen.cosine == pytest.approx((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))
    assert seen.max_abs_error == np.abs(x - y).max()
    hits = (x.argmax(1) == labels).astype(float), (y.argmax(1) == labels).astype(float)
    expected = stats.bootstrap(
        hits, lambda a, b, axis: (a - b).mean(axis), paired=True, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert seen.drop_interval == pytest.approx((expected.low, expected.high), abs=0.0051)


@pytest.mark.parametrize(("wrong", "count"), [(1, 100), (3, 300), (1, 1000), (7, 1000)])
def test_the_drop_is_exact_in_samples_so_that_a_budget_of_as_many_holds(wrong, count):
    data = [sample(np.array([[float(i < wrong), 0.5]]), [1 if i >= wrong else 0]) for i in range(count)]

    seen = run(data, lambda _: {"logits": np.array([[0.0, 1.0]])}, metric_from_name("top1"))

    assert seen.drop == wrong / count


def test_every_runner_runs_once_a_sample_however_many_pairs():
    runners = {"float": Function(identity), "qdq": Function(rounded), "artifact": Function(rounded)}
    pairs = [("float", "qdq"), ("float", "artifact"), ("qdq", "artifact")]
    steps = []

    seen = compare(runners, pairs, samples(7, 2, 3), metric_from_name("top1"), lambda: steps.append(1))

    assert [runner.runs for runner in runners.values()] == [7, 7, 7]
    assert len(steps) == 7
    assert list(seen) == pairs
    assert seen["float", "qdq"] == seen["float", "artifact"]
    assert seen["qdq", "artifact"].sqnr_db == math.inf
    assert seen["qdq", "artifact"].drop == 0.0


def test_samples_are_streamed():
    alive = []

    def stream():
        for each in samples(5, 1, 3):
            alive.append(each)
            yield each

    compare({"float": Function(identity)}, [], stream(), None, lambda: alive.clear() or None)

    assert alive == []


def test_without_labels_the_metric_is_not_measured():
    seen = run(samples(4, 3, 5, labelled=False), rounded, metric_from_name("top1"))

    assert seen.samples == 12
    assert (seen.reference_metric, seen.metric, seen.drop, seen.drop_interval) == (None,) * 4
    assert seen.sqnr_db > 10


def test_without_a_metric_labels_are_not_used():
    seen = run(samples(4, 3, 5), rounded)

    assert (seen.samples, seen.metric) == (12, None)


def test_a_whole_model_input_without_a_batch_is_one_sample():
    assert run([sample(3.0), sample(4.0)], rounded).samples == 2


@pytest.mark.parametrize(("first", "second", "has"), [([0], None, "no labels"), (None, [0], "labels")])
def test_labels_for_some_samples_only_are_refused(first, second, has):
    with pytest.raises(InputError) as caught:
        run([sample([[1.0, 2.0]], first), sample([[1.0, 2.0]], second)], rounded)

    assert str(caught.value) == (
        f"Sample 1 has {has}, unlike those before it. Give labels for every sample, or for none."
    )


def test_no_samples_are_refused():
    with pytest.raises(InputError) as caught:
        run([], rounded)

    assert str(caught.value) == "There are no samples to compare on. Check the evaluation data."


def test_missing_outputs_are_our_bug():
    with pytest.raises(InternalError, match="int8 has the outputs \\['y'\\], its reference float has \\['logits'\\]"):
        run(samples(1, 1, 2), lambda x: {"y": x})


def test_each_output_has_its_own_figures():
    def two(x):
        return {"logits": x, "index": x.argmax(axis=1)}

    def two_rounded(x):
        return {"logits": rounded(x)["logits"], "index": np.zeros(len(x), np.int64)}

    data = samples(50, 1, 4)
    seen = run(data, two_rounded, reference=two)

    index = np.array([each.inputs["x"].argmax() for each in data])
    assert list(seen.sqnr_by_output) == ["logits"]
    assert seen.sqnr_by_output["logits"] == seen.sqnr_db
    assert seen.equal_by_output == {"index": (index == 0).mean()}


def test_an_integer_first_output_has_no_float_figures():
    seen = run(samples(5, 1, 4), lambda x: {"index": x.argmax(axis=1)}, reference=lambda x: {"index": x.argmax(axis=1)})

    assert (seen.agreement, seen.cosine, seen.sqnr_db, seen.max_abs_error) == (None,) * 4
    assert seen.equal_by_output == {"index": 1.0}
    assert seen.max_steps({}) == 0.0


def test_steps_are_the_worst_over_outputs_each_in_its_own():
    def reference(x):
        return {"a": x, "b": 10 * x}

    def strayed(x):
        return {"a": x + 0.02, "b": 10 * x + 0.3}

    seen = run([sample(np.array([[-1.0, 1.55]]))], strayed, reference=reference)

    assert seen.max_steps({"a": 0.01, "b": 0.1}) == pytest.approx(3.0)
    assert seen.max_steps({"a": 0.001, "b": 0.1}) == pytest.approx(20.0)
    assert seen.max_steps({"a": 0.01}) == pytest.approx(0.3 / (25.5 / 255))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_broken_output_has_no_metric_and_the_worst_of_figures(value):
    def broken(x):
        return {"logits": np.where(x > 2.5, value, x)}

    def strict(outputs, labels):
        assert np.isfinite(outputs["logits"]).all()
        return outputs["logits"][np.arange(len(labels)), labels]

    data = samples(60, 2, 4)
    count = sum(int((each.inputs["x"] > 2.5).sum()) for each in data)
    seen = run(data, broken, metric_from_callable(strict))

    assert 0 < count == seen.incomparable
    assert seen.reference_metric is not None
    assert (seen.metric, seen.drop, seen.drop_interval, seen.cosine) == (None,) * 4
    assert (seen.sqnr_db, seen.max_abs_error) == (-math.inf, math.inf)


def test_nan_in_a_later_output_is_counted():
    seen = run(
        samples(3, 1, 4),
        lambda x: {"logits": x, "boxes": np.full_like(x, np.nan)},
        metric_from_name("top1"),
        reference=lambda x: {"logits": x, "boxes": x},
    )

    assert (seen.incomparable, seen.metric, seen.sqnr_db) == (12, None, math.inf)


def test_outputs_of_another_shape_are_counted_and_left_to_the_metric():
    count = metric_from_callable(lambda outputs, labels: -float(abs(len(outputs["boxes"]) - labels[0])), "count")
    data = [sample(np.arange(float(n)), [n]) for n in range(2, 12)]

    seen = run(data, lambda x: {"boxes": x[:9]}, count, reference=lambda x: {"boxes": x})

    assert seen.reshaped == 2
    assert seen.sqnr_db == -math.inf
    assert (seen.reference_metric, seen.metric, seen.drop) == (0.0, -0.3, 0.3)


def test_a_metric_that_scores_the_batch_counts_once_a_sample():
    mean = metric_from_callable(lambda outputs, _: float(outputs["logits"].mean()), "mean")
    data = samples(10, 4, 3)

    seen = run(data, rounded, mean)

    assert seen.samples == 40
    assert seen.reference_metric == pytest.approx(np.mean([each.inputs["x"].mean() for each in data]))


def test_scores_that_cannot_be_paired_are_refused():
    def moody(outputs, labels):
        return np.zeros(2) if (4 * outputs["logits"] % 1 == 0).all() else 0.0

    with pytest.raises(InputError) as caught:
        run(samples(3, 2, 2), rounded, metric_from_callable(moody))

    assert str(caught.value) == (
        "The metric gave 3 scores for one model and 6 for another, on the same samples. "
        "It must return a float always, or always one score for each item of the batch."
    )


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_a_correlation_is_of_all_samples_and_so_is_its_drop(name):
    from scipy import stats

    def blurred(x):
        return {"y": np.rint(x)}

    rng = np.random.default_rng(1)
    data = [sample(rng.normal(size=(n, 1)) * 3, rng.integers(0, 21, n) / 4) for n in rng.integers(1, 4, 200)]
    data = [sample(each.inputs["x"] + each.labels[:, None], each.labels) for each in data]
    correlation = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}[name]
    x = np.concatenate([each.inputs["x"][:, 0] for each in data])
    labels = np.concatenate([each.labels for each in data])

    seen = run(data, blurred, metric_from_name(name), reference=lambda x: {"y": x})

    assert seen.reference_metric == pytest.approx(correlation(x, labels)[0])
    assert seen.metric == pytest.approx(correlation(np.rint(x), labels)[0])
    assert seen.drop == pytest.approx(seen.reference_metric - seen.metric)
    expected = stats.bootstrap(
        (x, np.rint(x), labels),
        lambda a, b, c: correlation(a, c)[0] - correlation(b, c)[0],
        paired=True,
        vectorized=False,
        n_resamples=1000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    # The ends of an interval of 1,000 draws stray by a tenth of its width or less.
    assert seen.drop_interval == pytest.approx((expected.low, expected.high), abs=0.1 * (expected.high - expected.low))


def test_embeddings_of_consecutive_samples_are_compared():
    from scipy import stats

    rng = np.random.default_rng(2)
    scores = rng.uniform(0, 5, 150)
    data = [sample(rng.normal(size=(1, 8)), [score]) for score in scores for _ in range(2)]

    seen = run(data, rounded, metric_from_name("spearman"))

    x = np.concatenate([each.inputs["x"] for each in data]).reshape(150, 2, 8)
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in x]
    assert seen.samples == 300
    assert seen.reference_metric == pytest.approx(stats.spearmanr(cosines, scores)[0])


def test_a_broken_runner_does_not_spoil_the_others_correlation():
    data = [sample([[float(i)]], [i]) for i in range(10)]

    seen = run(data, lambda x: {"logits": np.where(x == 3, np.nan, x)}, metric_from_name("pearson"))

    assert (seen.reference_metric, seen.metric, seen.drop) == (pytest.approx(1.0), None, None)


# Masks


@pytest.mark.parametrize("mask", [-3e38, -np.finfo(np.float32).max, -np.inf])
@pytest.mark.parametrize("other", [-3e38, -np.inf])
def test_a_mask_weighs_nothing_and_leaves_the_errors_of_the_others_to_be_seen(mask, other):
    x = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    y = (x + np.float32(0.25)).astype(np.float32)
    hidden = np.arange(5) >= np.array([3, 5, 2, 4, 1, 5])[:, None]

    found = run(
        [sample(np.zeros(6))],
        lambda _: {"logits": np.where(hidden, np.float32(other), y)},
        reference=lambda _: {"logits": np.where(hidden, np.float32(mask), x)},
    )

    signal, noise = (np.sum(array[~hidden].astype(np.float64) ** 2) for array in (x, x - y))
    assert found.sqnr_db == pytest.approx(10 * math.log10(signal / noise), abs=1e-6)
    assert found.max_abs_error == pytest.approx(0.25, abs=1e-6)
    assert found.agreement == 1
    assert found.incomparable == 0


@pytest.mark.parametrize("other", [0.0, -1e4, 3e38])
def test_a_mask_that_a_target_lost_is_seen(other):
    found = run(
        [sample(np.zeros(1))],
        lambda _: {"logits": np.array([[1.0, other]], np.float32)},
        reference=lambda _: {"logits": np.array([[1.0, -3e38]], np.float32)},
    )

    assert found.incomparable == 1
    assert found.sqnr_db == -math.inf


def test_half_precision_has_no_value_that_stands_for_an_infinite_one():
    x = np.array([[1.0, -65504.0]], np.float16)

    found = run([sample(x)], lambda x: {"logits": x + np.float16(0.5)})

    assert found.incomparable == 0
    assert found.max_abs_error == 0.5


def digest(data, target=rounded, metric=None):
    return run(data, target, metric).samples_digest


def test_the_digest_is_of_the_samples_and_not_of_what_became_of_them():
    data = samples(5, 2, 3)

    assert len(digest(data)) == 64
    assert digest(data) == digest(samples(5, 2, 3), identity, metric_from_name("top1"))


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:4],
        lambda data: data[::-1],
        lambda data: [*data[:4], sample(data[4].inputs["x"] + 1e-6, data[4].labels)],
        lambda data: [*data[:4], sample(data[4].inputs["x"], data[4].labels ^ 1)],
    ],
    ids=["fewer", "another order", "another value", "another label"],
)
def test_other_samples_have_another_digest(change):
    data = samples(5, 2, 3)

    assert digest(change(data)) != digest(data)


def test_samples_are_told_by_what_they_were_before_preprocessing():
    file, other = np.arange(9, dtype=np.uint8), np.arange(1, 10, dtype=np.uint8)
    x = np.ones((1, 3))

    assert digest([sample(x, raw={"x": file})]) == digest([sample(2 * x, raw={"x": file})])
    assert digest([sample(x, raw={"x": file})]) != digest([sample(x, raw={"x": other})])
