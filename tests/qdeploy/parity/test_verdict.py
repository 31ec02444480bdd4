from __future__ import annotations

import math

import numpy as np
import pytest

from qdeploy.errors import InputError, InternalError
from qdeploy.parity.compare import Comparison
from qdeploy.parity.metrics import Difference, difference, metric_from_name
from qdeploy.parity.verdict import Stray, Verdict, budget_warning, judge, require_metric

GOOD = difference(np.array([[3.0, 4.0]]), np.array([[3.0, 4.25]]))
BAD = difference(np.array([[3.0, 4.0]]), np.array([[3.0, 8.0]]))
NAN = difference(np.array([[3.0, 4.0]]), np.array([[3.0, np.nan]]))


def labelled(drop, interval, first=GOOD):
    return Comparison(300, {"logits": first}, 0.88, 0.88 - drop, drop, interval)


def unlabelled(first, **others):
    return Comparison(300, {"logits": first, **others})


def test_a_drop_within_the_budget_passes():
    assert judge(labelled(0.01, (0.0, 0.02)), max_drop=0.01) == Verdict(
        "pass",
        "Drop 0.0100 (95 % interval 0.0000 to 0.0200, 300 samples): within the allowed 0.01.",
    )


def test_a_drop_beyond_the_budget_fails():
    assert judge(labelled(0.0133, (-0.001, 0.03)), max_drop=0.01) == Verdict(
        "fail",
        "Drop 0.0133 (95 % interval -0.0010 to 0.0300, 300 samples): more than the allowed 0.01.",
    )


def test_a_budget_may_ask_for_a_gain():
    assert judge(labelled(-0.02, (-0.03, -0.01)), max_drop=-0.01).status == "pass"
    assert judge(labelled(-0.005, (-0.03, 0.01)), max_drop=-0.01).status == "fail"


def test_without_a_budget_only_a_proven_drop_fails():
    assert judge(labelled(0.05, (0.02, 0.08))) == Verdict(
        "pass",
        "Drop 0.0500 (95 % interval 0.0200 to 0.0800, 300 samples): no proven loss of more than 0.02.",
    )
    assert judge(labelled(0.05, (0.021, 0.08))) == Verdict(
        "fail",
        "Drop 0.0500 (95 % interval 0.0210 to 0.0800, 300 samples): a proven loss of more than 0.02.",
    )


def test_labels_count_for_more_than_noise():
    assert judge(labelled(0.0, (0.0, 0.0), BAD)).status == "pass"


def test_without_labels_noise_decides():
    assert judge(unlabelled(GOOD)) == Verdict(
        "pass", "The first output's SQNR is 26.02 dB (300 samples), at least 10 dB."
    )
    assert judge(unlabelled(BAD)) == Verdict("fail", "The first output's SQNR is 1.94 dB (300 samples), below 10 dB.")


def test_equal_outputs_pass():
    same = np.ones((1, 3), np.float32)

    assert judge(unlabelled(difference(same, same))).status == "pass"


@pytest.mark.parametrize(("equal", "status"), [(90, "pass"), (89, "fail")])
def test_integers_are_judged_by_equality(equal, status):
    verdict = judge(unlabelled(Difference(floating=False, values=100, equal=equal)))

    assert verdict.status == status
    assert verdict.reason.startswith(f"{equal}.0% of the first output's integers equal FP32's (300 samples), ")


@pytest.mark.parametrize("max_drop", [None, 1.0, math.inf])
def test_nan_fails_whatever_the_budget(max_drop):
    verdict = judge(unlabelled(NAN), max_drop=max_drop)

    assert verdict.status == "fail"
    assert verdict.reason.startswith("Output values that are NaN, or infinite on one side of the comparison: 1; ")


def test_nan_in_a_later_output_fails_too():
    assert judge(unlabelled(GOOD, boxes=NAN)) == Verdict(
        "fail", "Output values that are NaN, or infinite on one side of the comparison: 1."
    )


