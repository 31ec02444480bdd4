"""The Python interface: its names, the one command, and the arrows one after the other."""

import subprocess
import sys
from types import FunctionType, ModuleType

import numpy as np
import pytest

import qdeploy

NAMES = {
    "Deployment",
    "InputError",
    "Preprocessing",
    "QdeployError",
    "Statistics",
    "UnavailableError",
    "__version__",
    "calibration_reader",
    "collect",
    "contract",
    "describe",
    "export",
    "layer_errors",
    "lint",
    "open_bundle",
    "open_samples",
    "plan",
    "prepare",
    "quantize",
    "recover",
    "sensitivity",
    "weight_reports",
}
"""What others import; a name may be added, never taken away."""

ALSO_MODULES = ("collect", "export", "plan", "prepare", "quantize", "recover")


def fresh(code):
    """What a new interpreter prints."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_the_public_names():
    assert set(qdeploy.__all__) == NAMES
    assert set(dir(qdeploy)) >= NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_public_name_is_there(name):
    assert not isinstance(getattr(qdeploy, name), ModuleType)


def test_a_name_that_is_none_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"^module 'qdeploy' has no attribute 'exprot'$"):
        qdeploy.exprot  # noqa: B018 - looked up for what it raises


def test_importing_the_package_loads_not_even_numpy():
    code = "import sys, qdeploy; print(*sorted({'numpy', 'typer', 'qdeploy.model'} & set(sys.modules)))"

    assert fresh(code) == ""


@pytest.mark.parametrize(
    "before", ["", "import qdeploy.NAME", "import qdeploy.pipeline", "from qdeploy.NAME import *", "qdeploy.NAME"]
)
def test_a_name_that_is_also_a_module_gives_the_function(before):
    code = "import qdeploy, sys\nBEFORE\nfrom qdeploy import NAME as found\nimport qdeploy.NAME as found_too\n"
    code += "assert found is found_too is qdeploy.NAME\n"
    code += "print(type(found).__name__, type(sys.modules['qdeploy.NAME']).__name__)\n"

    printed = fresh("".join(code.replace("BEFORE", before).replace("NAME", name) for name in ALSO_MODULES))

    assert printed.splitlines() == ["function module"] * len(ALSO_MODULES)


def test_a_module_under_a_functions_name_is_still_importable():
    from qdeploy.prepare import OPSET, prepare

    assert prepare is qdeploy.prepare
    assert isinstance(OPSET, int)


def test_other_modules_stay_attributes():
    import qdeploy.graph

    assert isinstance(qdeploy.graph, ModuleType)


def test_the_version_is_the_installed_one():
    from importlib.metadata import version

    assert qdeploy.__version__ == version("qdeploy")


@pytest.fixture(scope="module")
def linear():
    """A torch module of one matrix, its example input, and samples for it."""
    import torch

    torch.manual_seed(0)
    random = np.random.default_rng(0)
    samples = [{"x": random.normal(size=(1, 6)).astype(np.float32)} for _ in range(120)]
    return torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).eval(), samples


@pytest.fixture(scope="module")
def deployment(linear, tmp_path_factory):
    import torch

    network, samples = linear
    return qdeploy.export(
        network,
        torch.zeros(1, 6),
        targets="ort-cpu",
        calibration=[{"features": sample["x"]} for sample in samples],
        input_names=["features=float32[batch,6]"],
        dims={"batch": (1, 1, 8)},
        options={"ort-cpu": {"threads": 1}},
        output=tmp_path_factory.mktemp("api") / "bundle",
    )


def test_export_deploys_a_module(deployment, linear):
    import torch

    network, samples = linear
    manifest = qdeploy.open_bundle(deployment.path).manifest

    assert deployment.ok
    assert [row.target for row in deployment.report.targets] == ["ort-cpu"]
    assert [str(spec) for spec in manifest.inputs] == ["features=float32[batch,6]"]
    assert manifest.targets[0].options["threads"] == 1
    batch = np.concatenate([sample["x"] for sample in samples[:5]])
    expected = network(torch.from_numpy(batch)).detach().numpy()
    (output,) = deployment.run({"features": batch}).values()
    np.testing.assert_allclose(output, expected, atol=0.05 * np.abs(expected).max())


def test_a_target_is_opened_once_for_many_runs(deployment, linear):
    _, samples = linear

    with deployment.open("ort-cpu") as runner:
        outputs = [runner.run({"features": sample["x"]}) for sample in samples[:3]]

    for sample, given in zip(samples, outputs, strict=False):
        for name, array in deployment.run({"features": sample["x"]}, "ort-cpu").items():
            np.testing.assert_array_equal(array, given[name])


def test_a_deployment_names_its_targets(deployment):
    with pytest.raises(qdeploy.InputError, match=r"has no target 'tensorrt'\. Known: ort-cpu"):
        deployment.run({}, "tensorrt")


def test_a_plain_input_name_takes_type_and_shape_from_the_example(linear, tmp_path):
    import torch

    network, samples = linear
    deployed = qdeploy.export(
        network,
        (torch.zeros(1, 6),),
        targets=["ort-cpu:fp32"],
        evaluation=[{"features": sample["x"]} for sample in samples[:2]],
        input_names=["features"],
        output=tmp_path / "bundle",
    )

    assert [str(spec) for spec in qdeploy.open_bundle(deployed.path).manifest.inputs] == ["features=float32[1,6]"]


def mistake(**changes):
    return {"model": "net.onnx", "targets": "ort-cpu", "output": "out", **changes}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (mistake(model=3), "A int is no model. Give a torch.nn.Module, a path, or the name of a callable"),
        (mistake(targets=[]), "There is no target. Add --target NAME"),
        (mistake(options={"ort-cpu": {"speed": 9}}, calibration=[]), "ort-cpu has no option 'speed'. Known: threads"),
        (mistake(options={"coreml": {}}), "Options are given for 'coreml', which is not a target of this run."),
        (mistake(dims={"batch": (8, 1, 1)}), "The dimension range 8:1:1 is not in order."),
        (mistake(preprocessing="resize"), "The preprocessing 'resize' is not of the form key=value."),
        (mistake(calibration=[], recover=["adarond"]), "Unknown recovery step 'adarond'."),
        (mistake(calibration=[], statistics="s.npz"), "Both --calibration and --statistics are given."),
    ],
)
def test_mistakes_are_input_errors(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = arguments.pop("model")

    with pytest.raises(qdeploy.InputError) as caught:
        qdeploy.export(model, **arguments)

    assert str(caught.value).startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_an_input_name_without_an_example(linear):
    with pytest.raises(qdeploy.InputError) as caught:
        qdeploy.export(linear[0], targets="ort-cpu", output="out", input_names=["x"])

    what = "The input name 'x' comes without an example."
    assert str(caught.value) == f"{what} Give example_inputs, or write name=dtype[dimensions]."


def test_a_contract_is_data():
    from qdeploy.backends.ort_cpu import INT8_RULES

    rules = qdeploy.contract("ort-cpu", precision="int8", threads=2)

    assert (rules.target, rules.precision, rules.rules) == ("ort-cpu", "int8", INT8_RULES)
    assert qdeploy.contract("ort-cpu") == rules


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ort-gpu",), "Unknown target 'ort-gpu'. Did you mean 'ort-cpu'?"),
        (("ort-cpu", "int9"), "ort-cpu does not take the precision 'int9'. It takes: int8, "),
    ],
)
def test_a_contract_that_there_is_not(arguments, message):
    with pytest.raises(qdeploy.InputError) as caught:
        qdeploy.contract(*arguments)

    assert str(caught.value).startswith(message)


def test_the_arrows_one_after_the_other(deployment, linear, tmp_path):
    _, samples = linear
    for folder in ("prepared", "quantized"):
        (tmp_path / folder).mkdir()
    rules = qdeploy.contract("ort-cpu", precision="int8")
    source = qdeploy.open_samples([{"features": sample["x"]} for sample in samples], input_names=("features",))

    model = qdeploy.prepare(qdeploy.describe(deployment.path / "float/model.onnx", "net", {}), tmp_path / "prepared")
    statistics = qdeploy.collect(model, source)
    plan = qdeploy.plan(model, statistics, rules, qdeploy.calibration_reader("mse"))
    plan = qdeploy.recover(plan, statistics, ["bias-correction"])
    quantized = qdeploy.quantize(plan, tmp_path / "quantized")

    from qdeploy.graph import load_graph

    assert qdeploy.lint(load_graph(quantized.path), rules) == ()
    assert quantized.path.read_bytes() == (deployment.path / "ort-cpu/model.onnx").read_bytes()
    assert isinstance(qdeploy.plan, FunctionType)
