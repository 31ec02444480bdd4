"""Tokenizers: what they are told, and what they give; a small one is made with the package itself."""

import builtins
import json

import numpy as np
import pytest

from qdeploy.errors import InputError, UnavailableError
from qdeploy.samples.tokenization import Tokenization

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "plane", "is", "taking", "off", "man"]
PAD, CLS, SEP, UNK, A, PLANE, IS, TAKING, OFF, MAN = range(10)


def save_tokenizer(path, words=WORDS, padding=None, truncation=None):
    """A tokenizer of whole words, written as the package tokenizers does."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    if padding:
        tokenizer.enable_padding(**padding)
    if truncation:
        tokenizer.enable_truncation(truncation)
    tokenizer.save(str(path))
    return path


@pytest.fixture
def path(tmp_path):
    return save_tokenizer(tmp_path / "tokenizer.json")


def lists(encoded):
    return {name: array.tolist() for name, array in encoded.items()}


def test_a_text_has_its_own_length_and_a_batch_of_one(path):
    encoded = Tokenization(str(path)).encoder()("a plane is gone")

    assert lists(encoded) == {
        "input_ids": [[CLS, A, PLANE, IS, UNK, SEP]],
        "attention_mask": [[1] * 6],
        "token_type_ids": [[0] * 6],
    }
    assert {array.dtype for array in encoded.values()} == {np.dtype(np.int64)}


def test_two_texts_are_encoded_together(path):
    encoded = Tokenization(str(path)).encoder()("a plane", "a man")

    assert encoded["input_ids"].tolist() == [[CLS, A, PLANE, SEP, A, MAN, SEP]]
    assert encoded["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1]]


def test_a_folder_holds_its_tokenizer(path):
    assert Tokenization(str(path.parent)).encoder()("man")["input_ids"].tolist() == [[CLS, MAN, SEP]]


def test_max_length_cuts_and_pad_fills(path):
    cut = Tokenization(str(path), max_length=4).encoder()
    filled = Tokenization(str(path), max_length=5, pad=True).encoder()

    assert cut("a plane is taking off")["input_ids"].tolist() == [[CLS, A, PLANE, SEP]]
    assert cut("man")["input_ids"].shape == (1, 3)
    assert lists(filled("man")) == {
        "input_ids": [[CLS, MAN, SEP, PAD, PAD]],
        "attention_mask": [[1, 1, 1, 0, 0]],
        "token_type_ids": [[0] * 5],
    }


def test_the_files_own_padding_is_off_unless_asked_for_and_its_limit_stays(tmp_path):
    own = {"length": 8, "pad_id": UNK, "pad_token": "[UNK]", "direction": "left"}
    path = save_tokenizer(tmp_path / "tokenizer.json", padding=own, truncation=4)

    assert Tokenization(str(path)).encoder()("man")["input_ids"].tolist() == [[CLS, MAN, SEP]]
    assert Tokenization(str(path)).encoder()("a plane is")["input_ids"].tolist() == [[CLS, A, PLANE, SEP]]
    padded = Tokenization(str(path), max_length=5, pad=True).encoder()
    assert padded("man")["input_ids"].tolist() == [[UNK, UNK, CLS, MAN, SEP]]


def test_a_tokenizer_without_a_token_to_pad_with_is_refused(tmp_path):
    path = save_tokenizer(tmp_path / "tokenizer.json", words=["x", "[CLS]", "[SEP]", "[UNK]"])

    with pytest.raises(InputError, match=r"has none of the tokens \[PAD\], <pad>\. Leave out pad\."):
        Tokenization(str(path), max_length=5, pad=True).encoder()


def test_a_length_without_room_for_text_is_refused(path):
    with pytest.raises(InputError, match=r"A max_length of 1 leaves no room for text beside .* special tokens\."):
        Tokenization(str(path), max_length=1).encoder()("man")


def test_a_tokenizer_of_the_users(tmp_path):
    code = """
import numpy
def build():
    print("loading")
    def tokenize(text, second=None):
        numbers = [len(word) for word in f"{text} {second or ''}".split()]
        return {"input_ids": numbers, "mask": numpy.ones((1, len(numbers)), numpy.int32)}
    return tokenize
