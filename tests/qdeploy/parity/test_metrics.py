from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qdeploy.errors import InputError
from qdeploy.parity.metrics import Difference, difference, metric_from_callable, metric_from_name

FLOATS = st.floats(-1e3, 1e3, width=32)
PAIRS = hnp.array_shapes(min_dims=1, max_dims=3, max_side=5).flatmap(
    lambda shape: st.tuples(
        hnp.arrays(np.float32, shape, elements=FLOATS), hnp.arrays(np.float32, shape, elements=FLOATS)
    )
)


def scored(metric, outputs, labels):
    scorer = metric.scorer()
    scorer.add(metric.measure(outputs, labels))
    return scorer.rows()


def score(name, logits, labels):
    return scored(metric_from_name(name), {"logits": np.asarray(logits)}, np.asarray(labels))


class TestTopK:
    @pytest.mark.parametrize(("name", "k"), [("top1", 1), ("top5", 5)])
    def test_agrees_with_scikit_learn(self, name, k):
        from sklearn.metrics import top_k_accuracy_score

        rng = np.random.default_rng(0)
        logits, labels = rng.normal(size=(200, 12)), rng.integers(12, size=200)

        scores = score(name, logits, labels)

        assert scores.dtype == np.float64
        assert scores.shape == (200,)
        assert scores.mean() == top_k_accuracy_score(labels, logits, k=k, labels=range(12))

    @given(hnp.arrays(np.float32, (4, 6), elements=st.sampled_from([0.0, 0.25, 0.5])), st.integers(0, 5))
    def test_top1_is_argmax_also_among_equal_logits(self, logits, label):
        labels = np.full(4, label)

        assert score("top1", logits, labels).tolist() == (logits.argmax(axis=1) == labels).tolist()

    def test_equal_logits_do_not_score_for_every_class(self):
        assert score("top5", np.zeros((10, 10)), np.arange(10)).mean() == 0.5

    @pytest.mark.parametrize("name", ["top1", "top5"])
    def test_a_row_with_nan_misses(self, name):
        logits = np.zeros((2, 8))
        logits[0, 3] = np.nan

        assert score(name, logits, [0, 0]).tolist() == [0.0, 1.0]

    def test_masked_logits_are_ordinary(self):
        assert score("top1", [[-np.inf, 1.0]], [1]).tolist() == [1.0]

    def test_labels_in_a_column_are_taken(self):
        assert score("top1", [[0.0, 1.0], [1.0, 0.0]], [[1], [1]]).tolist() == [1.0, 0.0]

    @pytest.mark.parametrize("label", [-1, 3])
    def test_refuses_labels_that_are_no_class(self, label):
        with pytest.raises(InputError) as caught:
            score("top1", np.zeros((2, 3)), [0, label])

        assert str(caught.value) == (
            f"The label {label} is none of the 3 classes of the output 'logits'. Labels count from 0 to 2."
        )

    def test_refuses_labels_that_are_not_integers(self):
        with pytest.raises(InputError, match="needs class indices as labels; these have dtype float64"):
            score("top1", np.zeros((1, 3)), [0.0])

    @pytest.mark.parametrize("shape", [(1,), (1, 1), (2, 3), (1, 4, 3)])
    def test_refuses_outputs_that_are_no_logits(self, shape):
        with pytest.raises(InputError) as caught:
            score("top1", np.zeros(shape), [0])

        assert str(caught.value) == (
            "The metric 'top1' needs 1 × classes logits, with more than 1 classes; "
            f"the first output 'logits' has shape {list(shape)}. "
            "Give a metric of your own: a callable that takes the outputs and the labels."
        )

    def test_refuses_top5_of_five_classes_which_is_always_right(self):
        with pytest.raises(InputError, match="more than 5 classes"):
            score("top5", np.zeros((1, 5)), [0])

    def test_an_unknown_name_is_answered_with_the_nearest(self):
        with pytest.raises(InputError) as caught:
            metric_from_name("top-1")

        assert str(caught.value) == "Unknown metric 'top-1'. Did you mean 'top1'? Known: pearson, spearman, top1, top5."