def test_outputs_of_another_shape_fail_without_labels():
    reshaped = difference(np.ones((3, 4)), np.ones((2, 4)))

    verdict = judge(unlabelled(GOOD, boxes=reshaped))

    assert verdict.status == "fail"
    assert verdict.reason.endswith("; samples with an output of another shape than FP32's: 1.")
    assert judge(labelled(0.0, (0.0, 0.0), reshaped)).status == "pass"


def test_a_broken_contract_fails():
    accurate = labelled(0.0, (0.0, 0.0))

    assert judge(accurate, violations=["Conv_3 runs in float."]) == Verdict(
        "fail", "The artifact breaks its contract: Conv_3 runs in float."
    )
    assert judge(accurate, violations=["Conv_3 runs in float", "b", "c"]).reason == (
        "The artifact breaks its contract: Conv_3 runs in float (and 2 more)."
    )


@pytest.mark.parametrize(("strayed", "status"), [(None, "pass"), (1.0, "pass"), (1.1, "fail"), (math.nan, "fail")])
def test_straying_from_the_own_graph_fails(strayed, status):
    stray = None if strayed is None else Stray(strayed)
    assert judge(labelled(0.0, (0.0, 0.0)), stray=stray, tolerance_lsb=1.0).status == status


@pytest.mark.parametrize(
    ("own", "quantization", "status"), [(20, 15, "pass"), (10, 15, "fail"), (math.nan, 15, "fail")]
)
def test_straying_less_than_quantization_itself_is_no_fault(own, quantization, status):
    stray = Stray(14.0, float(own), float(quantization))
    assert judge(labelled(0.0, (0.0, 0.0)), stray=stray, tolerance_lsb=1.0).status == status


def test_all_failures_are_told():
    verdict = judge(unlabelled(BAD), violations=["Conv_3 runs in float"], stray=Stray(7.25), tolerance_lsb=1.0)

    assert verdict.reason == (
        "The artifact breaks its contract: Conv_3 runs in float; "
        "the artifact strays from its own QDQ graph by 7.2 steps of the output, where 1 are allowed; "
        "the first output's SQNR is 1.94 dB (300 samples), below 10 dB."
    )


def test_a_budget_that_slipped_through_without_labels_is_our_bug():
    with pytest.raises(InternalError):
        judge(unlabelled(GOOD), max_drop=0.01)


class TestRequireMetric:
    top1 = metric_from_name("top1")

    def test_a_budget_with_metric_and_labels_is_fine(self):
        require_metric(-0.01, self.top1, labelled=True)

    def test_without_a_budget_nothing_is_required(self):
        require_metric(None, None, labelled=False)

    def test_a_budget_without_a_metric_is_refused(self):
        with pytest.raises(InputError) as caught:
            require_metric(0.01, None, labelled=True)

        assert str(caught.value) == "A drop of at most 0.01 was asked for, but of no metric. Add --metric top1."

    def test_a_budget_without_labels_is_refused(self):
        with pytest.raises(InputError) as caught:
            require_metric(0.01, self.top1, labelled=False)

        assert str(caught.value) == (
            "A drop of at most 0.01 in top1 was asked for, but the evaluation data has no labels. "
            "Give labelled data with --evaluation, or leave out --max-drop."
        )

    def test_a_budget_that_is_no_number_is_refused(self):
        with pytest.raises(InputError, match="not a number"):
            require_metric(math.nan, self.top1, labelled=True)


@pytest.mark.parametrize("max_drop", [0.001, -0.001, 0.0])
def test_a_budget_finer_than_a_sample_warns(max_drop):
    assert budget_warning(max_drop, 300) == (
        f"The allowed drop of {max_drop:g} is finer than 300 samples can tell: one sample more or less makes 0.0033."
    )


def test_a_budget_of_a_sample_does_not_warn():
    assert budget_warning(0.01, 100) is None
