"""From PyTorch to ONNX: names, shapes and values as the module has them, and messages for what cannot be exported."""

import shutil
import subprocess
import sys
from collections import namedtuple
from importlib import import_module
from textwrap import dedent

import numpy as np
import pytest
import torch
from torch import nn

from qdeploy.errors import InputError, UnavailableError
from qdeploy.export import CHECKED_SAMPLES, EagerRunner, export, load
from qdeploy.model import DimRange, ModelSource, TensorSpec
from qdeploy.prepare import prepare
from qdeploy.samples.source import Sample

ROOM = import_module("qdeploy.export")  # the package's attribute of that name is the function
Pair = namedtuple("Pair", "first second")  # noqa: PYI024 - what users return
X = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32))


def specs(*texts):
    return tuple(map(TensorSpec.parse, texts))


def source(module, examples=None, inputs=(), dims=None):
    return ModelSource(type(module).__name__, "module", specs(*inputs), dims or {}, module, examples)


def exported(folder, module, examples=None, inputs=(), dims=None, samples=()):
    return export(load(source(module, examples, inputs, dims)), samples, folder)


def names(model):
    return [spec.name for spec in model.inputs], [spec.name for spec in model.outputs]


def randn(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_same(run_onnx, model, module, *inputs):
    """The ONNX model gives what the module gives, on inputs in the order of the model's."""
    arrays = {spec.name: np.asarray(array) for spec, array in zip(model.inputs, inputs, strict=True)}
    with torch.no_grad():
        expected = module(*map(torch.from_numpy, arrays.values()))
    found = run_onnx(model.path, arrays)
    for array, tensor in zip(found.values(), flat(expected), strict=True):
        np.testing.assert_allclose(array, tensor.numpy(), rtol=1e-4, atol=1e-5)


def flat(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for part in (value.values() if isinstance(value, dict) else value) for tensor in flat(part)]


# What inputs are called


class Arguments(nn.Module):
    """Two arguments, one for keywords only, and one that may be left out."""

    def forward(self, query, key, *, scale, mask=None):
        product = query * 2 + key * scale
        return product if mask is None else product * mask


class Positional(nn.Module):
    def forward(self, x, /):
        return x + 1


class Star(nn.Module):
    def forward(self, *parts):
        return parts[0] + 2 * parts[1]


class Keywords(nn.Module):
    def forward(self, **parts):
        return parts["a"] + 2 * parts["b"]


class Two(nn.Module):
    def forward(self, a, b):
        return a + 2 * b


Y = 3 * X
A, B = X.numpy(), Y.numpy()


@pytest.mark.parametrize(
    ("module", "examples", "inputs", "called"),
    [
        (nn.Linear(4, 3), X, (), {"input": A}),
        (nn.Linear(4, 3), (X,), ("image=float32[n,4]",), {"image": A}),
        (Two(), (X, Y), (), {"a": A, "b": B}),
        (Two(), [A, Y.tolist()], (), {"a": A, "b": B}),
        (Two(), {"b": Y, "a": X}, (), {"a": A, "b": B}),
        (Two(), {"b": Y, "a": X}, ("p=float32[2,4]", "q=float32[2,4]"), {"p": A, "q": B}),
        (Two(), {"q": Y, "p": X}, ("p=float32[2,4]", "q=float32[2,4]"), {"p": A, "q": B}),
        (Two(), (X, Y), ("b=float32[2,4]", "a=float32[2,4]"), {"b": B, "a": A}),
        (Arguments(), {"query": X, "key": X, "scale": Y}, (), {"query": A, "key": A, "scale": B}),
        (Positional(), X, (), {"x": A}),
        (Star(), (X, Y), ("p=float32[2,4]", "q=float32[2,4]"), {"p": A, "q": B}),
        (Keywords(), {"a": X, "b": Y}, (), {"a": A, "b": B}),
    ],
    ids=[
        *("forward", "--input", "two", "lists", "mapping", "mapping, --input", "mapping of --input's", "other order"),
        *("keyword-only", "positional-only", "*args", "**kwargs"),
    ],
)
def test_inputs_are_called_as_forward_or_the_user_calls_them(module, examples, inputs, called):
    loaded = load(source(module, examples, inputs))

    assert set(loaded.input_names) == set(called)
    for name in called:
        np.testing.assert_allclose(loaded.examples[name], called[name])
    (output,) = EagerRunner(loaded).run(called).values()
    arguments = examples if isinstance(examples, tuple | list) else (examples,)
    expected = module(**renamed(examples)) if isinstance(examples, dict) else module(*map(torch.as_tensor, arguments))
    np.testing.assert_allclose(output, expected.detach())


def renamed(examples):
    """Examples by --input's names, by forward's."""
    return {{"p": "a", "q": "b"}.get(name, name): value for name, value in examples.items()}


def test_without_examples_the_inputs_are_what_forward_requires():
    assert load(source(Arguments())).input_names == ("query", "key", "scale")


def test_an_optional_argument_is_an_input_just_if_there_is_an_example():
    examples = {"query": X, "key": X, "scale": X}

    assert load(source(Arguments(), examples)).input_names == ("query", "key", "scale")
    assert load(source(Arguments(), {**examples, "mask": X})).input_names == ("query", "key", "scale", "mask")


@pytest.mark.parametrize(
    ("module", "examples", "inputs", "message"),
    [
        (
            nn.Linear(4, 3),
            (X, X),
            (),
            "There are 2 example inputs, but forward takes 1 named arguments. Give one for each argument, ",
        ),
        (Two(), {"aa": X, "b": X}, (), "Forward has no argument 'aa'. Did you mean 'a'? Known: a, b."),
        (Two(), {"aa": X}, ("p=float32[2,4]",), "Forward has no argument 'aa'. Known: p."),
        (Star(), None, (), "The forward of Star has no named arguments. Name the inputs: --input "),
        (Two(), (X, "text"), (), "The example of 'b' cannot be an array: "),
        (Two(), (X, X.to_sparse()), (), "The example of 'b' cannot be an array: "),
    ],
)
def test_examples_that_do_not_fit_are_refused(module, examples, inputs, message):
    with pytest.raises(InputError) as refused:
        load(source(module, examples, inputs))
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    ("samples", "named"), [([], "query"), ([Sample({"query": X.numpy(), "key": X.numpy()})], "scale")]
)
def test_an_input_without_an_example_is_named(tmp_path, samples, named):
    with pytest.raises(InputError) as refused:
        exported(tmp_path, Arguments(), samples=samples)
    assert str(refused.value) == (
        f"There is no example of the input {named!r}: Arguments gave none, and no sample has it. "
        "Return (module, example_inputs), or give samples with that name."
    )


