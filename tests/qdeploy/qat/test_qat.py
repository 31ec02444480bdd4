"""What is trained is what ships: the prepared module against the INT8 model that the usual export makes of it."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn
from torch.nn import functional

import qdeploy
from qdeploy import affine, qat
from qdeploy.errors import InputError
from qdeploy.export import export, load
from qdeploy.graph import load_graph
from qdeploy.model import ModelSource
from qdeploy.plan import plan_from
from qdeploy.prepare import prepare
from qdeploy.quantize.check import quantized_tensor
from qdeploy.quantize.static import quantize
from qdeploy.samples.callables import load_callable

DIGITS = Path(__file__).parents[3] / "deploy_examples" / "01_digits" / "model.py"
LSB = 1.001
"""A step, and the rounding of its own size in float32."""


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


class Everything(nn.Module):
    """Layers with and without BatchNorm, sums, products, moved values, SiLU, shared and in-place parts."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.SiLU()
        self.pool = nn.AvgPool2d(2)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 8).reshape(1, 8, 1, 1))
        self.hidden = nn.Linear(8, 16)
        self.hidden_norm = nn.BatchNorm1d(16)
        self.tokens = nn.Linear(8, 6)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.stem(x)
        y = self.act(self.norm(self.down(x))) * self.scale
        y = self.pool(torch.cat([y, functional.max_pool2d(x, 2)], 1)[:, :8])
        tokens = self.tokens(y.flatten(2).transpose(1, 2))
        z = functional.relu6(self.hidden_norm(self.hidden(y.mean((2, 3)))))
        return self.head(z), tokens


