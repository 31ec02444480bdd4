"""Files of texts: columns, labels, pairs, limits, and rows that are wrong. A text's token numbers are word lengths."""

import json

import numpy as np
import pytest

from qdeploy.errors import InputError
from qdeploy.samples.text import open_text
from qdeploy.samples.tokenization import Tokenization

TOKENIZER = """
def build():
    def tokenize(text, second=None):
        texts = [text] if second is None else [text, second]
        return {"input_ids": [len(w) for t in texts for w in t.split()],
                "token_type_ids": [i for i, t in enumerate(texts) for _ in t.split()]}
    return tokenize
"""
NAMES = ("input_ids",)
PAIRS = "A man.,Two men.,2.5\nNo,Yes,0\n"


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Opens a file of the given content."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(TOKENIZER)

    def make(content, name="data.csv", limit=None, inputs=NAMES, **settings):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return open_text(path, inputs, Tokenization("mine.py:build", **settings), limit)

    return make


def contents(source):
    """For each sample its texts, as they were before encoding, and its label."""
    return [(json.loads(s.raw["input_ids"].tobytes()), None if s.labels is None else s.labels.tolist()) for s in source]


def test_pairs_without_a_header_are_encoded_together(opened):
    source = opened(PAIRS, inputs=("input_ids", "token_type_ids"))
    first, second = source

    assert first.inputs["input_ids"].tolist() == [[1, 4, 3, 4]]
    assert first.inputs["token_type_ids"].tolist() == [[0, 0, 1, 1]]
    assert (first.labels.tolist(), first.labels.dtype) == ([2.5], np.float64)
    assert (second.labels.tolist(), second.labels.dtype) == ([0.0], np.float64)
    assert second.origin == "sample 1 (line 2 of data.csv)"
    assert (source.description, source.size) == ("text in data.csv (2 pairs)", 2)
    assert source.preprocessing == Tokenization("mine.py:build")


def test_pairs_apart_are_consecutive_samples_with_one_label(opened):
    source = opened(PAIRS, pairs="apart")

    expected = [(["A man."], [2.5]), (["Two men."], [2.5]), (["No"], [0.0]), (["Yes"], [0.0])]
    assert contents(source) == contents(source) == expected
    assert [s.inputs["input_ids"].tolist() for s in source] == [[[1, 4]], [[3, 4]], [[2]], [[3]]]
    assert [s.origin for s in source][2:] == ["sample 2 (line 2 of data.csv)", "sample 3 (line 2 of data.csv)"]
    assert (source.description, source.size) == ("text in data.csv (2 pairs)", 4)


@pytest.mark.parametrize(
    ("content", "settings", "expected"),
    [
        ("text,label\nGood,1\nBad,0\n", {}, [(["Good"], [1]), (["Bad"], [0])]),
        ("Label,Text\r\n1,Good\r\n", {}, [(["Good"], [1])]),
        ("id,text,label,date\n7,Good,1,May\n", {}, [(["Good"], [1])]),
        ("sentence1,sentence2,score\nA,B,3\n", {}, [(["A", "B"], [3])]),
        ("score,first\n3,A\n", {}, [(["A"], [3])]),
        ("text\nGood\n", {}, [(["Good"], None)]),
        ("Good\nBad\n", {}, [(["Good"], None), (["Bad"], None)]),
        ("A,B\n", {}, [(["A", "B"], None)]),
        ("A,1\nB,2\n", {}, [(["A"], [1]), (["B"], [2])]),
        ('"A, or B","say ""no""",1\n', {}, [(["A, or B", 'say "no"'], [1])]),
        ('"two\nlines",1\n\nB,2\n', {}, [(["two\nlines"], [1]), (["B"], [2])]),
        ("\ufefftext,label\nGrüße,1\n", {}, [(["Grüße"], [1])]),
        ("q,id,a,label\nWhy,3,So,1\n", {"columns": ("a", "Q")}, [(["So", "Why"], [1])]),
        ("q,stars\nWhy,3\n", {"columns": ("q",)}, [(["Why"], None)]),
        ("q,n\n3,Why\n", {"columns": ("q",)}, [(["3"], None)]),
    ],
)
def test_columns_are_found(opened, content, settings, expected):
    assert contents(opened(content, **settings)) == expected