def test_an_example_must_be_what_the_user_says_of_the_input(tmp_path):
    with pytest.raises(InputError) as refused:
        exported(tmp_path, nn.Linear(4, 3), X, ("image=float32[batch,5]",))
    assert str(refused.value) == (
        "The example of input 'image' has shape [2, 4], the model takes 5 at dimension 1: image=float32[batch,5]. "
        "Correct --input or the samples."
    )


def test_what_forward_raises_is_explained(tmp_path):
    with pytest.raises(InputError, match=r"^The forward of Linear raised RuntimeError: mat1 and mat2 shapes"):
        exported(tmp_path, nn.Linear(5, 3), X)


# What outputs are called


class Gives(nn.Module):
    """Gives what a function makes of its argument."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "called"),
    [
        (lambda x: x + 1, ["output"]),
        (lambda x: (x, x + 1), ["output_0", "output_1"]),
        (lambda x: [x, [x + 1]], ["output_0", "output_1_0"]),
        (lambda x: {"logits": x, "more": (x + 1, {"deep": x})}, ["logits", "more_0", "more_1_deep"]),
        (lambda x: Pair(x, x + 1), ["first", "second"]),
        (
            lambda x: [Pair(x, x + 1), Pair(x + 2, x)],
            ["output_0_first", "output_0_second", "output_1_first", "output_1_second"],
        ),
        (lambda x: (x, None), ["output_0"]),
        (lambda x: {"x": x + 1}, ["x_output"]),
    ],
    ids=["tensor", "tuple", "list", "mapping", "namedtuple", "namedtuples", "None", "an input's name"],
)
def test_outputs_are_called_after_keys_fields_and_places(function, called):
    assert list(EagerRunner(load(source(Gives(function), X))).run({"x": X.numpy()})) == called


@pytest.mark.parametrize("given", [None, 3, (), {}])
def test_a_forward_without_tensors_is_refused(tmp_path, given):
    with pytest.raises(InputError, match=r"The forward of Gives returned no tensor\. Return a tensor\."):
        exported(tmp_path, Gives(lambda _: given), X)


class Cache:
    """What generating models return beside their logits."""


def test_an_output_that_no_onnx_model_has_is_refused_by_name_before_tracing(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: pytest.fail("traced"))

    with pytest.raises(InputError) as refused:
        exported(tmp_path, Gives(lambda x: {"logits": x + 1, "past": (Cache(),)}), X)
    assert refused.value.what == "Forward returns a Cache as 'past_0'; the outputs of ONNX are tensors."
    assert "use_cache=False" in refused.value.cure


def test_a_bfloat16_output_is_compared_as_float32():
    (output,) = EagerRunner(load(source(Gives(lambda x: x.bfloat16()), X))).run({"x": X.numpy()}).values()

    np.testing.assert_allclose(output, X, rtol=2**-8)


# Whole exports


class Tokens(nn.Module):
    """int64 tokens [batch, length] and float weights [batch, length, 8] → nested outputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, tokens, weights, bias=None):
        features = self.norm(self.embedding(tokens) * weights)
        logits = self.head(features)
        if bias is not None:
            logits = logits + bias
        masked = logits.masked_fill(tokens[..., None] == 0, float("-inf"))
        return {"logits": logits, "best": (masked.argmax(-1), masked), "weights": weights + 0}