class Tiny(nn.Module):
    """One layer with BatchNorm, one without."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(functional.relu(self.norm(self.conv(x))).mean((2, 3)))


def trained(model, batches, contract="ort-cpu", *, frozen=True, **settings):
    """Prepared, and trained for a step on each batch towards outputs of its own choice."""
    module = qat.prepare(model, contract, **settings).train()
    optimizer = torch.optim.SGD(module.parameters(), 1e-3)
    for batch in batches:
        outputs = module(batch)
        loss = sum(out.square().mean() for out in (outputs if isinstance(outputs, tuple) else (outputs,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if frozen:
        qat.freeze_batchnorm(module)
        qat.freeze_observers(module)
    return module


def images(count=8, size=16, seed=0):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def steps_apart(module, batch, shipped):
    """Label → how far what the module computes is from the shipped integers, in steps, in evaluation mode.

    Each place hands the shipped values on, so that a layer is judged by its own input.
    """
    found, hooks = {}, []
    for label, place in module._activations().items():
        if place.scheme is None and not place.origin:
            continue
        root = place.origin[0] if place.origin else place
        low, high, scheme = float(root.minimum), float(root.maximum), root.scheme
        grid = affine.affine_from_limits(low, high, scheme.integer, symmetric=scheme.symmetric)

        def compare(_, __, y, label=label, grid=grid):
            values = affine.dequantize(shipped[label], grid)
            found[label] = np.abs(y.numpy() - values) / grid.scale
            return torch.from_numpy(values)

        hooks.append(place.register_forward_hook(compare))
    module.eval()
    with torch.no_grad():
        module(batch)
    for hook in hooks:
        hook.remove()
    return found


def quantized_by_export(module, example, contract, folder):
    """What the arrows make of a finished module: the QDQ file, and tensor name → label."""
    loaded = load(ModelSource("net", "module", module=qat.finish(module), example_inputs=(example,)))
    for part in ("exported", "prepared", "quantized"):
        (folder / part).mkdir()
    model = prepare(export(loaded, (), folder / "exported"), folder / "prepared")
    made = plan_from(model, replace(loaded.learned, labels=model.labels), contract)
    return quantize(made, folder / "quantized").path, model.labels


def integers_of_file(path, inputs, labels, folder):
    """Label → the integers that each QuantizeLinear writes, run without optimizations."""
    import onnx

    graph = load_graph(path)
    names = {
        node.outputs[0].name: labels[quantized_tensor(node)]
        for node in graph.graph
        if node.op_type == "QuantizeLinear" and quantized_tensor(node) in labels
    }
    proto = onnx.load(path)
    kinds = {node.outputs[0].name: node.inputs[2].dtype for node in graph.graph if node.op_type == "QuantizeLinear"}
    for name in names:
        proto.graph.output.append(onnx.helper.make_tensor_value_info(name, int(kinds[name]), None))
    onnx.save(proto, folder / "observed.onnx")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(folder / "observed.onnx"), options, providers=["CPUExecutionProvider"])
    return {names[name]: array for name, array in zip(names, session.run(list(names), inputs), strict=True)}


def assert_within_one_step(module, batch, contract, folder):
    path, labels = quantized_by_export(module, batch, contract, folder)
    (name,) = [i.name for i in load_graph(path).graph.inputs]
    shipped = integers_of_file(path, {name: batch.numpy()}, labels, folder)
    apart = steps_apart(module, batch, shipped)

    assert set(shipped) == set(apart)
    for label, steps in apart.items():
        assert steps.max() <= LSB, label
        assert np.mean(steps > 0.5) < 0.001, label


@pytest.fixture(scope="module")
def tiny():
    """Tiny after a step of training; its parts are frozen."""
    return trained(Tiny(), [images()])


def test_every_quantized_tensor_is_within_a_step_of_the_exported_model(tmp_path):
    module = trained(Everything(), [images(seed=s) for s in range(4)])

    assert_within_one_step(module, images(seed=9), qdeploy.contract("ort-cpu"), tmp_path)


@pytest.mark.parametrize("target", ["tensorrt", "coreml"])
def test_the_places_follow_the_contract_of_the_target(target, tmp_path):
    contract = qdeploy.contract(target, precision="int8")

    module = trained(Everything(), [images(seed=s) for s in range(4)], contract)

    assert_within_one_step(module, images(seed=9), contract, tmp_path)


def test_weights_of_four_bits_stay_on_their_grid():
    def narrowed(scheme):
        weight = scheme is not None and scheme.integer.narrow
        return replace(scheme, integer=replace(scheme.integer, bits=4)) if weight else scheme

    contract = qdeploy.contract("ort-cpu").with_per_tensor_weights()
    rules = tuple(replace(r, inputs={i: narrowed(s) for i, s in r.inputs.items()}) for r in contract.rules)
    finished = qat.finish(trained(Tiny(), [images()], replace(contract, rules=rules)))

    weight = finished.conv.weight.detach().numpy()
    learned = finished.meta["qdeploy.learned"].weights["conv_weight"]
    steps = weight / learned.scale
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-5)
    assert 4 <= np.abs(np.rint(steps)).max() <= 7
    assert learned.integer.bits == 4


def test_digits_are_named_alike_by_the_trained_module_and_by_the_bundle(tmp_path):
    model, example = load_callable(f"{DIGITS}:build")()
    splits = load_callable(f"{DIGITS}:splits")()
    (pictures, digits), (held_out, answers) = (map(torch.from_numpy, splits[p]) for p in ("training", "evaluation"))
    module = qat.prepare(model, "ort-cpu").train()
    optimizer = torch.optim.AdamW(module.parameters(), 1e-4)
    for batch in torch.randperm(len(pictures)).split(64):
        loss = functional.cross_entropy(module(pictures[batch]), digits[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    qat.freeze_batchnorm(module)
    qat.freeze_observers(module)

    deployment = qdeploy.export(
        qat.finish(module), example, targets="ort-cpu", output=tmp_path / "bundle", evaluation=Parts(held_out, answers)
    )

    (row,) = deployment.report.targets
    with deployment.open() as runner, torch.no_grad():
        shipped = np.stack([runner.run({"image": x[None].numpy()})["output"][0] for x in held_out])
        computed = module.eval()(held_out).numpy()
    assert deployment.ok
    assert row.reader is None
    assert row.steps == ()
    assert row.metric >= 0.98
    assert deployment.report.notes[0].startswith("Ranges and scales were learned in training for ort-cpu:int8")
    assert np.mean(shipped.argmax(1) == computed.argmax(1)) >= 0.995
    assert_within_one_step(module, held_out, qdeploy.contract("ort-cpu"), tmp_path)


class Parts:
    """Labelled samples, one at a time."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __iter__(self):
        for x, y in zip(self.x, self.y, strict=True):
            yield {"image": x[None].numpy()}, y[None].numpy()


def nothing_quantized():
    return replace(qdeploy.contract("ort-cpu"), rules=())


