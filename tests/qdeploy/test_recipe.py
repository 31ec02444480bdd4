"""Recipes as values, as files, and as what a bundle keeps of them."""

import json
import random
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdeploy.errors import InputError
from qdeploy.model import DimRange, ModelSource, TensorSpec
from qdeploy.recipe import Given, Recipe, TargetRequest, merged, read_recipe, with_options
from qdeploy.samples.preprocessing import Preprocessing
from qdeploy.samples.tokenization import Tokenization
from qdeploy.toml import toml_text

SOURCE = ModelSource.parse(
    "model.py:build", (TensorSpec("image", "float32", ("batch", 3)),), {"batch": DimRange(1, 2, 8)}
)


@pytest.mark.parametrize(
    ("text", "name", "precision"), [("ort-cpu", "ort-cpu", ""), ("tensorrt:int8-fp16", "tensorrt", "int8-fp16")]
)
def test_a_target_may_name_its_precision(text, name, precision):
    assert TargetRequest.parse(text) == TargetRequest(name, precision)


def test_a_target_takes_its_options_along():
    assert TargetRequest.parse("ort-cpu", {"threads": "2"}).options == {"threads": "2"}


def test_ranges_come_from_one_place():
    with pytest.raises(InputError) as refused:
        Recipe(SOURCE, (TargetRequest("ort-cpu"),), calibration="images", statistics=Path("stats.npz"))
    assert str(refused.value) == (
        "Both --calibration and --statistics are given. "
        "Give one: data to calibrate with, or the statistics of an earlier calibration."
    )


def test_a_bundle_keeps_the_recipe_under_the_recipe_files_names():
    recipe = Recipe(
        SOURCE,
        (TargetRequest("ort-cpu", "int8", {"threads": "2"}), TargetRequest("tensorrt")),
        states={"h": "h_out"},
        calibration="images",
        evaluation=Path("labelled"),
        preprocessing=Preprocessing.parse("resize=8 crop=8"),
        samples=100,
        reader="percentile:99.9",
        granularity="per-tensor",
        keep=("first", "head.*"),
        recover=("bias-correction",),
        metric="top5",
        max_drop=0.01,
    )

    written = recipe.as_json()

    assert json.loads(json.dumps(written)) == written
    assert written == {
        "model": {
            "source": "model.py:build",
            "inputs": ["image=float32[batch,3]"],
            "dims": {"batch": "1:2:8"},
            "states": {"h": "h_out"},
        },
        "samples": {"preprocessing": Preprocessing.parse("resize=8 crop=8").to_json()},
        "calibration": {"data": "images", "statistics": None, "reader": "percentile:99.9", "samples": 100},
        "quantization": {"granularity": "per-tensor", "keep": ["first", "head.*"], "recover": ["bias-correction"]},
        "evaluation": {"data": "labelled"},
        "parity": {"metric": "top5", "max_drop": 0.01},
        "target": [
            {"name": "ort-cpu", "precision": "int8", "threads": "2"},
            {"name": "tensorrt", "precision": ""},
        ],
    }


def test_what_cannot_be_written_down_is_named_by_its_type():
    def score(outputs, labels):
        return 1.0

    written = Recipe(SOURCE, (), calibration=[1, 2], evaluation=iter, metric=score).as_json()

    assert written["calibration"]["data"] == "a list given from Python"
    assert written["evaluation"]["data"] == "a builtin_function_or_method given from Python"
    assert written["parity"]["metric"] == "a function given from Python"
    assert written["quantization"]["recover"] is None
    assert json.dumps(written)


def test_a_misspelt_granularity_is_refused():
    with pytest.raises(InputError) as refused:
        Recipe(SOURCE, (), granularity="per-tenor")
    assert str(refused.value) == (
        "The granularity cannot be 'per-tenor'. Did you mean 'per-tensor'? Known: per-channel, per-tensor."
    )