def tokens(batch, length):
    return np.random.default_rng(batch).integers(0, 20, (batch, length)), randn(batch, length, 8)


@pytest.fixture(scope="module")
def sequences(tmp_path_factory):
    """Tokens with two dynamic dimensions, one of them bounded, exported from an example of batch 1."""
    module = Tokens()
    inputs = ("tokens=int64[batch,length]", "weights=float32[batch,length,8]")
    dims = {"batch": DimRange(1, 2, 6), "length": DimRange(3, 4, 50)}
    examples = {"weights": torch.ones(1, 3, 8), "tokens": torch.arange(3)[None]}
    return module, exported(tmp_path_factory.mktemp("sequences"), module.eval(), examples, inputs, dims)


def test_inputs_and_outputs_of_the_onnx_model_are_those_of_the_module(sequences):
    _, model = sequences

    assert model.path.name == "exported.onnx"
    assert model.name == "Tokens"
    assert model.inputs == specs("tokens=int64[batch,length]", "weights=float32[batch,length,8]")
    assert [str(spec) for spec in model.outputs] == [
        "logits=float32[batch,length,5]",
        "best_0=int64[batch,length]",
        "best_1=float32[batch,length,5]",
        "weights_output=float32[batch,length,8]",
    ]
    assert model.dims == {"batch": DimRange(1, 2, 6), "length": DimRange(3, 4, 50)}
    constants = 2  # the mask's infinity, and a factor of one
    assert model.parameters == 20 * 8 + 8 + 8 + 8 * 5 + 5 + constants


@pytest.mark.parametrize(("batch", "length"), [(1, 3), (2, 4), (6, 50), (3, 17)])
def test_the_onnx_model_runs_at_every_size_in_range(sequences, run_onnx, batch, length):
    module, model = sequences

    assert_same(run_onnx, model, module, *tokens(batch, length))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer = kind(4, 3, batch_first=True)

    def forward(self, x):
        return self.layer(x)[0]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_recurrence_takes_any_length_in_each_model_of_a_process(kind, tmp_path, run_onnx):
    for place in ("first", "second"):
        (tmp_path / place).mkdir()
        module = Recurrent(kind)

        model = exported(tmp_path / place, module, torch.zeros(2, 5, 4), ["x=float32[batch,time,4]"])

        assert_same(run_onnx, model, module, randn(3, 9, 4))