def test_where_nothing_is_quantized_training_is_the_models_own():
    model = Everything().train()
    module = qat.prepare(model, nothing_quantized(), (images(),))
    batch = images(seed=1)

    for one in (model, module):
        logits, tokens = one(batch)
        (logits.square().sum() + tokens.square().sum()).backward()

    mine = dict(module.body.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(mine[name].grad, parameter.grad, rtol=1e-3, atol=1e-3)
    buffers = dict(module.body.named_buffers())
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffers[name], buffer)


def test_the_model_that_is_given_stays_as_it_is():
    model = Tiny().train()
    before = copy.deepcopy(model.state_dict())

    trained(model, [images()])

    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    assert model.training


def test_training_goes_on_from_a_saved_state_as_if_it_had_not_stopped(tiny, tmp_path):
    module = copy.deepcopy(tiny)
    torch.save(module.state_dict(), tmp_path / "state.pt")
    resumed = qat.prepare(Tiny(), "ort-cpu").train()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))

    module.train()
    for batch in (images(seed=2), images(seed=3)):
        for each in (module, resumed):
            each.zero_grad()
            each(batch).square().mean().backward()
            torch.optim.SGD(each.parameters(), 0.01).step()

    first, second = module.state_dict(), resumed.state_dict()
    assert first.keys() == second.keys()
    for name in first.keys() - {"_extra_state"}:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
    assert first["_extra_state"] == second["_extra_state"] == {"observers_frozen": True, "batchnorm_frozen": True}


def test_frozen_parts_stay_while_the_rest_learns(tiny):
    module = copy.deepcopy(tiny).train()
    before = copy.deepcopy(module.state_dict())

    module(100 * images(seed=1)).sum().backward()

    for name in ("body.norm.running_mean", "body.norm.running_var", "body.activations.at_relu.maximum"):
        torch.testing.assert_close(module.state_dict()[name], before[name], rtol=0, atol=0)
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_what_is_not_frozen_follows_the_batches():
    module = trained(Tiny(), [images()], frozen=False)
    before = copy.deepcopy(module.state_dict())

    module.train()(100 * images(seed=1))

    for name in ("body.norm.running_var", "body.activations.at_x.maximum"):
        assert module.state_dict()[name].sum() > before[name].sum()


@pytest.mark.slow
def test_a_compiled_module_computes_the_same(tiny):
    compiled = torch.compile(copy.deepcopy(tiny).train(), backend="aot_eager", fullgraph=True)
    batch = images(seed=1)

    got = compiled(batch)
    got.square().mean().backward()

    torch.testing.assert_close(got, copy.deepcopy(tiny).train()(batch), rtol=1e-4, atol=1e-4)
    assert all(parameter.grad is not None for parameter in compiled.parameters())
    assert qat.finish(compiled).meta["qdeploy.learned"].target == "ort-cpu:int8"


@pytest.mark.slow
def test_a_compiled_module_finds_its_places_on_its_first_batch():
    compiled = torch.compile(qat.prepare(Tiny(), "ort-cpu").train(), backend="aot_eager")

    compiled(images())
    qat.freeze_observers(compiled)
    compiled(images(seed=1))

    assert qat.finish(compiled).meta["qdeploy.learned"].ranges


def test_mixed_precision_leaves_parameters_and_ranges_in_float32():
    module = qat.prepare(Tiny(), "ort-cpu").train()

    with torch.autocast("cpu", torch.bfloat16):
        logits = module(images())
    logits.float().square().mean().backward()

    assert logits.dtype == torch.bfloat16
    assert all(torch.isfinite(parameter.grad).all() for parameter in module.parameters())
    assert {tensor.dtype for tensor in qat.finish(module).parameters()} == {torch.float32}