WHOLE = """
[model]
source = "model.py:build"
inputs = ["image=float32[batch,3]", "mask=bool[batch,n]"]
dims = {batch = "1:2:8", n = [1, 1, 4]}

[samples]
preprocessing = {resize = 256, crop = [224, 192], mean = [0.5, 0.4, 0.3], std = 0.25}

[calibration]
data = "images/train"
reader = "percentile:99.9"
samples = 100

[quantization]
granularity = "per-tensor"
keep = ["first", "head.*"]
recover = ["bias-correction"]

[evaluation]
data = "labelled.npz"

[parity]
metric = "metrics.py:score"
max_drop = 1

[[target]]
name = "ort-cpu"
precision = "int8"
threads = 2

[[target]]
name = "tensorrt"
refit = true
profiles = ["a", "b"]
"""


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Reads a text as the file recipe.toml of the current folder."""
    monkeypatch.chdir(tmp_path)

    def from_text(text):
        Path("recipe.toml").write_text(text, "utf-8")
        return read_recipe(Path("recipe.toml"))

    return from_text


def test_a_file_says_all_that_the_command_line_can_say(read):
    assert merged(read(WHOLE), Given()) == Recipe(
        ModelSource.parse(
            "model.py:build",
            (TensorSpec("image", "float32", ("batch", 3)), TensorSpec("mask", "bool", ("batch", "n"))),
            {"batch": DimRange(1, 2, 8), "n": DimRange(1, 1, 4)},
        ),
        (
            TargetRequest("ort-cpu", "int8", {"threads": "2"}),
            TargetRequest("tensorrt", "", {"refit": "true", "profiles": "a,b"}),
        ),
        calibration="images/train",
        evaluation="labelled.npz",
        preprocessing=Preprocessing(resize=256, crop=(224, 192), mean=(0.5, 0.4, 0.3), std=(0.25,)),
        samples=100,
        reader="percentile:99.9",
        granularity="per-tensor",
        keep=("first", "head.*"),
        recover=("bias-correction",),
        metric="metrics.py:score",
        max_drop=1.0,
    )


def test_what_a_file_leaves_out_keeps_its_default(read):
    recipe = merged(read('[model]\nsource = "net.onnx"\n[[target]]\nname = "ort-cpu"\n'), Given())

    assert recipe == Recipe(ModelSource.parse("net.onnx"), (TargetRequest("ort-cpu"),))


def test_settings_and_steps_may_be_the_command_lines_texts(read):
    given = read('[samples]\npreprocessing = "resize=8 mean=0.5"\n[quantization]\nrecover = "bias-correction,clipping"')

    assert given.preprocessing == Preprocessing(resize=8, mean=(0.5,))
    assert given.recover == ("bias-correction", "clipping")


def test_relative_paths_begin_at_the_files_folder(tmp_path, monkeypatch):
    folder = tmp_path / "here" / "recipes"
    folder.mkdir(parents=True)
    (folder / "a.toml").write_text(
        '[model]\nsource = "../model.py:build"\n'
        '[calibration]\nstatistics = "stats.npz"\n'
        '[evaluation]\ndata = "package.module:samples"\n'
        '[parity]\nmetric = "top1"'
    )
    monkeypatch.chdir(tmp_path)

    given = read_recipe(Path("here/recipes/a.toml"))

    assert given == Given(
        source="here/recipes/../model.py:build",
        statistics=Path("here/recipes/stats.npz"),
        evaluation="package.module:samples",
        metric="top1",
    )


@pytest.mark.parametrize("settings", ['{tokenizer = "words/tokenizer.json"}', '"tokenizer=words/tokenizer.json"'])
def test_a_tokenizer_lies_beside_the_file_too(tmp_path, settings):
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "recipe.toml").write_text(f"[samples]\npreprocessing = {settings}")

    given = read_recipe(tmp_path / "a b" / "recipe.toml")

    assert given.preprocessing == Tokenization(str(tmp_path / "a b" / "words" / "tokenizer.json"))
    written = tomllib.loads(merged(given, Given(source="net.onnx")).as_toml(tmp_path))
    assert written["samples"]["preprocessing"]["tokenizer"] == given.preprocessing.tokenizer


def test_absolute_paths_stay(read):
    given = read('[model]\nsource = "/models/net.onnx"\n[parity]\nmetric = "/metrics.py:score"')

    assert (given.source, given.metric) == ("/models/net.onnx", "/metrics.py:score")


FILE = Given(
    source="net.onnx",
    inputs=SOURCE.inputs,
    dims={"batch": DimRange(1, 2, 8)},
    targets=(TargetRequest("ort-cpu", "int8", {"threads": "2", "level": "all"}), TargetRequest("tensorrt")),
    calibration="images",
    keep=("first",),
    reader="minmax",
    recover=("none",),
)


def test_what_the_command_line_does_not_say_the_file_says():
    recipe = merged(FILE, Given(max_drop=0.0))

    assert (recipe.reader, recipe.keep, recipe.recover, recipe.targets) == (
        "minmax", ("first",), ("none",), FILE.targets,
    )  # fmt: skip
    assert recipe.max_drop == 0.0


def test_the_command_line_beats_the_file():
    command = Given(source="other.onnx", reader="mse", keep=("last",), targets=(TargetRequest("coreml"),))

    recipe = merged(FILE, command)

    assert recipe.source.text == "other.onnx"
    assert (recipe.reader, recipe.keep, recipe.targets) == ("mse", ("last",), (TargetRequest("coreml"),))
    assert recipe.calibration == "images"


def test_options_and_dimensions_count_name_by_name():
    two = (TensorSpec("x", "float32", ("batch", "n")),)
    file = replace(FILE, inputs=two, dims={"batch": DimRange(1, 2, 8), "n": DimRange(1, 1, 4)})

    recipe = merged(file, Given(dims={"n": DimRange(2, 2, 2)}, options={"ort-cpu": {"threads": "4"}}))

    assert recipe.source.dims == {"batch": DimRange(1, 2, 8), "n": DimRange(2, 2, 2)}
    assert recipe.targets[0].options == {"threads": "4", "level": "all"}
    assert recipe.targets[1].options == {}


def test_statistics_on_the_command_line_take_the_place_of_a_files_data():
    recipe = merged(FILE, Given(statistics=Path("stats.npz")))

    assert (recipe.calibration, recipe.statistics) == (None, Path("stats.npz"))


def test_a_model_is_needed():
    with pytest.raises(InputError) as refused:
        merged(replace(FILE, source=None), Given(calibration="images"))
    assert str(refused.value) == "There is no model. Name SOURCE, or --recipe FILE with a source under [model]."


def test_options_are_for_targets_that_there_are():
    with pytest.raises(InputError) as refused:
        with_options([TargetRequest("ort-cpu")], {"ort-cpi": {"threads": "2"}})
    assert str(refused.value) == (
        "Options are given for 'ort-cpi', which is not a target of this run. Did you mean 'ort-cpu'? Known: ort-cpu."
    )


PARITY_KEYS = "Known: metric, max_drop."
TABLES = "Known: model, samples, calibration, quantization, evaluation, parity, target."
ON_ITS_OWN = "Write its name in brackets on a line of its own, and its keys below."
DOUBLE = "Write [[target]] in double brackets above the keys of each target."
IN_QUOTES = "Write it in quotation marks."

MISTAKES = {
    '[modle]\nsource = "a.onnx"': f"A recipe has no table 'modle'. Did you mean 'model'? {TABLES}",
    'zzz = "mse"': f"A recipe has no table 'zzz'. {TABLES}",
    "[parity]\nmax_dorp = 1": f"[parity] has no key 'max_dorp'. Did you mean 'max_drop'? {PARITY_KEYS}",
    '[parity]\nmax_drop = "x"': (
        "[parity] max_drop is text, a number is wanted. Write it without quotation marks, for example 0.01."
    ),
    "[parity]\nmax_drop = inf": (
        "[parity] max_drop is no finite number, a number is wanted. Write it without quotation marks, for example 0.01."
    ),
    "[parity]\nmax_drop = true": (
        "[parity] max_drop is true or false, a number is wanted. Write it without quotation marks, for example 0.01."
    ),
    "[calibration]\nsamples = 1.5": (
        "[calibration] samples is a number, a whole number is wanted. "
        "Write it without quotation marks, for example 100."
    ),
    '[calibration]\ndata = "a\\u0000.npz"': (
        "[calibration] data: The path 'a\\x00.npz' holds a null character. No path has one."
    ),
    "[calibration]\ndata = [1]": f"[calibration] data is a list, text is wanted. {IN_QUOTES}",
    "[calibration]\ndata = 2026-01-01": f"[calibration] data is a date or a time, text is wanted. {IN_QUOTES}",
    '[quantization]\nkeep = "first"': (
        '[quantization] keep is text, a list of texts is wanted. For example: ["first", "last"].'
    ),
    "model = 3": f"[model] is a number, a table is wanted. {ON_ITS_OWN}",
    '[target]\nname = "ort-cpu"': f"[[target]] is a table, a list of tables is wanted. {DOUBLE}",
    '[[target]]\nprecision = "int8"': 'A [[target]] has no name. Add one, for example name = "ort-cpu".',
    "[[target]]\nname = 3": f"[[target]] name is a number, text is wanted. {IN_QUOTES}",
    '[[target]]\nname = "a"\nthreads = {a = 1}': (
        "[[target]] threads is a table, text, a number, true or false, or a list of them is wanted. "
        "See the target's options."
    ),
    '[model]\ninputs = ["image"]': (
        "[model] inputs: --input cannot be 'image'. "
        "Write name=dtype[dimensions], for example image=float32[batch,3,224,224]; a name is dynamic."
    ),
    "[model]\ndims = {batch = [1, 8]}": (
        "[model] dims: --dim cannot be 'batch=1:8'. Write name=minimum:typical:maximum, for example batch=1:1:8."
    ),
    '[samples]\npreprocessing = {tokenizer = "a", columns = [1, 2, 3]}': (
        "[samples] preprocessing: The tokenization names 3 text columns: 1, 2, 3. Give one, or two for pairs."
    ),
    "[samples]\npreprocessing = {resise = 8}": (
        "[samples] preprocessing: Preprocessing has no setting 'resise'. "
        "Did you mean 'resize'? Known: resize, crop, scale, mean, std, layout, color."
    ),
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_named_with_its_place(read, text):
    with pytest.raises(InputError) as refused:
        read(text)
    assert str(refused.value) == f"recipe.toml: {MISTAKES[text]}"


def test_a_syntax_error_is_named_with_its_line(read):
    with pytest.raises(
        InputError, match=r"^recipe\.toml is not valid TOML: .* \(at line 2, column 10\)\. Mend it there\.$"
    ):
        read("[model]\nsource = \n")


@pytest.mark.parametrize("content", [b"a = '\xff'", b"a = " + b"[" * 10_000, b"a = " + b"9" * 10_000])
def test_a_file_that_is_no_toml_is_named(tmp_path, content):
    (tmp_path / "recipe.toml").write_bytes(content)

    with pytest.raises(InputError, match=r"recipe\.toml is not valid TOML: "):
        read_recipe(tmp_path / "recipe.toml")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InputError) as refused:
        read_recipe(tmp_path / "gone.toml")
    assert str(refused.value) == (
        f"The recipe {tmp_path / 'gone.toml'} cannot be read: No such file or directory. Check the path."
    )
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_recipe(tmp_path)


def test_a_recipe_is_written_as_a_file_that_says_the_same(read, tmp_path):
    recipe = merged(read(WHOLE), Given())

    assert merged(read(recipe.as_toml(tmp_path)), Given()) == recipe


@pytest.mark.parametrize("steps", [None, (), ("none",)])
def test_no_steps_and_unnamed_steps_are_written_apart(read, tmp_path, steps):
    recipe = Recipe(SOURCE, (), recover=steps)

    assert merged(read(recipe.as_toml(tmp_path)), Given()).recover == steps


names = st.text(st.characters(categories=["L", "N", "P", "Zs"]), min_size=1)
recipes = st.builds(
    Recipe,
    st.just(replace(SOURCE, text="/models/model.py:build")),
    st.lists(st.builds(TargetRequest, names, names | st.just(""), st.just({"an option": 'with "quotes"\n'}))).map(
        tuple
    ),
    states=st.dictionaries(names, names),
    reader=names,
    keep=st.lists(names).map(tuple),
    recover=st.none() | st.lists(names).map(tuple),
    samples=st.none() | st.integers(),
    max_drop=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    preprocessing=st.none() | st.builds(Preprocessing, scale=st.floats(1e-6, 10), std=st.just((0.1, 0.2, 1 / 3))),
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A file that each example writes anew."""
    return tmp_path_factory.mktemp("recipes") / "recipe.toml"