class BiasedAttention(nn.Module):
    """Attention with a learned bias, as T5 and Swin have it."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.from_numpy(randn(2, 5, 5)))

    def forward(self, x):
        heads = x.view(*x.shape[:2], 2, 2).transpose(1, 2)
        result = nn.functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=self.bias[None])
        return result.transpose(1, 2).contiguous().view(*x.shape[:2], -1)


def test_attention_with_a_learned_bias_is_exported(tmp_path, run_onnx):
    module = BiasedAttention()

    model = exported(tmp_path, module, torch.zeros(2, 5, 4), ["x=float32[batch,5,4]"])

    assert_same(run_onnx, model, module, randn(3, 5, 4))


class Trained(nn.Module):
    """A network that behaves otherwise in training."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
        self.body[1].running_mean.uniform_(-1, 1)
        self.body[1].running_var.uniform_(0.5, 2)

    def forward(self, image):
        return self.body(image)


def states(module):
    """All that export could change of a module."""
    return [
        [(name, tensor.dtype, tensor.clone()) for name, tensor in module.state_dict().items()],
        [part.training for part in module.modules()],
    ]


@pytest.mark.parametrize("part", ["all of it", "dropout alone"])
def test_a_module_in_training_is_exported_for_inference_and_left_as_it_is(tmp_path, run_onnx, part):
    module = Trained().train() if part == "all of it" else Trained().eval()
    module.body[3].train()
    before = states(module)

    model = exported(tmp_path, module, torch.ones(1, 3, 6, 6))

    assert str(states(module)) == str(before)
    assert_same(run_onnx, model, Trained().eval(), randn(1, 3, 6, 6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_module_of_other_floats_is_loaded_in_float32_with_a_note(dtype):
    module = nn.Linear(4, 3).to(dtype)
    before = states(module)

    name = str(dtype).removeprefix("torch.")
    wanted = TensorSpec("image", name, ("n", 4))
    loaded = load(ModelSource("Linear", "module", (wanted,), {}, module, X.to(dtype)))

    assert loaded.notes == (f"The module holds {name} values; it is exported in float32.",)
    assert loaded.source.inputs == specs("image=float32[n,4]")
    assert loaded.examples["image"].dtype == np.float32
    np.testing.assert_array_equal(loaded.examples["image"], X.to(dtype).float())
    assert str(states(module)) == str(before)


def test_a_float16_module_becomes_a_float32_model_with_the_same_weights(tmp_path, run_onnx):
    module = Tokens().half().eval()

    model = exported(tmp_path, module, (torch.arange(6)[None], torch.ones(1, 6, 8).half()))

    assert {spec.dtype for spec in (*model.inputs, *model.outputs)} == {"int64", "float32"}
    assert_same(run_onnx, model, Tokens().half().float().eval(), *tokens(1, 6))


def test_a_module_that_is_ready_is_not_copied():
    module = nn.Linear(4, 3).eval()

    loaded = load(source(module, X))

    assert loaded.module is module
    assert loaded.notes == ()


def test_a_module_that_cannot_be_copied_needs_no_copy_when_it_is_ready():
    class Uncopied(nn.Linear):
        def __deepcopy__(self, _):
            raise RuntimeError("only leaves can be copied")

    with pytest.raises(
        InputError,
        match=r"^Copying Uncopied raised RuntimeError: only leaves can be copied\. Return it in evaluation mode, in fl",
    ):
        load(ModelSource("net", "module", (), {}, Uncopied(4, 3).train(), X))

    assert load(ModelSource("net", "module", (), {}, Uncopied(4, 3).eval(), X)).module is not None


def test_torchscript_is_refused():
    with pytest.raises(
        InputError, match=r"^net is TorchScript\. Give the module that it was traced or scripted from\.$"
    ):
        load(ModelSource("net", "module", (), {}, torch.jit.trace(nn.Linear(4, 3), X), X))


# What is refused after export


class Branch(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x - 1


def test_control_flow_that_depends_on_values_is_located(tmp_path):
    module = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), Branch()))

    with pytest.raises(InputError) as refused:
        exported(tmp_path, module, X)
    assert refused.value.what.startswith("Sequential cannot be exported to ONNX in 1.1 (Branch): ")
    assert "data-dependent expression" in refused.value.what
    assert refused.value.cure.startswith("Change that part of forward")
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_an_operator_that_onnx_lacks_is_named(tmp_path):
    with pytest.raises(InputError) as refused:
        exported(tmp_path, Gives(lambda x: torch.linalg.eigvalsh(x @ x.T)), X)
    assert refused.value.what.startswith("Gives cannot be exported to ONNX: ")
    assert "aten._linalg_eigh" in refused.value.what