def train_in_parallel(rank, folder):
    """One of two processes, each with half of the batch; the first writes what the module became."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    module = nn.parallel.DistributedDataParallel(qat.prepare(Tiny(), "ort-cpu").train())
    optimizer = torch.optim.SGD(module.parameters(), 0.01)
    for step in range(3):
        loss = module(images(seed=step)[4 * rank : 4 * rank + 4]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 1:
            qat.freeze_batchnorm(module)
            qat.freeze_observers(module)
    torch.save(module.module.state_dict(), f"{folder}/{rank}.pt")
    assert qat.finish(module).meta["qdeploy.learned"].ranges
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_one_module(tmp_path):
    torch.multiprocessing.start_processes(train_in_parallel, (str(tmp_path),), nprocs=2, start_method="fork")

    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name in first.keys() - {"_extra_state"}:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_module_trains_on_a_gpu_and_finishes_on_the_cpu(tmp_path):
    module = qat.prepare(Everything().cuda(), "ort-cpu").train()

    with torch.autocast("cuda", torch.float16):
        module(images().cuda())[0].float().square().mean().backward()

    assert_within_one_step(module.cpu(), images(seed=9), qdeploy.contract("ort-cpu"), tmp_path)


def refused(message: str, call: Callable[[], object]):
    with pytest.raises(InputError, match=message):
        call()


def test_what_is_kept_in_training_is_to_be_kept_by_export(tmp_path):
    finished = qat.finish(trained(Tiny(), [images()], keep=["head.*"]))

    assert list(finished.meta["qdeploy.learned"].weights) == ["conv_weight"]
    refused(
        r"quantizes 'head.weight' as int8 symmetric per-channel \(axis 0\), and training left it float",
        lambda: qdeploy.export(finished, (images(1),), targets="ort-cpu", output=tmp_path / "bundle"),
    )


def test_another_granularity_than_that_of_training_is_refused(tiny, tmp_path):
    settings = {"targets": "ort-cpu", "granularity": "per-tensor", "output": tmp_path / "bundle"}

    refused(
        "quantizes 'conv.weight' as int8 symmetric per-tensor, and training learned it as int8 with 4 scales",
        lambda: qdeploy.export(qat.finish(tiny), (images(1),), **settings),
    )


def test_recovery_of_a_trained_model_is_refused(tiny, tmp_path):
    settings = {"targets": "ort-cpu", "recover": ["equalization"], "output": tmp_path / "bundle"}

    refused(
        "trained for ort-cpu:int8, and --recover would change what training settled",
        lambda: qdeploy.export(qat.finish(tiny), (images(1),), **settings),
    )


def test_a_precision_without_static_ranges_is_refused():
    refused("ort-cpu:int8-dynamic has no static ranges", lambda: qat.prepare(Tiny(), "ort-cpu:int8-dynamic"))


def test_a_module_that_was_not_prepared_is_refused():
    for function in (qat.freeze_observers, qat.freeze_batchnorm, qat.finish):
        refused("A Tiny was not prepared", lambda function=function: function(Tiny()))


def test_a_module_that_has_seen_no_batch_is_refused():
    refused("not known yet what of the module is quantized", lambda: qat.finish(qat.prepare(Tiny(), "ort-cpu")))
    placed = qat.prepare(Tiny(), "ort-cpu", (images(1),))
    refused("No range was learned for '.*': it saw no batch in training mode", lambda: qat.finish(placed))


def test_a_forward_that_depends_on_values_is_refused():
    class Moody(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    refused("The forward of Moody cannot be traced", lambda: qat.prepare(Moody(), "ort-cpu"))


def test_what_forward_has_no_name_for_is_refused_by_name():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")

        def forward(self, x):
            return self.conv(x)

    refused(
        "ort-cpu quantizes the constant 'conv.weight', which is no operand in forward.* leave the node float with keep",
        lambda: qat.prepare(Hidden(), "ort-cpu", (images(1),)),
    )
    module = trained(Hidden(), [images(1)], keep=["conv.weight"])

    assert qat.finish(module).meta["qdeploy.learned"].weights == {}


class Words(nn.Module):
    """A table of embeddings, and a layer behind it."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(50, 64), nn.Linear(64, 4)

    def forward(self, ids):
        return self.head(self.table(ids).mean(1))


def test_a_table_of_embeddings_trains_in_float_and_is_shipped_as_integers(tmp_path):
    batches = [torch.randint(0, 50, (2, 5), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    module = trained(Words(), batches, example_inputs=(batches[0],))
    samples = [{"ids": batch.numpy()} for batch in batches]

    shipped = qdeploy.export(
        qat.finish(module), (batches[0],), targets="ort-cpu", output=tmp_path / "bundle", evaluation=samples
    )

    (row,) = shipped.report.targets
    assert row.status == "pass"
    assert row.sqnr_db > 30
    assert row.quantized_ops["int8"] == 2
