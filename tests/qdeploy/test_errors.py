import pytest

from qdeploy.errors import InputError, InternalError, QdeployError, UnavailableError


def test_a_message_says_what_happened_and_then_what_to_do():
    error = InputError("There is no file a.onnx.", "Give the path of a model.")

    assert str(error) == "There is no file a.onnx. Give the path of a model."
    assert (error.what, error.cure) == ("There is no file a.onnx.", "Give the path of a model.")


def test_a_message_without_a_cure_ends_with_what_happened():
    assert str(InputError("It broke.")) == "It broke."


@pytest.mark.parametrize(
    ("kind", "code"), [(QdeployError, 2), (InputError, 2), (UnavailableError, 3), (InternalError, 70)]
)
def test_exit_codes(kind, code):
    assert kind.exit_code == code


def test_a_bug_of_ours_is_never_taken_for_a_mistake_of_the_user():
    assert not issubclass(InternalError, QdeployError)
