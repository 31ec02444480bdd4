"""Folders of .wav files: windows, encodings, and files that do not suit."""

import json
import struct
import wave

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.io import wavfile  # tests may load at once what they need

from qdeploy.errors import InputError
from qdeploy.samples.audio import Windows, open_audio

RATE = 8000
RANDOM = np.random.default_rng(0)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "clips").mkdir()
    return tmp_path / "clips"


def record(path, values, rate=RATE):
    path.parent.mkdir(exist_ok=True)
    wavfile.write(path, rate, values)
    return values


def pcm(frames, *channels):
    return RANDOM.integers(-(2**15), 2**15, (frames, *channels)).astype(np.int16)


def opened(folder, length=100, hop=None, limit=None, rank=None):
    windows = Windows(rate=RATE, length=length, hop=hop)
    return open_audio(folder, ("wave",), {} if rank is None else {"wave": rank}, windows, limit)


def stacked(source):
    return np.stack([sample.inputs["wave"] for sample in source])


def test_windows_are_cut_at_every_hop_and_scaled(folder):
    values = record(folder / "a.wav", pcm(250))

    source = opened(folder, hop=50)

    expected = np.stack([values[None, start : start + 100] for start in (0, 50, 100, 150)]) / 32768
    np.testing.assert_array_equal(stacked(source), expected)
    np.testing.assert_array_equal(stacked(source), expected)
    assert stacked(source).dtype == np.float32
    assert source.description == "audio in clips/ (4 windows of 1 files)"
    assert (source.size, source.preprocessing) == (4, Windows(rate=RATE, length=100, hop=50))
    assert [s.origin for s in source][3] == "sample 3 (clips/a.wav)"


def test_windows_do_not_overlap_unless_asked_to(folder):
    record(folder / "a.wav", pcm(399))

    assert opened(folder).size == 3


def test_raw_is_the_window_as_stored(folder):
    values = record(folder / "a.wav", pcm(200))
    _, second = opened(folder)

    assert second.raw["wave"].tobytes() == values[100:].astype("<i2").tobytes()


def test_real_numbers_are_taken_as_they_are(folder):
    values = record(folder / "a.wav", RANDOM.normal(size=100).astype(np.float32))

    np.testing.assert_array_equal(stacked(opened(folder))[0, 0], values)


def test_a_file_of_the_standard_library_and_one_with_more_chunks(folder):
    values = pcm(100)
    with wave.open(str(folder / "a.wav"), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes(values.tobytes())
    content = (folder / "a.wav").read_bytes()
    (folder / "b.wav").write_bytes(content[:36] + b"LIST\x03\0\0\0abc\0" + content[36:])
    extensible = struct.pack("<HHIIHHHHIH", 0xFFFE, 1, RATE, 2 * RATE, 2, 16, 22, 16, 4, 1) + bytes(14)
    (folder / "c.wav").write_bytes(content[:12] + b"fmt \x28\0\0\0" + extensible + content[36:])

    np.testing.assert_array_equal(stacked(opened(folder))[:, 0], np.stack([values] * 3) / 32768)


def test_channels_come_before_time(folder):
    values = record(folder / "a.wav", pcm(100, 2))

    np.testing.assert_array_equal(stacked(opened(folder))[0, 0], values.T / 32768)


def test_a_model_of_three_dimensions_gets_the_channel_also_of_mono(folder):
    record(folder / "a.wav", pcm(100))

    assert [stacked(opened(folder, rank=rank)).shape[1:] for rank in (2, 3)] == [(1, 100), (1, 1, 100)]


def test_a_short_file_is_filled_with_silence(folder):
    values = record(folder / "a.wav", pcm(60))

    (window,) = stacked(opened(folder))[:, 0]

    np.testing.assert_array_equal(window[:60], values / np.float32(32768))
    assert not window[60:].any()


def test_sub_folders_are_the_classes(folder):
    record(folder / "dog" / "1.wav", pcm(200))
    record(folder / "cat" / "1.WAV", pcm(100))

    source = opened(folder)

    assert [s.labels.tolist() for s in source] == [[0], [1], [1]]
    assert source.class_names == ("cat", "dog")
    assert source.description == "audio in clips/ (3 windows of 2 files in 2 classes)"


def test_a_limit_takes_evenly_spaced_windows(folder):
    for i in range(3):
        record(folder / f"{i}.wav", np.full(400, i, np.int16))

    source = opened(folder, limit=3)

    assert (stacked(source)[:, 0, 0] * 32768).tolist() == [0, 1, 2]
    assert source.description == "audio in clips/ (3 of 12 windows of 3 files)"


@given(st.integers(1, 500), st.integers(1, 60), st.integers(1, 60))
def test_every_window_lies_within_its_file(frames, length, hop):
    starts = list(Windows(rate=1, length=length, hop=hop).starts(frames))

    assert starts[0] == 0
    assert starts == [hop * i for i in range(len(starts))]
    assert starts[-1] + length <= max(frames, length) < starts[-1] + length + hop


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda _: b"text", r"b\.wav is no \.wav file, or is damaged: .* Mend or remove it\."),
        (lambda c: b"RIFX" + c[4:], r"damaged: it does not begin as one\."),
        (lambda c: c[:40], r"b\.wav is no \.wav file, or is damaged:"),
        (lambda c: c[:-1], r"b\.wav ends early\."),
        (lambda c: c[:40] + bytes(4), r"b\.wav is empty\."),
        (lambda c: c[:34] + b"\x18\0" + c[36:], r"not read \(format 1, 24 bits\)\. Convert it: ffmpeg -i b\.wav -c:a"),
        (
            lambda c: c[:24] + struct.pack("<I", 44100) + c[28:],
            r"has 44100 values a second; the windows are for 8000\.",
        ),
    ],
)
def test_a_file_that_does_not_suit_is_named(folder, content, message):
    record(folder / "a.wav", pcm(100))
    (folder / "b.wav").write_bytes(content((folder / "a.wav").read_bytes()))

    with pytest.raises(InputError, match=message):
        opened(folder)


def test_the_cure_of_another_rate_is_a_command(folder):
    record(folder / "a.wav", pcm(100), rate=44100)

    with pytest.raises(InputError, match=r"Resample it: ffmpeg -i a\.wav -ar 8000 resampled\.wav"):
        opened(folder)


def test_windows_are_asked_for(folder):
    record(folder / "a.wav", pcm(100))

    with pytest.raises(InputError, match=r"nothing says how it is cut .* for example: rate=16000 length=16000"):
        open_audio(folder, ("wave",), {}, None, None)


def test_a_model_with_two_inputs_takes_no_folder(folder):
    record(folder / "a.wav", pcm(100))

    with pytest.raises(InputError, match=r"the model has the inputs wave, length\. Yield all of them"):
        open_audio(folder, ("wave", "length"), {}, Windows(rate=RATE, length=100), None)


def test_settings_from_a_text_and_through_json():
    windows = Windows(rate=16000, length=400, hop=160)

    assert Windows.parse("rate=16000 length=400 hop=160") == windows
    for value in (windows, Windows(rate=16000, length=400)):
        assert Windows.from_json(json.loads(json.dumps(value.to_json()))) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rate=16000", r"The windowing has no length\. For example: rate=16000"),
        ("rate=16000 length=0", r"The windowing's length is 0\. Give at least 1\."),
        ("rate=16000 length=1.5", r"The windowing's length cannot be '1\.5'\."),
        ("rate=16000 length=4 hops=3", r"Windowing has no setting 'hops'\. Did you mean 'hop'\?"),
    ],
)
def test_wrong_settings_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        Windows.parse(text)