@given(recipe=recipes)
def test_every_recipe_is_read_back_from_its_file(scratch, recipe):
    scratch.write_text(recipe.as_toml(scratch.parent), "utf-8")

    assert merged(read_recipe(scratch), Given()) == recipe


def test_paths_are_written_as_seen_from_the_files_folder(tmp_path, monkeypatch):
    (tmp_path / "project").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "project" / "link").symlink_to(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "project")
    recipe = Recipe(
        ModelSource.parse("model.py:build"),
        (),
        calibration="package.module:samples",
        evaluation=Path("link/../labelled"),
        metric="link/metrics.py:score",
    )

    written = tomllib.loads(recipe.as_toml(tmp_path / "out" / "net"))

    assert written["model"]["source"] == "../../project/model.py:build"
    assert written["calibration"]["data"] == "package.module:samples"
    assert written["evaluation"]["data"] == "../../labelled"
    assert written["parity"]["metric"] == "../../elsewhere/metrics.py:score"


def test_what_was_given_from_python_is_told_in_the_file_and_refused_when_it_is_run(read, tmp_path):
    recipe = Recipe(ModelSource("Net", "module"), (), calibration=[1, 2], metric=max)

    text = recipe.as_toml(tmp_path)

    assert "on the command line: [model] source, [calibration] data, [parity] metric.\n" in text
    with pytest.raises(InputError) as refused:
        merged(read(text), Given())
    assert str(refused.value) == (
        "The recipe's [model] source was a Net given from Python, which no file can hold. Give it on the command line."
    )
    with pytest.raises(InputError, match=r"The recipe's \[parity\] metric was a builtin_function_or_method given"):
        merged(read(text), Given(source="net.onnx", calibration="images"))
    given_anew = Given(source="net.onnx", statistics=Path("stats.npz"), metric="top1")
    assert merged(read(text), given_anew).metric == "top1"