def test_labels_are_integers_only_if_all_are_written_so(opened):
    assert [s.labels.dtype for s in opened("A,1\nB,2\n")] == [np.int64, np.int64]
    assert [s.labels.dtype for s in opened("A,1\nB,2.0\n")] == [np.float64, np.float64]


def test_a_text_file_has_one_text_a_line(opened):
    source = opened("A man\n\n  3, maybe 4 \n", "data.txt")

    assert contents(source) == [(["A man"], None), (["3, maybe 4"], None)]
    assert [s.origin for s in source][1] == "sample 1 (line 3 of data.txt)"
    assert source.description == "text in data.txt (2 texts)"


def test_a_limit_takes_evenly_spaced_rows(opened):
    content = "".join(f"A{i},B{i},{i}\n" for i in range(9))

    together, apart = opened(content, limit=3), opened(content, limit=5, pairs="apart")

    assert [label for _, label in contents(together)] == [[0], [3], [6]]
    assert (together.size, together.description) == (3, "text in data.csv (3 of 9 pairs)")
    assert [texts for texts, _ in contents(apart)] == [["A0"], ["B0"], ["A4"], ["B4"]]
    assert apart.size == 4


def test_a_limit_below_a_pair_is_refused(opened):
    with pytest.raises(InputError, match=r"limited to 1, and a pair makes two\. Give at least 2\."):
        opened(PAIRS, limit=1, pairs="apart")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"data\.csv holds no text\. Give at least one\."),
        ("text,label\n", r"data\.csv holds no text\."),
        ("A,1\nB\n", r"Line 2 of .*data\.csv has 1 columns; the first row has 2\. Quote texts that hold commas\."),
        ("A,1\nB,good\n", r"The label 'good' in line 2 of .*data\.csv is no number\. Number the classes from 0\."),
        ("A,1\nB,nan\n", r"The label 'nan' in line 2 of .*data\.csv is no number\."),
        ("A,1\n ,2\n", r"A text in line 2 of .*data\.csv is empty\. Leave the row out\."),
        ("A,B,C,1\n", r"data\.csv has 3 columns that could be text\. Give it a header with a column text"),
        ("label\n1\n", r"data\.csv has 0 columns that could be text\."),
        ("id,review,label\n7,Good,1\n", r"Line 2 of .* has the number '7' where a text is looked for\. Give the file"),
        ("3,Good\n", r"Line 1 of .* has the number '3' where a text is looked for\."),
        ('A,1\n"B,2\n', r"data\.csv cannot be read: unexpected end of data\. Write it in UTF-8, quoted as csv\."),
        (b"A\xff,1\n", r"data\.csv cannot be read: 'utf-8' codec can't decode"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(opened, content, message):
    with pytest.raises(InputError, match=message):
        opened(content)


def test_a_column_that_is_not_there_is_named(opened):
    with pytest.raises(InputError, match=r"has no column 'sentense'\. Did you mean 'sentence'\? Known: sentence, n\."):
        opened("sentence,n\nA,1\n", columns=("sentense",))


def test_a_missing_file_is_named(tmp_path, opened):
    opened(PAIRS)

    with pytest.raises(InputError, match=r"There is no file .*other\.csv\. Check the path\."):
        open_text(tmp_path / "other.csv", NAMES, Tokenization("mine.py:build"), None)


def test_a_tokenizer_is_asked_for(tmp_path):
    with pytest.raises(InputError, match=r"nothing says how it becomes the model's inputs\. Give --tokenizer"):
        open_text(tmp_path / "data.csv", NAMES, None, None)


def test_an_input_that_the_tokenizer_does_not_give_is_found_at_once(opened):
    with pytest.raises(
        InputError, match=r"The model has the input 'pixels', and the tokenizer gives input_ids, token_type_ids\."
    ):
        opened(PAIRS, inputs=("pixels",))


def test_a_text_without_tokens_is_named(opened, tmp_path):
    (tmp_path / "none.py").write_text("def build():\n    return lambda text: {'input_ids': [1] * text.count('a')}")
    (tmp_path / "data.csv").write_text("a,1\nb,2\n")
    source = open_text(tmp_path / "data.csv", NAMES, Tokenization("none.py:build"), None)

    with pytest.raises(InputError, match=r"found no tokens in sample 1 \(line 2 of data\.csv\): 'b'\. Leave it out\."):
        list(source)