def test_the_module_of_an_operator_that_onnx_lacks_is_named(tmp_path):
    @torch.library.custom_op("qdeploy_tests::unknown_to_onnx", mutates_args=())
    def unknown(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    unknown.register_fake(torch.empty_like)
    inner = nn.Sequential(nn.Linear(4, 4), Gives(lambda x: unknown(x)))  # noqa: PLW0108 - it cannot be copied

    with pytest.raises(InputError, match=r"^Sequential cannot be exported to ONNX in 1\.1 \(Gives\): "):
        exported(tmp_path, nn.Sequential(nn.ReLU(), inner), X)


def test_randomness_in_forward_is_refused(tmp_path):
    with pytest.raises(InputError) as refused:
        exported(tmp_path, Gives(lambda x: x + torch.randn_like(x)), X)
    assert refused.value.what.startswith(
        "The ONNX model does not compute what the module does: output 'output' of the example inputs has "
    )
    assert refused.value.what.endswith(" dB SQNR.")
    assert "randomness" in refused.value.cure


@pytest.mark.parametrize("dims", [{}, {"batch": DimRange(3, 3, 8)}])
def test_an_example_of_one_item_stands_for_any_batch(tmp_path, dims):
    model = exported(tmp_path, nn.Linear(4, 3), X[:1], ("x=float32[batch,4]",), dims)

    assert model.inputs == specs("x=float32[batch,4]")


def test_a_dynamic_dimension_that_cannot_change_is_refused(tmp_path):
    with pytest.raises(InputError) as refused:
        exported(tmp_path, nn.Linear(4, 3), X, ("x=float32[batch,4]",), {"batch": DimRange(2, 2, 2)})
    assert str(refused.value) == (
        "The dimension 'batch' is dynamic, but always 2. Write 2 in its place in --input, and leave --dim out."
    )


def test_a_range_of_an_unknown_dimension_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"No input of the model has a dynamic dimension 'batch'\. Known: none\."):
        exported(tmp_path, nn.Linear(4, 3), X, dims={"batch": DimRange(1, 1, 8)})


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    """A module, and its ONNX model once and for all."""
    torch.manual_seed(0)
    module = nn.Linear(4, 3).eval()
    return module, exported(tmp_path_factory.mktemp("linear"), module, X).path


@pytest.fixture
def again(linear, tmp_path, monkeypatch):
    """Exports the linear module again with the ONNX model that is there."""
    module, path = linear
    monkeypatch.setattr(ROOM, "_export_to", lambda target, *_: shutil.copyfile(path, target))
    return lambda samples=(): export(load(source(module, X)), samples, tmp_path)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"image": X.numpy()}, "The array 'image' of sample 3 is no input of the model. Known: input."),
        ({}, "The input 'input' is missing in sample 3. The model takes input=float32[2,4]."),
        (
            {"input": randn(5, 4)},
            "The input 'input' of sample 3 has shape [5, 4], the model takes 2 at dimension 0: input=float32[2,4]. ",
        ),
        (
            {"input": X.double().numpy()},
            "The input 'input' of sample 3 has dtype float64, the model takes float32. Convert it to float32.",
        ),
    ],
)
def test_samples_that_are_not_the_models_are_refused(again, inputs, message):
    with pytest.raises(InputError) as refused:
        again([Sample(inputs, origin="sample 3")])
    assert str(refused.value).startswith(message)


def test_the_first_samples_are_compared(again, monkeypatch):
    taken = []
    run = ROOM.SessionRunner.run
    monkeypatch.setattr(ROOM.SessionRunner, "run", lambda self, inputs: taken.append(inputs) or run(self, inputs))
    samples = [Sample({"input": randn(2, 4, seed=i)}) for i in range(100)]

    again(samples)

    assert [inputs["input"].tolist() for inputs in taken] == [
        sample.inputs["input"].tolist() for sample in samples[:CHECKED_SAMPLES]
    ]