class TestCallable:
    outputs = {"y": np.array([[1.0], [3.0]], np.float32)}  # noqa: RUF012 (read only)
    labels = np.array([2.0, 3.0])

    def test_takes_one_score_for_each_item(self):
        metric = metric_from_callable(lambda outputs, labels: -np.abs(outputs["y"][:, 0] - labels))

        scores = scored(metric, self.outputs, self.labels)

        assert scores.tolist() == [-1.0, 0.0]
        assert scores.dtype == np.float64

    @pytest.mark.parametrize("value", [0.25, np.float32(0.25), np.array([0.25]), np.array(0.25)])
    def test_takes_one_score_for_the_whole_sample(self, value):
        assert scored(metric_from_callable(lambda *_: value, "mine"), self.outputs, self.labels).tolist() == [0.25]

    def test_is_named_after_the_function_or_its_class(self):
        class Distance:
            def __call__(self, *_):
                return 0.0

        def nearness(outputs, labels):
            return 0.0

        assert metric_from_callable(nearness).name == "nearness"
        assert metric_from_callable(Distance()).name == "Distance"
        assert metric_from_callable(nearness, "metrics.py:nearness").name == "metrics.py:nearness"

    def test_its_exception_names_it(self):
        with pytest.raises(InputError) as caught:
            scored(metric_from_callable(lambda outputs, _: outputs["z"], "mine"), self.outputs, self.labels)

        assert str(caught.value) == (
            "The metric 'mine' raised KeyError: 'z'. It is called with the outputs by name and the sample's labels."
        )
        assert isinstance(caught.value.__cause__, KeyError)

    def test_refuses_another_number_of_scores(self):
        with pytest.raises(InputError) as caught:
            scored(metric_from_callable(lambda *_: np.zeros(3), "mine"), self.outputs, self.labels)

        assert str(caught.value) == (
            "The metric 'mine' gave scores of shape [3] for labels of [2]. "
            "It must return a float, or one score for each item of the batch."
        )

    @pytest.mark.parametrize("value", [math.nan, math.inf, None])
    def test_refuses_scores_that_are_not_finite(self, value):
        with pytest.raises(InputError, match=r"The metric 'mine' gave (nan|inf)\. Its scores must be finite numbers"):
            scored(metric_from_callable(lambda *_: value, "mine"), self.outputs, self.labels)

    def test_what_is_no_number_is_refused(self):
        with pytest.raises(InputError, match="The metric 'mine' raised ValueError"):
            scored(metric_from_callable(lambda *_: "good", "mine"), self.outputs, self.labels)

    def test_what_it_prints_stays_off_standard_output(self, capsys):
        scored(metric_from_callable(lambda *_: print("hello") or 1.0), self.outputs, self.labels)  # noqa: T201 (the point)

        printed = capsys.readouterr()
        assert (printed.out, printed.err) == ("", "hello\n")


