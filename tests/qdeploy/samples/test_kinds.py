"""Settings tell which kind of preprocessing they are for."""

import pytest

from qdeploy.errors import InputError
from qdeploy.samples.audio import Windows
from qdeploy.samples.kinds import parse_preprocessing, preprocessing_from_json
from qdeploy.samples.preprocessing import Preprocessing
from qdeploy.samples.tokenization import Tokenization

KINDS = {
    "resize=256 crop=224 mean=0.5": Preprocessing(resize=256, crop=224, mean=(0.5,)),
    "": Preprocessing(),
    "tokenizer=t max_length=8": Tokenization("t", max_length=8),
    "length=400 rate=16000": Windows(rate=16000, length=400),
}


@pytest.mark.parametrize("text", KINDS)
def test_settings_become_the_kind_that_they_are_of(text):
    assert parse_preprocessing(text) == KINDS[text]
    assert preprocessing_from_json(KINDS[text].to_json()) == KINDS[text]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tokenizer=t crop=3", r"Tokenization has no setting 'crop'\."),
        ("rate=3 crop=3 length=4", r"Windowing has no setting 'crop'\."),
        ("max_length=8 pairs=apart", r"The tokenization names no tokenizer\."),
        ("length=3", r"Preprocessing has no setting 'length'\."),
    ],
)
def test_kinds_do_not_mix(text, message):
    with pytest.raises(InputError, match=message):
        parse_preprocessing(text)