@pytest.mark.parametrize(
    ("change", "accepted"),
    [
        (lambda y: y + 1e-3 * y.std(), True),  # 60 dB
        (lambda y: y + 1e-2 * y.std(), False),  # 40 dB
        (lambda y: y * np.nan, False),
        (lambda y: np.where(y == y.max(), np.inf, y), False),
        (lambda y: y[:1], False),
    ],
    ids=["60 dB", "40 dB", "NaN", "one infinity", "shape"],
)
def test_an_onnx_model_that_computes_something_else_is_refused(again, monkeypatch, change, accepted):
    run = ROOM.SessionRunner.run
    monkeypatch.setattr(ROOM.SessionRunner, "run", lambda *_: {n: change(array) for n, array in run(*_).items()})

    if accepted:
        again()
    else:
        with pytest.raises(InputError, match="does not compute what the module does: output 'output' of the example"):
            again()


def test_a_module_whose_own_output_holds_nan_is_told_so(again, monkeypatch):
    run = ROOM.EagerRunner.run
    monkeypatch.setattr(ROOM.EagerRunner, "run", lambda *_: {n: array * np.nan for n, array in run(*_).items()})

    with pytest.raises(
        InputError, match=r"The module's own output holds NaN: look for NaN in its weights and buffers\.$"
    ):
        again()


def test_infinite_values_that_are_masks_are_no_difference(again, monkeypatch, linear):
    def masked(outputs):
        return {name: np.where(np.arange(3) == 1, -np.inf, array) for name, array in outputs.items()}

    for runner in (ROOM.SessionRunner, ROOM.EagerRunner):
        monkeypatch.setattr(runner, "run", lambda *_, run=runner.run: masked(run(*_)))

    again()


# Files