"""
    (tmp_path / "mine.py").write_text(code)
    encode = Tokenization(f"{tmp_path / 'mine.py'}:build").encoder()

    assert lists(encode("a plane")) == {"input_ids": [[1, 5]], "mask": [[1, 1]]}
    assert encode("a", "man")["input_ids"].tolist() == [[1, 3]]
    assert encode("a")["mask"].dtype == np.int32


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 3", r"own.py:build returned a int, which is no tokenizer\. Return a callable"),
        ("return lambda text: [1, 2]", r"The tokenizer own.py:build gave a list\. It must give a mapping"),
        ("return lambda text: {'input_ids': ['x']}", r"gave no numbers for 'input_ids'\. Give lists or arrays\."),
        ("return lambda text: 1 / 0", r"own.py:build raised ZeroDivisionError: division by zero \(line 2 of own.py\)"),
    ],
)
def test_what_a_tokenizer_of_the_users_does_wrong_is_said(tmp_path, body, message):
    (tmp_path / "own.py").write_text(f"def build():\n    {body}")

    with pytest.raises(InputError, match=message):
        Tokenization(f"{tmp_path / 'own.py'}:build").encoder()("a")


def test_settings_have_no_hold_on_a_tokenizer_of_the_users(tmp_path):
    with pytest.raises(InputError, match=r"mine.py:build is your own code; max_length and pad have no hold on it"):
        Tokenization("mine.py:build", max_length=5).encoder()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", r"There is no tokenizer nowhere\. Give a tokenizer\.json, a folder .*; nothing is downloaded\."),
        ("nowhere.json", r"There is no file nowhere\.json\."),
        ("empty", r"There is no file empty/tokenizer\.json\. .* tokenizer\.save_pretrained\(FOLDER\) writes it\."),
        ("vocab.txt", r"The file vocab\.txt is no tokenizer\.json\. Give a tokenizer\.json, a folder"),
        ("text.json", r"The tokenizer text\.json cannot be read: .*\. Write it with save_pretrained\."),
    ],
)
def test_a_tokenizer_that_is_none_is_refused(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name_of_file in ("text.json", "vocab.txt"):
        (tmp_path / name_of_file).write_text("no tokenizer")

    with pytest.raises(InputError, match=message):
        Tokenization(name).encoder()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairs": "seperate"}, r"The tokenization's pairs cannot be 'seperate'\. Known: together, apart\."),
        ({"max_length": 0}, r"The tokenization's max_length is 0\. Give at least 1\."),
        ({"pad": True}, r"Texts are to be padded, and no length says how far\. Give max_length\."),
        ({"columns": ("a", "b", "c")}, r"The tokenization names 3 text columns: a, b, c\. Give one, or two"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Tokenization("t", **settings)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tokenizer=t", Tokenization("t")),
        (
            "tokenizer=my.py:build pairs=apart columns=s1,s2",
            Tokenization("my.py:build", pairs="apart", columns=("s1", "s2")),
        ),
        ("tokenizer=t max_length=64 pad=true", Tokenization("t", max_length=64, pad=True)),
    ],
)
def test_settings_from_a_text_and_through_json(text, expected):
    assert Tokenization.parse(text) == expected
    assert Tokenization.from_json(json.loads(json.dumps(expected.to_json()))) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_length=3", r"The tokenization names no tokenizer\. For example: tokenizer="),
        ("tokenizer=t length=3", r"Tokenization has no setting 'length'\. Did you mean 'max_length'\?"),
        ("tokenizer=t max_length=3.5", r"The tokenization's max_length cannot be '3\.5'\. For example: tokenizer="),
        ("tokenizer=t pad=perhaps", r"The tokenization's pad cannot be 'perhaps'\."),
        ("tokenizer=t pad", r"The preprocessing 'pad' is not of the form key=value\."),
    ],
)
def test_wrong_settings_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        Tokenization.parse(text)


def test_a_missing_package_is_reported_with_its_cure(path, monkeypatch):
    real_import = builtins.__import__

    def without(name, *arguments):
        if name == "tokenizers":
            raise ModuleNotFoundError(name=name)
        return real_import(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)

    with pytest.raises(
        UnavailableError, match=r"tokenizers is not installed. Install it: pip install 'qdeploy\[text\]"
    ):
        Tokenization(str(path)).encoder()
