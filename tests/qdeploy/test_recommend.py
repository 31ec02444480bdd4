"""The table of recommendations: what it says of each device, that it can be followed, and that its figures are ours."""

import re
from pathlib import Path

import pytest

from qdeploy import pipeline, registry
from qdeploy.backend import parse_options
from qdeploy.device import Device, cpu_from_cpuinfo, gpu_from_driver
from qdeploy.errors import InputError, UnavailableError
from qdeploy.model import ModelSource
from qdeploy.recipe import Recipe, TargetRequest
from qdeploy.recommend import AUTO, RECOMMENDATIONS, recommend, recommend_by_name, with_chosen_targets

ROOT = Path(__file__).parents[2]
SOURCE = ModelSource.parse("net.onnx")
HASWELL = cpu_from_cpuinfo("x86_64", "model name: Haswell\nflags: fpu avx avx2 fma")
each_row = pytest.mark.parametrize("row", RECOMMENDATIONS, ids=lambda row: row.device)


def cpu(machine, flags):
    return cpu_from_cpuinfo(machine, f"model name: a CPU\nflags: {flags}")


@pytest.mark.parametrize(
    ("device", "name", "target", "precision"),
    [
        (cpu("x86_64", "avx2 avx512f avx512_vnni"), "x86", "ort-cpu", "int8"),
        (cpu("x86_64", "avx2 avx_vnni"), "x86", "ort-cpu", "int8"),
        (cpu("x86_64", "avx2 avx512f avx512bw"), "x86-no-vnni", "ort-cpu", "int8"),
        (cpu("x86_64", "sse2"), "x86-no-vnni", "ort-cpu", "int8"),
        (cpu("aarch64", "asimd asimddp i8mm"), "arm", "ort-cpu", "int8"),
        (cpu("aarch64", "asimd"), "arm-no-dotprod", "ort-cpu", "int8"),
        (gpu_from_driver("L4", 8, 9), "nvidia", "tensorrt", "fp16"),
        (gpu_from_driver("T4", 7, 5), "nvidia-sm75", "tensorrt", "fp16"),
        (gpu_from_driver("H200", 9, 0), "nvidia-sm90", "tensorrt", "fp16"),
        (Device("apple", "Apple M2 Pro", frozenset()), "apple", "coreml", "fp16"),
    ],
)
def test_a_device_gets_what_it_is_best_served_with(device, name, target, precision):
    found = recommend(device)

    assert (found.device, found.target, found.precision) == (name, target, precision)
    assert recommend_by_name(name) == found


def test_only_x86_without_vnni_gets_weights_of_seven_bits():
    reduced = [row.device for row in RECOMMENDATIONS if "reduce_range" in row.options]

    assert reduced == ["x86-no-vnni"]
    assert "saturate" in recommend(HASWELL).reasons[0].text


@each_row
def test_a_recommendation_can_be_followed(row):
    kind = registry.backends().load(row.target)

    assert row.precision in kind.precisions
    parse_options(kind, row.options)
    contract = kind().contract(row.precision, parse_options(kind, row.options))
    calibrated = contract.form.value.startswith("qdq")
    assert (row.reader is not None) == calibrated
    if row.reader is not None:
        # An export without --reader follows the recommendation.
        assert row.reader == Recipe(SOURCE, ()).reader
        registry.calibration_readers().load(row.reader)


@each_row
def test_evidence_is_a_page_that_has_the_figures_or_says_that_there_are_none(row):
    for reason in row.reasons:
        page, _, anchor = reason.evidence.partition("#")
        figures = re.findall(r"\d+\.\d+", reason.text)
        if not page.startswith("docs/"):
            assert "not measured here" in reason.evidence
            assert not figures
            continue
        text = (ROOT / page).read_text()
        titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        headings = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
        assert not anchor or anchor in headings
        for figure in figures:
            assert figure in text


@each_row
def test_every_row_can_be_reached_by_its_own_features(row):
    features = [frozenset({feature}) for feature in row.features] or [frozenset({"nothing known"})]

    for each in features:
        assert recommend(Device(row.kind, "a device", each)) is row


def test_a_gpu_that_the_table_does_not_know_gets_nothing():
    with pytest.raises(UnavailableError) as caught:
        recommend(gpu_from_driver("Tesla K80", 3, 7))

    assert str(caught.value) == (
        "Nothing is recommended for Tesla K80 (sm37). Name a target: qdeploy backends lists them."
    )


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(InputError, match=r"Unknown device 'arn'. Did you mean 'arm'\? Known: auto, x86, x86-no-vnni, "):
        recommend_by_name("arn")


def test_a_system_that_does_not_tell_its_cpu_gets_no_guess():
    with pytest.raises(UnavailableError, match="Which instructions this machine's CPU has is not known") as caught:
        recommend_by_name(AUTO, lambda: None)
    assert caught.value.cure == "Name the device (--device x86, x86-no-vnni, …), or the target itself."


def test_auto_becomes_a_concrete_target_with_a_note():
    recipe = Recipe(SOURCE, (TargetRequest("coreml", "fp16"), TargetRequest(AUTO)))

    chosen, notes = with_chosen_targets(recipe, lambda: HASWELL)

    assert chosen.targets == (
        TargetRequest("coreml", "fp16"),
        TargetRequest("ort-cpu", "int8", {"reduce_range": "true"}),
    )
    (note,) = notes
    assert note.startswith(
        "--target auto chose ort-cpu:int8 with reduce_range=true for Haswell (x86-no-vnni). Warning: without VNNI, "
    )


def test_what_the_user_says_of_auto_counts_more():
    recipe = Recipe(SOURCE, (TargetRequest(AUTO, "int8-dynamic", {"threads": "2", "reduce_range": "false"}),))

    chosen, _ = with_chosen_targets(recipe, lambda: HASWELL)

    assert chosen.targets == (TargetRequest("ort-cpu", "int8-dynamic", {"reduce_range": "false", "threads": "2"}),)


def test_without_auto_this_machine_is_not_looked_at():
    recipe = Recipe(SOURCE, (TargetRequest("ort-cpu"),))

    def refuse():
        raise AssertionError

    assert with_chosen_targets(recipe, refuse) == (recipe, ())


def test_the_jobs_of_a_chosen_target_follow_its_contract():
    chosen, _ = with_chosen_targets(Recipe(SOURCE, (TargetRequest(AUTO),)), lambda: HASWELL)

    (job,) = pipeline.look_up(chosen)

    assert job.options.reduce_range
    assert {rule.inputs[1].integer.bits for rule in job.contract.rules if rule.op_type == "Conv" and rule.inputs} == {7}