class Mixed(nn.Module):
    def forward(self, a, b, *, c):
        return {"s": a * 2 + b * 3, "t": (c, a - b)}


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Exported programs: arguments in order and by keyword with a dynamic dimension; and others."""
    folder = tmp_path_factory.mktemp("programs")
    rows = torch.export.Dim("n", min=2, max=9)
    dynamic = {name: {0: rows} for name in "abc"}
    mixed = torch.export.export(Mixed(), (X,), {"c": X + 1, "b": X - 1}, dynamic_shapes=dynamic)
    half = torch.export.export(nn.Linear(4, 3).half(), (X.half(),))
    nested = torch.export.export(Gives(lambda x: x["u"] + x["v"]), ({"u": X, "v": X},))
    static = torch.export.export(nn.Linear(4, 3), (X,))
    for name, program in {"mixed": mixed, "half": half, "nested": nested, "static": static}.items():
        torch.export.save(program, folder / f"{name}.pt2")
    return folder


def parsed(path, inputs=(), dims=None):
    return ModelSource.parse(str(path), specs(*inputs), dims)


def test_an_exported_program_becomes_the_same_model(programs, tmp_path, run_onnx):
    inputs = ("a=float32[rows,4]", "c=float32[rows,4]", "b=float32[rows,4]")

    loaded = load(parsed(programs / "mixed.pt2", inputs, {"rows": DimRange(2, 3, 9)}))
    model = export(loaded, [], tmp_path)

    assert model.name == "mixed"
    assert model.inputs == specs(*inputs)
    assert [spec.name for spec in model.outputs] == ["s", "t_0", "t_1"]
    a, b, c = (randn(7, 4, seed=i) for i in range(3))
    found = run_onnx(model.path, {"a": a, "b": b, "c": c})
    np.testing.assert_allclose(found["s"], a * 2 + b * 3, rtol=1e-5)
    np.testing.assert_allclose(found["t_0"], c)
    np.testing.assert_allclose(found["t_1"], a - b, rtol=1e-5, atol=1e-6)


def test_an_exported_program_brings_its_names_and_examples(programs):
    loaded = load(parsed(programs / "mixed.pt2"))

    assert loaded.input_names == ("a", "c", "b")
    assert loaded.ranks == {"a": 2, "b": 2, "c": 2}
    np.testing.assert_array_equal(loaded.examples["c"], X + 1)
    np.testing.assert_array_equal(loaded.examples["b"], X - 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("half", "half.pt2 holds float16 values. Export the module after module.float()."),
        ("nested", "nested.pt2 takes 1 arguments, of which 2 are tensors with names. "),
        ("none", "There is no file "),
    ],
)
def test_a_program_that_cannot_be_taken_is_refused(programs, name, message):
    with pytest.raises(InputError) as refused:
        load(parsed(programs / f"{name}.pt2"))
    assert str(refused.value).startswith(message)


def test_a_dimension_that_the_program_fixes_is_not_dynamic(programs, tmp_path):
    with pytest.raises(InputError) as refused:
        export(load(parsed(programs / "static.pt2", ["image=float32[batch,4]"])), [], tmp_path)
    assert refused.value.what == ("--input says image=float32[batch,4], but the exported model has image=float32[2,4].")


@pytest.mark.parametrize("part", [0.0, 0.5, 0.99])
def test_a_damaged_program_is_refused(programs, tmp_path, part):
    path = tmp_path / "damaged.pt2"
    content = (programs / "static.pt2").read_bytes()
    path.write_bytes(content[: int(part * len(content))])

    with pytest.raises(InputError, match=r"^damaged\.pt2 is not a torch\.export program: .* torch\.export\.save\.$"):
        load(parsed(path))


@pytest.fixture
def onnx_file(build, node):
    return build([node("MatMul", "x w", "y")], {"x": ["n", 4]}, {"y": ["n", 3]}, {"w": randn(4, 3)}).path


def test_an_onnx_file_is_taken_as_it_is(onnx_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)

    loaded = load(parsed(onnx_file, ["x=float32[batch,4]"]))
    model = export(loaded, [], tmp_path)

    assert (loaded.input_names, loaded.ranks, loaded.module) == (("x",), {"x": 2}, None)
    assert (model.path, model.name) == (onnx_file, "net")
    assert model.inputs == specs("x=float32[n,4]")
    assert not list(tmp_path.glob("*.onnx"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("z=float32[n,4]", "net.onnx has no input 'z'. Known: x."),
        ("x=float32[n,5]", "--input says x=float32[n,5], but net.onnx has x=float32[n,4]. "),
        ("x=float32[2,4]", "--input says x=float32[2,4], but net.onnx has x=float32[n,4]. "),
        ("x=int64[n,4]", "--input says x=int64[n,4], but net.onnx has x=float32[n,4]. "),
        ("x=float32[n]", "--input says x=float32[n], but net.onnx has x=float32[n,4]. "),
    ],
)
def test_what_the_user_says_of_an_onnx_file_must_be_true(onnx_file, spec, message):
    with pytest.raises(InputError) as refused:
        load(parsed(onnx_file, [spec]))
    assert str(refused.value).startswith(message)


def test_a_range_of_an_onnx_files_unknown_dimension_is_refused(onnx_file, tmp_path):
    loaded = load(parsed(onnx_file, ["x=float32[batch,4]"], {"batch": DimRange(1, 1, 8)}))

    with pytest.raises(InputError, match=r"No input of the model has a dynamic dimension 'batch'\. Known: n\."):
        export(loaded, [], tmp_path)


def test_a_quantized_onnx_file_is_refused(build, node):
    nodes = [node("QuantizeLinear", "x s", "q"), node("DequantizeLinear", "q s", "y")]
    path = build(nodes, {"x": [1, 4]}, {"y": [1, 4]}, {"s": np.float32(0.1)}).path

    with pytest.raises(InputError, match=r"net\.onnx is quantized already\. Look at it with qdeploy inspect"):
        load(parsed(path))


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_an_onnx_file_of_other_floats_is_refused(build, node, dtype):
    kind = {"float16": 10, "float64": 11}[dtype]
    weights = {"w": np.ones((4, 3), dtype)}
    path = build([node("MatMul", "x w", "y")], {"x": ([1, 4], kind)}, {"y": ([1, 3], kind)}, weights).path

    message = rf"^The weight 'w' of net\.onnx is {dtype}, not float32\. Export it anew in float32\.$"
    with pytest.raises(InputError, match=message):
        load(parsed(path))


def test_an_onnx_file_that_gives_its_input_back_is_refused(build, node):
    path = build([node("Relu", "x", "y")], {"x": [1, 4]}, {"y": [1, 4], "x": [1, 4]}).path

    with pytest.raises(InputError, match=r"^The output 'x' of net\.onnx is its input\. Take it off the outputs\.$"):
        load(parsed(path))


# Code of the user's

MODEL = dedent(
    """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 8, 3)
            self.norm = nn.BatchNorm2d(8)
            self.head = nn.Linear(8, 5)

        def forward(self, image):
            print("in forward")
            return self.head(torch.relu(self.norm(self.conv(image))).mean((2, 3)))

    def build():
        print("in build")
        return Net(), (torch.ones(1, 3, 8, 8),)

    def nothing():
        pass

    def text():
        return "net", None

    def fails():
        raise ValueError("no weights")
    """
)


@pytest.fixture
def model_file(tmp_path):
    path = tmp_path / "net.py"
    path.write_text(MODEL)
    return path


def test_what_a_model_prints_stays_off_standard_output(model_file, tmp_path, capfd):
    loaded = load(parsed(f"{model_file}:build", ["image=float32[batch,3,8,8]"]))
    model = export(loaded, [], tmp_path)

    out, err = capfd.readouterr()
    assert out == ""
    assert "in build" in err
    assert "in forward" in err
    assert model.inputs == specs("image=float32[batch,3,8,8]")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "{path}:nothing returned NoneType, not a torch.nn.Module. Return the module, or "),
        ("text", "{path}:text returned str, not a torch.nn.Module. Return the module, or "),
        ("fails", "net.py:fails raised ValueError: no weights (line 28 of net.py)"),
        ("biuld", "net.py has no callable 'biuld'. Did you mean 'build'? Known: "),
    ],
)
def test_a_callable_that_gives_no_model_is_refused(model_file, name, message):
    with pytest.raises(InputError) as refused:
        load(parsed(f"{model_file}:{name}"))
    assert str(refused.value).startswith(message.format(path=model_file))


def test_a_class_is_a_callable_too(model_file):
    assert load(parsed(f"{model_file}:Net")).input_names == ("image",)


def test_without_torch_it_is_said_how_to_get_it(model_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)

    for path in (f"{model_file}:build", "net.pt2"):
        with pytest.raises(UnavailableError) as refused:
            load(parsed(path))
        assert str(refused.value) == "torch is not installed. Install it: pip install 'qdeploy[torch]'"


ALONE = """
import sys
from pathlib import Path
from qdeploy.export import export, load
from qdeploy.model import ModelSource
from qdeploy.prepare import prepare

