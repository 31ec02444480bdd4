"""Samples from Python objects: every shape of item, several passes, and what is refused."""

from collections import UserDict

import numpy as np
import pytest
import torch  # tests may load at once what they need
from torch.utils.data import DataLoader, IterableDataset, TensorDataset  # tests may load at once what they need

from qdeploy.errors import InputError
from qdeploy.samples.iterables import open_python

A = np.ones((2, 3), np.float32)
B = np.zeros((2, 1), np.int64)
Y = np.array([4, 5])


def opened(data, names=("a",), limit=None):
    return open_python(data, names, limit)


@pytest.mark.parametrize(
    ("item", "names", "labels"),
    [
        ({"a": A}, ("a",), None),
        ({"a": A, "labels": Y}, ("a",), Y),
        (UserDict(a=A, b=B), ("a", "b"), None),
        (({"a": A, "b": B}, Y), ("a", "b"), Y),
        ([{"a": A}, torch.tensor(Y)], ("a",), Y),
        (A, ("a",), None),
        (torch.tensor(A, requires_grad=True), ("a",), None),
        ((A,), ("a",), None),
        ([A, Y], ("a",), Y),
        ((A, B), ("a", "b"), None),
        ((A, B, Y), ("a", "b"), Y),
        (((A, B), Y), ("a", "b"), Y),
        (((A,), Y), ("a",), Y),
        (({"a": A}, None), ("a",), None),
    ],
)
def test_every_shape_of_item(item, names, labels):
    (sample,) = opened([item], names)

    expected = {name: {"a": A, "b": B}[name] for name in names}
    assert set(sample.inputs) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(sample.inputs[name], array, strict=True)
    np.testing.assert_array_equal(sample.labels, labels)


def test_labels_may_be_an_input():
    (sample,) = opened([{"a": A, "labels": Y}], ("a", "labels"))

    assert set(sample.inputs) == {"a", "labels"}
    assert sample.labels is None


def test_a_single_label_becomes_a_vector():
    (sample,) = opened([({"a": A[:1]}, 7)])

    np.testing.assert_array_equal(sample.labels, [7])


def test_bytes_come_in_this_machines_order():
    (sample,) = opened([{"a": A.astype(">f4")}])

    assert sample.inputs["a"].dtype.isnative
    np.testing.assert_array_equal(sample.inputs["a"], A)


def test_a_list_is_read_again_and_limited():
    source = opened([{"a": A * i} for i in range(5)], limit=3)

    assert [s.inputs["a"].max() for s in source] == [s.inputs["a"].max() for s in source] == [0, 1, 2]
    assert source.size == 3
    assert source.description == "samples of list"


def test_a_limit_beyond_the_length():
    assert opened([{"a": A}], limit=9).size == 1


def test_a_data_loader_gives_whole_batches():
    x, y = torch.arange(12.0).reshape(6, 2), torch.arange(6)
    source = opened(DataLoader(TensorDataset(x, y), batch_size=4))
    samples = list(source)

    assert source.size == 2
    assert [s.origin for s in samples] == ["sample 0 of DataLoader", "sample 1 of DataLoader"]
    np.testing.assert_array_equal(np.concatenate([s.inputs["a"] for s in samples]), x)
    np.testing.assert_array_equal(np.concatenate([s.labels for s in samples]), y)


def test_a_data_loader_of_unknown_length():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([{"a": A[0]}] * 3)

    source = opened(DataLoader(Stream(), batch_size=1), limit=2)

    assert source.size is None
    assert len(list(source)) == 2


def test_a_callable_is_called_for_each_pass():
    calls = []

    def samples():
        calls.append(1)
        yield {"a": A}

    source = opened(samples)

    assert [len(list(source)), len(list(source)), len(calls)] == [1, 1, 2]
    assert source.size is None
    assert source.description == "samples of samples"


def test_no_more_is_read_than_the_limit_asks_for():
    def samples():
        yield {"a": A}
        pytest.fail("read beyond the limit")

    assert len(list(opened(samples, limit=1))) == 1


class Reader:
    """An ORT calibration data reader in all but its base class."""

    def __init__(self):
        self.left = 2

    def get_next(self):
        self.left -= 1
        return {"a": A} if self.left >= 0 else None


class RewindingReader(Reader):
    def rewind(self):
        self.left = 2


def test_a_reader_is_read_once():
    source = opened(Reader())

    assert len(list(source)) == 2
    with pytest.raises(InputError) as caught:
        list(source)
    assert str(caught.value) == (
        "The Reader can be read only once, and a second pass is needed. "
        "Give it a method rewind(), or pass a callable that makes a new one."
    )


def test_a_reader_that_rewinds_is_read_again():
    source = opened(RewindingReader())

    assert [len(list(source)), len(list(source))] == [2, 2]


def test_a_callable_may_make_readers():
    source = opened(Reader)
    assert [len(list(source)), len(list(source))] == [2, 2]


def test_a_reader_of_onnxruntime():
    from onnxruntime.quantization import CalibrationDataReader

    class Real(CalibrationDataReader):
        def __init__(self):
            self.items = iter([{"a": A}, {"a": A}])

        def get_next(self):
            return next(self.items, None)

    assert len(list(opened(Real()))) == 2


def test_a_generator_is_refused():
    with pytest.raises(InputError) as caught:
        opened({"a": A} for _ in range(2))

    assert str(caught.value) == (
        "The samples are a generator, which can be read only once; several passes are needed. "
        "Pass the function that makes it, or a list."
    )


def test_an_object_that_holds_no_samples_is_refused():
    with pytest.raises(InputError, match=r"Samples cannot be read from an object of type int\. Pass a list"):
        opened(3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([(A, B, Y)], "The number of arrays in sample 0 of list is 3; the model's inputs are a."),
        ([A, ((A, B), Y)], "The number of arrays in sample 1 of list is 2; the model's inputs are a."),
        ({"a": A}, "A str in sample 0 of dict is no array of numbers. Yield a mapping"),
        ([{"a": None}], "A NoneType in sample 0 of list is no array of numbers."),
        ([{"a": [[1], [1, 2]]}], "A list in sample 0 of list is no array: setting an array element"),
        ([{"a": torch.ones(1, dtype=torch.bfloat16)}], "A Tensor in sample 0 of list is no array: Got unsupported"),
    ],
)
def test_items_that_are_no_samples_are_refused(data, message):
    with pytest.raises(InputError) as caught:
        list(opened(data))

    assert message in str(caught.value)


def test_what_the_users_code_raises_is_told():
    def samples():
        yield {"a": A}
        raise ValueError("no more files")

    stream = iter(opened(samples))
    next(stream)

    with pytest.raises(InputError, match=r"^samples raised ValueError: no more files$") as caught:
        next(stream)
    assert isinstance(caught.value.__cause__, ValueError)


def test_what_the_users_code_prints_stays_off_standard_output(capsys):
    def samples():
        print("one")  # noqa: T201  # what users do
        yield {"a": A}
        print("two")  # noqa: T201  # what users do

    for _ in opened(samples):
        print("ours")  # noqa: T201  # what a report does

    assert capsys.readouterr() == ("ours\n", "one\ntwo\n")