class TestFloatDifference:
    @given(PAIRS)
    def test_figures_are_the_textbook_ones(self, pair):
        x, y = (array.astype(np.float64) for array in pair)

        seen = difference(*pair)

        noise = ((x - y) ** 2).sum()
        assert seen.max_abs_error == np.abs(x - y).max()
        if noise == 0:
            assert seen.sqnr_db == math.inf
        elif (x**2).sum() == 0:
            assert seen.sqnr_db == -math.inf
        else:
            assert seen.sqnr_db == pytest.approx(10 * np.log10((x**2).sum() / noise), abs=1e-9)
        if x.shape[-1] >= 2:
            assert seen.agreement == (pair[0].argmax(axis=-1) == pair[1].argmax(axis=-1)).mean()
        else:
            assert seen.agreement is None

    @given(PAIRS)
    def test_cosine_agrees_with_scipy(self, pair):
        from scipy.spatial.distance import cosine as cosine_distance

        x, y = (array.astype(np.float64).reshape(-1) for array in pair)

        cosine = difference(*pair).cosine

        if x.any() and y.any():
            assert cosine == pytest.approx(1.0 - cosine_distance(x, y), abs=1e-9)
        else:
            assert cosine is None

    @given(
        st.lists(
            st.tuples(hnp.arrays(np.float32, 6, elements=FLOATS), hnp.arrays(np.float32, 6, elements=FLOATS)),
            min_size=1,
            max_size=6,
        )
    )
    def test_merging_samples_is_measuring_them_at_once(self, pairs):
        merged = difference(*(array[None] for array in pairs[0]))
        for reference, output in pairs[1:]:
            merged = merged.merge(difference(reference[None], output[None]))

        whole = difference(np.stack([pair[0] for pair in pairs]), np.stack([pair[1] for pair in pairs]))

        assert (merged.values, merged.equal, merged.agreement) == (whole.values, whole.equal, whole.agreement)
        assert merged.max_abs_error == whole.max_abs_error
        assert (merged.minimum, merged.maximum) == (whole.minimum, whole.maximum)
        for name in ("signal", "noise", "energy", "product"):
            assert getattr(merged, name) == pytest.approx(getattr(whole, name), rel=1e-9, abs=1e-6)

    @given(hnp.arrays(np.float32, (3, 4), elements=FLOATS), st.integers(0, 11))
    def test_nan_in_the_output_is_never_good(self, reference, place):
        output = reference.copy()
        output.flat[place] = np.nan

        seen = difference(reference, output)

        assert seen.incomparable == 1
        assert seen.sqnr_db == -math.inf
        assert seen.max_abs_error == math.inf
        assert seen.cosine is None
        assert seen.agreement == pytest.approx(2 / 3)
        assert seen.steps(None) == math.inf
        clean = difference(reference, reference)
        assert clean.merge(seen).sqnr_db == seen.merge(clean).sqnr_db == -math.inf

    def test_nan_in_both_is_not_equal(self):
        nan = np.full((1, 3), np.nan, np.float32)

        seen = difference(nan, nan)

        assert (seen.incomparable, seen.sqnr_db, seen.agreement, seen.equal_share) == (3, -math.inf, 0.0, 0.0)

    def test_equal_infinities_are_masks_and_no_difference(self):
        reference = np.array([[-np.inf, 3.0, 4.0]], np.float32)
        output = np.array([[-np.inf, 3.0, 3.5]], np.float32)

        seen = difference(reference, output)

        assert seen.incomparable == 0
        assert seen.max_abs_error == 0.5
        assert seen.sqnr_db == pytest.approx(10 * math.log10(25 / 0.25))
        assert (seen.minimum, seen.maximum) == (3.0, 4.0)

    @pytest.mark.parametrize("value", [np.inf, -np.inf])
    def test_infinity_on_one_side_is_never_good(self, value):
        finite, infinite = np.array([[1.0, 2.0]], np.float32), np.array([[1.0, value]], np.float32)

        for seen in (difference(finite, infinite), difference(infinite, finite)):
            assert (seen.incomparable, seen.sqnr_db, seen.max_abs_error) == (1, -math.inf, math.inf)

    def test_opposite_infinities_are_never_equal(self):
        seen = difference(np.array([np.inf, 1.0]), np.array([-np.inf, 1.0]))

        assert (seen.incomparable, seen.sqnr_db) == (1, -math.inf)

    def test_another_shape_is_counted_and_never_good(self):
        seen = difference(np.ones((2, 3), np.float32), np.ones((1, 3), np.float32))

        assert (seen.reshaped, seen.incomparable, seen.agreement) == (1, 0, 0.0)
        assert (seen.sqnr_db, seen.max_abs_error, seen.cosine) == (-math.inf, math.inf, None)

    def test_another_shape_does_not_hide_nan(self):
        assert difference(np.ones(3, np.float32), np.array([np.nan, 1.0])).incomparable == 1

    def test_half_precision_sums_do_not_overflow(self):
        seen = difference(np.full(1000, 300.0, np.float16), np.full(1000, 303.0, np.float16))

        assert seen.sqnr_db == pytest.approx(40.0)

    def test_an_empty_output_differs_in_nothing(self):
        seen = difference(np.zeros((0, 4), np.float32), np.zeros((0, 4), np.float32))

        assert (seen.sqnr_db, seen.max_abs_error, seen.agreement, seen.steps(None)) == (math.inf, 0.0, None, 0.0)


class TestSteps:
    reference = np.array([[-1.0, 0.0, 1.55]], np.float32)
    output = np.array([[-1.0, 0.0, 1.5]], np.float32)

    def test_of_a_quantized_output_are_its_scale(self):
        assert difference(self.reference, self.output).steps(0.025) == pytest.approx(2.0, rel=1e-5)

    def test_of_a_float_output_are_its_range_in_255_parts(self):
        assert difference(self.reference, self.output).steps(None) == pytest.approx(0.05 / (2.55 / 255), rel=1e-5)

    def test_of_a_constant_output_cannot_be_counted(self):
        constant = np.ones((1, 3), np.float32)

        assert difference(constant, constant).steps(None) == 0.0
        assert difference(constant, constant + 1).steps(None) == math.inf


class TestIntegerDifference:
    def test_only_equality_is_counted(self):
        seen = difference(np.array([1, 2, 3, 4]), np.array([1, 2, 3, 9]))

        assert seen.equal_share == 0.75
        assert (seen.sqnr_db, seen.cosine, seen.agreement, seen.max_abs_error, seen.steps(None)) == (None,) * 5

    def test_large_integers_are_compared_exactly(self):
        assert difference(np.array([2**53]), np.array([2**53 + 1])).equal_share == 0.0

    def test_booleans_are_compared_too(self):
        assert difference(np.array([True, False]), np.array([True, True])).equal_share == 0.5

    def test_no_values_are_all_equal(self):
        assert Difference(floating=False, values=0).equal_share == 1.0
