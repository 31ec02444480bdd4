"""Which target, precision and calibration reader a device is best served with: a table, with its reasons."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from qdeploy.device import VNNI, Device, Kind, this_device
from qdeploy.errors import InputError, UnavailableError
from qdeploy.recipe import Recipe, TargetRequest
from qdeploy.registry import suggestion

AUTO = "auto"
"""The target, or the device, that this machine decides."""

NOT_MEASURED = "not measured here"

Here = Callable[[], Device | None]
"""Finds what models would run on here; None if nothing is known of it."""


@dataclass(frozen=True)
class Reason:
    """Why a device is served so.

    Attributes:
        text: In one or two sentences.
        evidence: The page of this documentation that has the figures, someone else's document, or that there is none.
    """

    text: str
    evidence: str


@dataclass(frozen=True)
class Recommendation:
    """What serves a kind of device best.

    Attributes:
        device: What `--device` calls it.
        kind: Of device.
        features: The device has one of these; empty for all that no earlier row is for.
        covers: Which devices that are, in words.
        target: Backend name.
        precision: One that it takes.
        reader: Calibration reader; None where nothing is calibrated.
        options: Of the target, as texts.
        reasons: For all of it.
    """

    device: str
    kind: Kind
    features: frozenset[str]
    covers: str
    target: str
    precision: str
    reader: str | None
    reasons: tuple[Reason, ...]
    options: Mapping[str, str] = field(default_factory=dict)

    def request(self, precision: str = "", options: Mapping[str, str] | None = None) -> TargetRequest:
        """The target as a recipe has it; a precision and options of the user's count more."""
        return TargetRequest(self.target, precision or self.precision, {**self.options, **(options or {})})


_MSE = Reason(
    "The reader mse, with bias correction, kept 99.3 % of EfficientNet-Lite0's decisions and 23.4 dB of its logits, "
    "minmax 22.7 dB.",
    "docs/benchmarks.md#accuracy",
)
_INT8_ELSEWHERE = Reason(
    "ONNX Runtime's documentation expects a gain where a CPU has VNNI or dot products, and warns that older ones may "
    "be slower in INT8 than in float. Compare on the device: qdeploy bench.",
    "onnxruntime.ai, Quantize ONNX models; " + NOT_MEASURED,
)
_NO_SATURATION = Reason(
    "Products are added in 32 bits, so that 8-bit weights cannot saturate.",
    "onnxruntime.ai, Quantize ONNX models; " + NOT_MEASURED,
)
_FP16_FIRST = Reason(
    "FP16 first: INT8 convolutions of TensorRT-RTX write float32 and requantize in a kernel of their own. No latency "
    "of an engine was measured so far.",
    "docs/tensorrt.md#precisions",
)

