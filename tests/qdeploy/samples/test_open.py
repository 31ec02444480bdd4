"""The form of DATA decides which source is opened."""

import numpy as np
import pytest
from PIL import Image  # tests may load at once what they need
from scipy.io import wavfile

from qdeploy.errors import InputError
from qdeploy.model import TensorSpec
from qdeploy.samples.audio import Windows
from qdeploy.samples.check import checked
from qdeploy.samples.open import open_samples
from qdeploy.samples.preprocessing import Preprocessing
from qdeploy.samples.tokenization import Tokenization

X = np.ones((4, 3, 2, 2), np.float32)
NAMES = ("image",)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder that holds every form of samples; the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for i in range(4):
        Image.new("RGB", (2, 2), (255, 255, 255)).save(tmp_path / "photos" / f"{i}.png")
    np.savez(tmp_path / "x.npz", image=X)
    code = "import numpy\ndef samples():\n    yield from [{'image': numpy.ones((1, 3, 2, 2), 'float32')}] * 4"
    (tmp_path / "source_of_samples.py").write_text(code)
    (tmp_path / "arrays").mkdir()
    for i in range(4):
        np.save(tmp_path / "arrays" / f"{i}.npy", X[i])
    return tmp_path


FORMS = {
    "photos": "images in photos/ (2 of 4 files)",
    "x.npz": "arrays in x.npz (2 of 4 samples)",
    "arrays": "arrays in arrays/ (2 of 4 files)",
    "source_of_samples.py:samples": "samples of source_of_samples.py:samples",
    "source_of_samples:samples": "samples of source_of_samples:samples",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("as_path", [str, lambda folder: folder / ""], ids=["absolute text", "path"])
def test_every_form_gives_the_same_samples_and_no_absolute_path(data, form, as_path):
    place = form if form == "source_of_samples:samples" else as_path(data / form)

    source = open_samples(place, input_names=NAMES, ranks={"image": 4}, preprocessing=Preprocessing(), limit=2)

    assert source.description == FORMS[form]
    for _ in range(2):
        samples = list(checked(source, (TensorSpec("image", "float32", ("n", 3, 2, 2)),)))
        assert len(samples) == 2
        for sample in samples:
            np.testing.assert_allclose(sample.inputs["image"], X[:1], rtol=1e-6)


@pytest.mark.parametrize("preprocessing", [Tokenization("t"), Windows(rate=1, length=1)])
def test_the_preprocessing_of_another_kind_is_none(data, preprocessing):
    with pytest.raises(InputError, match=r"holds images, and nothing says how they become the model's input\."):
        open_samples("photos", input_names=NAMES, preprocessing=preprocessing)


def test_texts_and_audio_are_opened_by_the_same_door(data):
    (data / "own.py").write_text("def build():\n    return lambda text: {'image': [len(text)]}")
    (data / "x.txt").write_text("four\n")
    (data / "clips").mkdir()
    wavfile.write(data / "clips" / "a.wav", 8, np.full(4, 2**14, np.int16))

    (text,) = open_samples("x.txt", input_names=NAMES, preprocessing=Tokenization("own.py:build"))
    (clip,) = open_samples("clips", input_names=NAMES, ranks={"image": 3}, preprocessing=Windows(rate=8, length=4))

    assert text.inputs["image"].tolist() == [[4]]
    assert clip.inputs["image"].tolist() == [[[0.5] * 4]]


def test_python_objects_are_samples_too():
    assert len(list(open_samples([{"image": X}] * 3, input_names=NAMES, limit=2))) == 2


def test_an_open_source_is_taken_as_it_is(data):
    source = open_samples("photos", input_names=NAMES, preprocessing=Preprocessing(crop=1))

    again = open_samples(source, input_names=NAMES, limit=3)

    assert (len(list(again)), len(list(again)), again.size) == (3, 3, 3)
    assert again.preprocessing == source.preprocessing
    assert len(list(open_samples(source, input_names=NAMES))) == 4


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("fotos", "There is no file or folder fotos. Give a folder of images, .wav or .npy files, a .csv, .txt or"),
        ("empty", "The folder empty holds no samples. Give one with files of one kind: .jpg, .jpeg, .png,"),
        ("mixed", "The folder mixed holds files of more than one kind. Give one with files of one kind: .jpg"),
        ("photos", "nothing says how they become the model's input. Give --preprocess"),
        ("clips", "The folder clips holds audio, and nothing says how it is cut into the model's inputs. Give --pre"),
        ("x.csv", "The file x.csv holds text, and nothing says how it becomes the model's inputs. Give --tokenizer"),
        ("source_of_samples.py", "Samples cannot be read from the file source_of_samples.py. Give a folder"),
        ("y.npz", "There is no file y.npz."),
        ("source_of_samples.py:sample", "Did you mean 'samples'? Known: samples."),
    ],
)
def test_other_forms_are_refused(data, place, message):
    for file in ("empty/notes.md", "mixed/a.png", "mixed/deep/b.npy", "clips/a.wav", "x.csv"):
        (data / file).parent.mkdir(parents=True, exist_ok=True)
        (data / file).touch()

    with pytest.raises(InputError) as caught:
        open_samples(place, input_names=NAMES)

    assert message in str(caught.value)


def test_a_limit_must_leave_a_sample():
    with pytest.raises(InputError, match=r"The number of samples is limited to 0\. Give at least 1\."):
        open_samples([], input_names=NAMES, limit=0)