prepare(export(load(ModelSource.parse(sys.argv[1])), [], Path(sys.argv[2])), Path(sys.argv[2]))
"""


def test_equal_modules_give_equal_bytes_in_any_process(model_file, tmp_path):
    here, alone = tmp_path / "here", tmp_path / "alone"
    here.mkdir()
    alone.mkdir()
    # A name that no other test imports: the exporter writes down what Python calls the module.
    text = f"{model_file.rename(tmp_path / 'alone.py')}:build"

    prepare(export(load(parsed(text)), [], here), here)
    # Another seed for hashes: sets are walked in another order.
    subprocess.run([sys.executable, "-c", ALONE, text, alone], env={"PYTHONHASHSEED": "1"}, check=True)

    for name in ("exported.onnx", "model.onnx"):
        assert (here / name).read_bytes() == (alone / name).read_bytes()
    assert not any(path in (here / "model.onnx").read_bytes() for path in (b"alone.py", b"site-packages"))


def test_a_large_model_is_written_with_external_data(tmp_path, monkeypatch, run_onnx):
    monkeypatch.setattr(import_module("qdeploy.graph"), "EXTERNAL_DATA_BYTES", 10_000)
    module = nn.Linear(4, 1000).eval()

    model = exported(tmp_path, module, X)

    assert sorted(file.name for file in tmp_path.iterdir()) == ["exported.onnx", "exported.onnx.data"]
    assert model.path.stat().st_size < 10_000
    assert_same(run_onnx, model, module, X.numpy())


class Guarded(nn.Module):
    def forward(self, x):
        return x / (x.abs().sum() + 1e-12)


def test_a_guard_of_a_division_is_exported_however_small(tmp_path, run_onnx):
    loaded = load(ModelSource("Guarded", "module", module=Guarded(), example_inputs=(torch.ones(2),)))
    model = export(loaded, [], tmp_path)

    (y,) = run_onnx(model.path, {model.inputs[0].name: np.zeros(2, np.float32)}).values()
    np.testing.assert_array_equal(y, np.zeros(2))