RECOMMENDATIONS = (
    Recommendation(
        "x86",
        "x86",
        VNNI,
        "x86 CPUs with VNNI: Intel servers since Cascade Lake, others since Ice Lake or Alder Lake, AMD since Zen 4",
        "ort-cpu",
        "int8",
        "mse",
        (
            Reason(
                "EfficientNet-Lite0 in INT8 is 2.24× as fast as FP32 on one thread, 1.88× on two (AMD EPYC with VNNI).",
                "docs/benchmarks.md#latency",
            ),
            Reason(
                "Transformers: int8-dynamic needs no calibration. MiniLM is 2.18× as fast so, 2.12× calibrated.",
                "docs/benchmarks.md#text",
            ),
            _MSE,
        ),
    ),
    Recommendation(
        "x86-no-vnni",
        "x86",
        frozenset(),
        "x86 CPUs without VNNI, with AVX-512 or not: older ones of Intel, and AMD before Zen 4",
        "ort-cpu",
        "int8",
        "mse",
        (
            Reason(
                "Warning: without VNNI, ONNX Runtime adds pairs of products in 16 bits, which saturate with 8-bit "
                "weights: EfficientNet-Lite0 fell from 88.7 to 82.7 % top-1. The option reduce_range gives weights of "
                "7 bits, which cannot: 89.7 %, as with VNNI.",
                "docs/devices.md#without-vnni",
            ),
            _INT8_ELSEWHERE,
            _MSE,
        ),
        {"reduce_range": "true"},
    ),
    Recommendation(
        "arm",
        "arm",
        frozenset({"asimddp"}),
        "64-bit ARM CPUs with dot products: Neoverse, Cortex-A55, A75, A76 and later, Raspberry Pi 5",
        "ort-cpu",
        "int8",
        "mse",
        (_INT8_ELSEWHERE, _NO_SATURATION, _MSE),
    ),
    Recommendation(
        "arm-no-dotprod",
        "arm",
        frozenset(),
        "64-bit ARM CPUs without dot products: Cortex-A53, A57, A72, Raspberry Pi 3 and 4",
        "ort-cpu",
        "int8",
        "mse",
        (
            Reason("INT8 makes the file smaller; whether it is faster, the device must show.", NOT_MEASURED),
            _INT8_ELSEWHERE,
            _NO_SATURATION,
            _MSE,
        ),
    ),
    Recommendation(
        "nvidia",
        "nvidia",
        frozenset({"sm80", "sm86", "sm89", "sm120", "sm121"}),
        "NVIDIA GPUs that TensorRT-RTX builds for without being told: A100, GeForce RTX 30, 40 and 50, L4, L40",
        "tensorrt",
        "fp16",
        None,
        (_FP16_FIRST,),
    ),
    Recommendation(
        "nvidia-sm75",
        "nvidia",
        frozenset({"sm75"}),
        "NVIDIA Turing: T4, GeForce RTX 20",
        "tensorrt",
        "fp16",
        None,
        (
            Reason("TensorRT-RTX builds for sm75 only when it is named.", "docs/tensorrt.md#options"),
            _FP16_FIRST,
        ),
        {"arch": "sm75"},
    ),
    Recommendation(
        "nvidia-sm90",
        "nvidia",
        frozenset({"sm87", "sm90", "sm100", "sm103"}),
        "NVIDIA GPUs that TensorRT-RTX has no engines for: H100, H200, B200, Jetson Orin",
        "tensorrt",
        "fp16",
        None,
        (
            Reason("It needs the package tensorrt, on the machine with the GPU.", "docs/tensorrt.md#options"),
            Reason(
                "FP16 needs no calibration and loses next to nothing; compare int8-fp16 on the device.", NOT_MEASURED
            ),
        ),
    ),
    Recommendation(
        "apple",
        "apple",
        frozenset(),
        "iPhones, iPads and Macs with Apple chips",
        "coreml",
        "fp16",
        None,
        (
            Reason("The Neural Engine computes in float16.", "docs/coreml.md"),
            Reason(
                "On A17 Pro, M4 and later it also multiplies int8 by int8: compare coreml:int8 with "
                "--set coreml.compute=float16 on the device.",
                "Apple's coremltools guide, Optimizing: what's new in iOS 17; " + NOT_MEASURED,
            ),
        ),
    ),
)
"""In order: the first that is for a device's kind, and for one of its features, counts."""


def recommend(device: Device) -> Recommendation:
    """The recommendation for a device.

    Raises:
        UnavailableError: There is none.
    """
    for row in RECOMMENDATIONS:
        if row.kind == device.kind and (not row.features or row.features & device.features):
            return row
    what = f"Nothing is recommended for {device.name} ({', '.join(sorted(device.features))})."
    raise UnavailableError(what, "Name a target: qdeploy backends lists them.")


def recommend_by_name(name: str, here: Here = this_device) -> Recommendation:
    """The recommendation for what `--device` says: a device of the table, or `auto` for this machine's.

    Args:
        name: Of the device.
        here: Finds this machine's.

    Raises:
        InputError: The table has no such device.
        UnavailableError: Nothing is known of this machine, or nothing is recommended for it.
    """
    if name == AUTO:
        return recommend(_known(here()))
    known = {row.device: row for row in RECOMMENDATIONS}
    if name not in known:
        raise InputError(f"Unknown device {name!r}.", suggestion(name, [AUTO, *known]))
    return known[name]


def _known(device: Device | None) -> Device:
    if device is None:
        what = "Which instructions this machine's CPU has is not known: its system does not say."
        raise UnavailableError(what, "Name the device (--device x86, x86-no-vnni, …), or the target itself.")
    return device


def with_chosen_targets(recipe: Recipe, here: Here = this_device) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with what `auto` stands for among its targets, and a note for the report on each choice.

    Args:
        recipe: What a run is to do.
        here: Finds this machine's device.

    Raises:
        UnavailableError: Nothing is known of this machine, or nothing is recommended for it.
    """
    targets, notes = [], []
    for request in recipe.targets:
        if request.name != AUTO:
            targets.append(request)
            continue
        device = _known(here())
        found = recommend(device)
        targets.append(found.request(request.precision, request.options))
        notes.append(_note(device, found, targets[-1]))
    return replace(recipe, targets=tuple(targets)), tuple(notes)


def _note(device: Device, found: Recommendation, chosen: TargetRequest) -> str:
    options = "".join(f" with {key}={value}" for key, value in chosen.options.items())
    reasons = " ".join(f"{reason.text} ({reason.evidence})" for reason in found.reasons)
    return (
        f"--target auto chose {chosen.name}:{chosen.precision}{options} for {device.name} ({found.device}). {reasons}"
    )
