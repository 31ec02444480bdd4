import pytest

from qdeploy.backend import Evidence, Layer
from qdeploy.report import schema
from qdeploy.report.contents import Contents


@pytest.fixture
def report() -> schema.Report:
    """A passed target and one that cannot be built: the same that lies in report.json."""
    passed = schema.Target(
        target="ort-cpu",
        precision="int8",
        status="pass",
        evidence=Evidence.EXECUTED,
        reason="Drop 0.0022 is within 0.02.",
        folder="ort-cpu",
        artifact="ort-cpu/model.onnx",
        size_bytes=27_500,
        compression=3.2,
        metric=0.9822,
        drop=0.0022,
        drop_interval=(-0.0022, 0.0067),
        agreement=0.9933,
        cosine=0.9995,
        sqnr_db=31.25,
        max_abs_error=0.125,
        outputs={
            "logits": schema.Output(sqnr_db=31.25, cosine=0.9995, max_abs_error=0.125, equal=0.5),
            "count": schema.Output(equal=1.0),
        },
        evaluation_samples=450,
        evaluation_digest="a0b1",
        latency_ms=schema.Latency(
            p50=0.25,
            p90=0.3,
            p99=0.4,
            runs=100,
            p50_interval=(0.24, 0.26),
            quantiles=tuple(round(0.2 + 0.01 * step, 2) for step in range(21)),
        ),
        baseline_latency_ms=schema.Latency(p50=0.5, p90=0.6, p99=0.75, runs=100),
        speedup=2.0,
        speedup_interval=(1.9, 2.1),
        reader="mse",
        samples=200,
        quantized_ops={"int8": 7, "float": 1},
        steps=(schema.Step(name="bias-correction", detail="5 biases"),),
        pareto=(
            schema.ParetoPoint(kept_float=(), sqnr_db=31.25, cost=0.0),
            schema.ParetoPoint(kept_float=("conv1",), sqnr_db=37.5, cost=0.125, chosen=True),
        ),
        options={"threads": 0},
        warnings=("One image is there twice: größe.png.",),
    )
    unavailable = schema.Target(
        target="tensorrt", precision="int8", status="unavailable", reason="tensorrt is not installed."
    )
    return schema.Report(
        qdeploy="0.1.0",
        model=schema.Model(name="digits", digest="00ff", parameters=21_034),
        reference=schema.Reference(
            size_bytes=88_000,
            metric=schema.Metric(name="top1", value=0.9844, samples=450),
            latency_ms=schema.Latency(p50=0.5, p90=0.6, p99=0.75, runs=100, threads=2, batch=1),
            eager=schema.Eager(max_abs_error=1.5e-6, sqnr_db=130.25, agreement=1.0),
        ),
        targets=(passed, unavailable),
        max_drop=0.02,
        environment={"onnxruntime": "1.32.0"},
        notes=("The module was float16.",),
    )


@pytest.fixture
def layers() -> tuple[Layer, ...]:
    return (
        Layer("conv1", "Conv", "conv1_quant", ("int8",), "int8", ("int8",), "int8", ("relu1",)),
        Layer("softmax", "Softmax", "softmax", ("fp32",), None, ("fp32",), "fp32"),
    )


@pytest.fixture
def contents(report, layers) -> Contents:
    """All that a page can show."""
    ranges = (
        schema.TensorRange(
            name="image",
            integer="uint8",
            scale=0.0078125,
            zero_point=128,
            range=(-1.0, 0.9921875),
            observed=(-1.5, 1.0),
            clipped=0.0625,
            counts=(5, 0, 40, 300, 1000, 2),
        ),
        schema.TensorRange(
            name="constant",
            integer="int8",
            scale=1.0,
            zero_point=0,
            range=(-128, 127),
            observed=(0, 0),
            clipped=0,
            counts=(9,),
        ),
    )
    effects = {"int4": schema.Effect(sqnr_db=12.5), "int8": schema.Effect(sqnr_db=None)}
    sensitivity = schema.Sensitivity(
        analysis="sensitivity",
        model="digits",
        target="ort-cpu",
        samples=64,
        layers=(schema.LayerSensitivity(node="conv1", op_type="Conv", weight="conv1.weight", effects=effects),),
    )
    recipe = '[model]\nsource = "model.py:build"\n'
    return Contents(report, {"ort-cpu": layers}, {"ort-cpu": ranges}, recipe, {"ort-cpu": sensitivity})