junk = st.recursive(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["1:1:8", "x=float32[3]", "net.onnx", "none", "resize=8"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["batch", "mean", "name", "tokenizer", "columns", "rate", "é"]), inner)
    ),
    max_leaves=6,
)


def mutated(document, dice, value):
    """A document with one thing changed at a random depth: a key misspelt, a value or a table replaced or doubled."""
    key = dice.choice(list(document))
    if isinstance(document[key], dict) and document[key] and dice.random() < 0.7:
        return {**document, key: mutated(document[key], dice, value)}
    if dice.random() < 0.3:
        return {(key[1:] if name == key else name): content for name, content in document.items()}
    return {**document, key: value}


def outcome(path):
    """A Recipe or an InputError: anything else is raised."""
    try:
        return merged(read_recipe(path), Given())
    except InputError as refused:
        return refused


@given(seed=st.integers(0, 2**32), values=st.lists(junk, min_size=1, max_size=3))
def test_a_recipe_gone_wrong_is_a_recipe_or_a_clear_refusal(scratch, seed, values):
    document, dice = tomllib.loads(WHOLE), random.Random(seed)
    for value in values:
        document = mutated(document, dice, value)
    tables = {name: content for name, content in document.items() if isinstance(content, dict)}
    lists = {name: content for name, content in document.items() if is_list_of_tables(content)}
    rest = {name: content for name, content in document.items() if name not in {*tables, *lists}}
    lines = toml_text({"rest": rest}).splitlines()[1:]
    scratch.write_text("\n".join([*lines, toml_text({**tables, **lists})]), "utf-8")

    assert isinstance(outcome(scratch), Recipe | InputError)


def is_list_of_tables(content):
    return isinstance(content, list) and content != [] and all(isinstance(each, dict) for each in content)


@given(place=st.integers(0, len(WHOLE)), length=st.integers(0, 20), text=st.text(max_size=5))
def test_a_file_with_a_scratch_is_a_recipe_or_a_clear_refusal(scratch, place, length, text):
    scratch.write_text(WHOLE[:place] + text + WHOLE[place + length :], "utf-8", errors="replace")

    assert isinstance(outcome(scratch), Recipe | InputError)


@given(st.binary(max_size=60))
def test_random_bytes_are_a_recipe_or_a_clear_refusal(scratch, content):
    scratch.write_bytes(content)

    assert isinstance(outcome(scratch), Recipe | InputError)
