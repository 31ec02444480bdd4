from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats  # tests may load at once what they need

from qdeploy.errors import InputError
from qdeploy.parity.correlation import pearson, places, spearman
from qdeploy.parity.metrics import metric_from_name

ROWS = st.integers(2, 30).flatmap(lambda n: hnp.arrays(np.float64, (n, 2), elements=st.integers(-6, 6).map(float)))


def gathered(name, *samples):
    metric = metric_from_name(name)
    scorer = metric.scorer()
    for outputs, labels in samples:
        arrays = {k: np.asarray(v, np.float32) for k, v in outputs.items()}
        scorer.add(metric.measure(arrays, np.asarray(labels)))
    return scorer.rows()


def figure(name, *samples):
    return metric_from_name(name).figure(gathered(name, *samples))


class TestFigures:
    @given(ROWS)
    def test_agree_with_scipy_also_among_ties(self, rows):
        if (rows.min(axis=0) == rows.max(axis=0)).any():
            assert pearson(rows[None])[0] == spearman(places(rows)[None])[0] == 0.0
        else:
            assert pearson(rows[None])[0] == pytest.approx(stats.pearsonr(*rows.T)[0], abs=1e-9)
            assert spearman(places(rows)[None])[0] == pytest.approx(stats.spearmanr(*rows.T)[0], abs=1e-9)

    @given(ROWS, st.integers(0, 2**32 - 1))
    def test_a_draw_is_ranked_anew(self, rows, seed):
        draws = np.random.default_rng(seed).integers(len(rows), size=(5, len(rows)))

        figures = spearman(places(rows)[draws])

        ranks = stats.rankdata(rows[draws], axis=1)
        assert figures == pytest.approx(pearson(ranks), abs=1e-9)

    @pytest.mark.parametrize("value", [0.1, 1e-3, 1e300])
    def test_values_that_do_not_vary_correlate_with_nothing(self, value):
        rows = np.column_stack([np.full(7, value), np.arange(7.0)])

        assert pearson(rows[None]).tolist() == [0.0]

    def test_a_perfect_order_is_one_whatever_the_spacing(self):
        rows = np.column_stack([np.exp(np.arange(20.0)), np.arange(20.0)])

        assert spearman(places(rows)[None])[0] == pytest.approx(1.0)
        assert pearson(rows[None])[0] < 0.8


class TestCorrelated:
    def test_one_number_for_each_item_is_the_value(self):
        rows = gathered("pearson", ({"y": [[1.0], [3.0]]}, [0.5, 1.5]), ({"y": [2.0]}, [2]))

        assert rows.tolist() == [[1.0, 0.5], [3.0, 1.5], [2.0, 2.0]]

    def test_only_places_are_kept_for_spearman(self):
        assert gathered("spearman", ({"y": [30.0, 10.0, 30.0]}, [0.5, 7, 9])).tolist() == [[1, 0], [0, 1], [1, 2]]

    @pytest.mark.parametrize("batches", [[6], [1] * 6, [3, 1, 2]])
    def test_embeddings_are_paired_however_they_are_batched(self, batches):
        x = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
        labels = np.repeat([1.0, 2.0, 5.0], 2)
        ends = np.cumsum(batches)
        samples = [({"e": x[end - n : end]}, labels[end - n : end]) for n, end in zip(batches, ends, strict=True)]

        rows = gathered("pearson", *samples)

        wide = x.astype(np.float64)
        cosines = [wide[i] @ wide[i + 1] / np.linalg.norm(wide[i]) / np.linalg.norm(wide[i + 1]) for i in (0, 2, 4)]
        np.testing.assert_allclose(rows, np.column_stack([cosines, [1.0, 2.0, 5.0]]))

    def test_an_embedding_of_zero_has_no_direction(self):
        rows = gathered("pearson", ({"e": [[0.0, 0.0], [1.0, 2.0]]}, [1, 1]), ({"e": [[1.0, 2.0], [1.0, 2.0]]}, [2, 2]))

        assert rows[:, 0] == pytest.approx([0.0, 1.0])

    def test_the_first_output_with_one_row_for_each_item_counts(self):
        outputs = {"tokens": np.zeros((2, 3, 4)), "y": [[1.0], [2.0]], "z": [[2.0], [1.0]]}

        assert figure("spearman", (outputs, [1, 2])) == pytest.approx(1.0)

    def test_outputs_that_do_not_fit_are_listed(self):
        with pytest.raises(InputError) as caught:
            gathered("spearman", ({"tokens": np.zeros((1, 3, 4)), "s": np.zeros(())}, [1]))

        assert str(caught.value) == (
            "The metric 'spearman' needs a number or a vector for each of 1 labels; the outputs have the shapes "
            "'tokens' [1, 3, 4], 's' []. Put the pooling of embeddings into the model, or give a metric of your own."
        )

    def test_an_embedding_without_a_partner_is_refused(self):
        with pytest.raises(InputError) as caught:
            gathered("spearman", ({"e": np.eye(3)}, [1, 1, 2]))

        assert str(caught.value) == (
            "The metric 'spearman' compares embeddings in pairs, and the last one has no partner. "
            "Give samples that follow one another in pairs."
        )

    def test_a_pair_with_two_labels_is_refused(self):
        with pytest.raises(InputError) as caught:
            gathered("pearson", ({"e": np.eye(4)}, [1, 1, 2, 2.5]))

        assert str(caught.value) == (
            "The metric 'pearson' compares embeddings in pairs, and two that follow one another have the labels 2 and "
            "2.5. Take pairs apart (pairs=apart), or give both samples of a pair the same label."
        )

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_outputs_that_are_not_finite_are_refused(self, value):
        with pytest.raises(InputError, match=r"'pearson' cannot be computed: the output 'y' holds NaN or infinity\."):
            gathered("pearson", ({"y": [1.0, value]}, [1, 2]))

    def test_labels_that_do_not_differ_are_refused(self):
        with pytest.raises(InputError, match=r"The metric 'pearson' needs labels that differ; all are 3\. Give more"):
            gathered("pearson", ({"y": [1.0, 2.0]}, [3, 3]))
