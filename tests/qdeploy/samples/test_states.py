"""States that go from sample to sample: where a sequence begins, what is refused, and who runs what."""

from pathlib import Path

import numpy as np
import pytest

from qdeploy.backend import Evidence, Runner
from qdeploy.errors import InputError
from qdeploy.model import FloatModel, TensorSpec
from qdeploy.samples.source import Sample, SampleSource
from qdeploy.samples.states import Carrying, States, completed, require_inputs, states_of

X = TensorSpec("x", "float32", ("batch", "frames", 3))
H = TensorSpec("h", "float32", (2, "batch", 3))
N = TensorSpec("n", "int64", ())
STATES = States({"h": "sum", "n": "count"}, (H, X, N))
"""Of `Summing`: h gathers the sums of x, n counts the samples."""


class Summing(Runner):
    """y = x + what came before, in both rows of h; keeps what it was given."""

    evidence = Evidence.SIMULATED

    def __init__(self, factor=1):
        self.factor, self.given, self.entered = factor, [], 0

    def run(self, inputs):
        self.given.append(dict(inputs))
        total = inputs["h"] + self.factor * inputs["x"].sum(axis=1)
        return {"sum": total, "y": total[0].copy(), "count": inputs["n"] + 1}

    def __enter__(self):
        self.entered += 1
        return self

    def __exit__(self, *_):
        self.entered -= 1


def of(value, batch=1, **states):
    return {"x": np.full((batch, 1, 3), value, np.float32), **states}


def source(*inputs):
    samples = [Sample(each, origin=f"sample {i}") for i, each in enumerate(inputs)]
    return SampleSource("a list", lambda: iter(samples), len(samples))


def h_of(value, batch=1):
    return np.full((2, batch, 3), value, np.float32)


def test_each_sample_gets_the_states_that_the_one_before_it_left():
    through = completed(source(of(1), of(2), of(4)), STATES, Summing)

    for _ in range(2):  # a second pass begins anew
        samples = [sample.inputs for sample in through]
        assert [(s["h"][1, 0, 0], int(s["n"]), s["x"][0, 0, 0]) for s in samples] == [(0, 0, 1), (1, 1, 2), (3, 2, 4)]
        assert (samples[0]["h"].shape, samples[0]["h"].dtype) == ((2, 1, 3), np.float32)
        assert (samples[0]["n"].shape, samples[0]["n"].dtype) == ((), np.int64)
    assert (through.size, through.description) == (3, "a list")


def test_a_sample_that_gives_a_state_begins_a_new_sequence():
    given = source(of(1), of(2, h=h_of(10)), of(4), of(8, batch=5, n=np.array(7)), of(16, batch=5))

    samples = [sample.inputs for sample in completed(given, STATES, Summing)]

    assert [s["h"][0, 0, 0] for s in samples] == [0, 10, 12, 0, 8]
    assert [int(s["n"]) for s in samples] == [0, 0, 1, 7, 8]
    assert samples[3]["h"].shape == (2, 5, 3)


def test_samples_are_run_in_order_and_no_further_than_asked_for():
    runner = Summing()
    passing = iter(completed(source(of(1), of(2), of(4)), STATES, lambda: runner))

    next(passing)
    assert (runner.given, runner.entered) == ([], 1)
    next(passing)
    assert len(runner.given) == 1
    passing.close()
    assert runner.entered == 0


def test_without_states_a_source_stays_as_it_is():
    given = source(of(1))

    assert completed(given, States({}, (X,)), lambda: pytest.fail("nothing is to be run")) is given


def test_a_state_whose_size_no_input_tells_is_asked_for():
    states = States({"h": "sum"}, (TensorSpec("h", "float32", ("rows", "batch", 3)), X))

    with pytest.raises(InputError) as refused:
        list(completed(source(of(1)), states, Summing))
    assert str(refused.value) == (
        "How many zeros the state 'h' begins with is not known: the sample's other inputs have no dimension 'rows'. "
        "Give it in the first sample: h=float32[rows,batch,3]."
    )


# Each runner carries its own


def test_a_runner_carries_its_own_states_and_gives_results_alone():
    one, two = Summing(), Summing(factor=2)
    with Carrying(one, STATES) as float_, Carrying(two, STATES) as target:
        for value, sums in ((1, (1, 2)), (2, (3, 6)), (4, (7, 14))):
            outputs = [runner.run(of(value)) for runner in (float_, target)]
            assert [set(each) for each in outputs] == [{"y"}] * 2
            assert tuple(each["y"][0, 0] for each in outputs) == sums
        assert target.evidence is Evidence.SIMULATED
    assert [int(given["n"]) for given in two.given] == [0, 1, 2]
    assert (one.entered, two.entered) == (0, 0)


def test_a_runner_that_is_entered_again_begins_anew():
    runner = Carrying(Summing(), STATES)
    for _ in range(2):
        with runner:
            assert runner.run(of(3))["y"][0, 0] == 3


def test_states_are_results_where_there_are_no_others():
    states = States({"h": "sum", "n": "count", "z": "y"}, (H, X, N, TensorSpec("z", "float32", ("batch", 3))))

    with Carrying(Summing(), states) as runner:
        assert set(runner.run(of(3))) == {"sum", "y", "count"}


def test_an_output_that_a_run_does_not_give_is_named():
    with Carrying(Summing(), States({"h": "summ"}, (H, X))) as runner, pytest.raises(InputError) as refused:
        runner.run(of(1, n=np.array(0)))
    assert str(refused.value) == (
        "A state is to be fed by 'summ', which is no output of the model. Did you mean 'sum'? Known: sum, y, count."
    )


# What is refused


def model(*outputs):
    return FloatModel(Path("net.onnx"), "00", "net", (H, X, N), outputs, 0)


@pytest.mark.parametrize("shape", [(2, "batch", 3), (2, "n", 3), ("rows", 1, "width")])
def test_what_a_dynamic_dimension_is_called_is_free(shape):
    states = states_of({"h": "h_out"}, model(TensorSpec("h_out", "float32", shape)))

    assert (states.plain, states.fed) == ((X, N), (H,))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (
            TensorSpec("h_out", "float64", (2, "batch", 3)),
            "cannot be fed by the output h_out=float64[2,batch,3]. Name an",
        ),
        (TensorSpec("h_out", "float32", (2, "batch", 4)), "The state h=float32[2,batch,3] cannot be fed by the output"),
        (TensorSpec("h_out", "float32", ("batch", 3)), "Name an output of the same type and shape."),
        (
            TensorSpec("hout", "float32", (2, "batch", 3)),
            "'h_out', which is no output of the model. Did you mean 'hout'?",
        ),
    ],
)
def test_an_output_that_cannot_be_the_next_input_is_refused(output, message):
    with pytest.raises(InputError) as refused:
        states_of({"h": "h_out"}, model(output))
    assert message in str(refused.value)


def test_states_that_are_no_inputs_or_all_of_them_are_refused():
    require_inputs({"h": "h_out"}, ("x", "h"))
    with pytest.raises(InputError, match=r"The state 'hh' is no input of the model\. Did you mean 'h'\?"):
        require_inputs({"hh": "h_out"}, ("x", "h"))
    with pytest.raises(InputError, match=r"All inputs of the model are states: x, h\. Leave one to the samples\."):
        require_inputs({"h": "h_out", "x": "y"}, ("x", "h"))
