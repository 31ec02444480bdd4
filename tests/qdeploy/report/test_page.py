import base64
import dataclasses
import hashlib
import re
from html.parser import HTMLParser

from qdeploy.report import comparison, comparison_page, page, schema
from qdeploy.report.contents import Contents

EVIL = "<script>alert('x')</script>&\""


class Reader(HTMLParser):
    """Collects texts and tags, and insists that every tag is closed in its place."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.texts, self.fields = [], [], [], {}
        self.feed(html)
        self.close()

        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        named = dict(attributes)
        if "data-path" in named:
            self.fields.setdefault(named["data-path"], set()).add(named["value"])
        if tag not in ("meta", "link", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append(data.strip())


def test_the_page_says_what_the_report_says(contents):
    read = Reader(page.render(contents))

    for text in (
        "digits",
        "1 of 2 targets passed; cannot be built here: tensorrt:int8.",
        "0.9844",
        "[-0.0022, 0.0067]",
        "Drop 0.0022 is within 0.02.",
        "One image is there twice: größe.png.",
        "bias-correction: 5 biases",
        "7 int8, 1 float",
        "mse, 200 samples",
        "p50 0.250 ms, p90 0.300 ms, p99 0.400 ms, 100 runs",
        "[1.90, 2.10]",
        *("logits", "31.2 dB", "0.999500", "0.125", "50.00 %", "count", "100.00 %"),
        "tensorrt is not installed.",
        "The module was float16.",
        "2 layers",
        "conv1_quant",
        "1.32.0",
        "21,034",
        *("conv1.weight", "12.5 dB"),
        *("37.5 dB", "12.50 %", "✓ chosen"),
        "\n".join(page.COMMANDS),
        '[model]\nsource = "model.py:build"',
    ):
        assert text in read.texts
    assert read.texts.index("1 of 2 targets passed; cannot be built here: tensorrt:int8.") < read.texts.index("Target")


def test_a_ladder_is_told_step_by_step(contents):
    steps = (
        schema.Step(name="none", drop=0.08, sqnr_db=6.5, seconds=8.0),
        schema.Step(name="bias-correction", detail="No bias.", drop=0.09, sqnr_db=6.0, seconds=2.5, kept=False),
        schema.Step(name="adaround", detail="scipy is missing.", seconds=0.5, kept=False),
    )
    remaining = schema.Remaining(gap=0.06, layers=(schema.RemainingLayer(node="conv9", op_type="Conv", sqnr_db=11.5),))
    row = contents.report.targets[0].model_copy(update={"steps": steps, "remaining": remaining})
    report = contents.report.model_copy(update={"targets": (row,)})

    read = Reader(page.render(Contents(report)))

    told = read.texts[read.texts.index("Recovery") :]
    shown = ["before any step", "0.0800", "6.5 dB", "8.0 s", "✓ kept"]
    shown += ["bias-correction", "No bias.", "0.0900", "6.0 dB", "2.5 s", "taken back"]
    shown += ["adaround", "scipy is missing.", "0.5 s", "not taken"]
    shown += ["0.0600", "more than allowed is lost.", "conv9", "11.5 dB"]
    assert [text for text in told if text in shown][: len(shown)] == shown


def test_the_page_stands_alone(contents):
    html = page.render(contents)

    assert {"img", "iframe", "object", "style"} & set(Reader(html).tags) == {"style"}
    assert "url(" not in html
    assert set(re.findall(r"https?://[^\"\s]*", html)) <= {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert "default-src 'none'" in html


def test_only_our_own_script_may_run(contents):
    html = page.render(contents)
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)

    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html


def test_no_text_becomes_markup(contents):
    plain = Reader(page.render(contents))
    report = contents.report
    row = report.targets[0].model_copy(
        update={
            "target": EVIL,
            "precision": EVIL,
            "reason": EVIL,
            "folder": EVIL,
            "artifact": EVIL,
            "reader": EVIL,
            "quantized_ops": {EVIL: 1},
            "steps": (schema.Step(name=EVIL, detail=EVIL),),
            "pareto": tuple(
                each.model_copy(update={"kept_float": each.kept_float and (EVIL,)}) for each in report.targets[0].pareto
            ),
            "options": {EVIL: EVIL},
            "warnings": (EVIL,),
        }
    )
    evil = report.model_copy(
        update={
            "qdeploy": EVIL,
            "model": schema.Model(name=EVIL, digest=EVIL, parameters=1),
            "reference": report.reference.model_copy(update={"metric": schema.Metric(name=EVIL, value=1.0, samples=1)}),
            "targets": (row, report.targets[1]),
            "environment": {EVIL: EVIL},
            "notes": (EVIL,),
        }
    )
    fields = {"node": EVIL, "op_type": EVIL, "layer": EVIL, "weights": EVIL, "precision": EVIL}
    layers = contents.layers["ort-cpu"]
    evil_layers = tuple(
        dataclasses.replace(layer, **fields, inputs=(EVIL,), outputs=(EVIL,), fused_with=(EVIL,)) for layer in layers
    )
    ranges = tuple(each.model_copy(update={"name": EVIL, "integer": EVIL}) for each in contents.ranges["ort-cpu"])
    sensitivity = contents.sensitivity["ort-cpu"]
    named = {
        "node": EVIL,
        "op_type": EVIL,
        "weight": EVIL,
        "effects": dict.fromkeys((EVIL, EVIL + "2"), schema.Effect(sqnr_db=1.0)),
    }
    sensitivity = sensitivity.model_copy(update={"layers": (sensitivity.layers[0].model_copy(update=named),)})

    read = Reader(page.render(Contents(evil, {EVIL: evil_layers}, {EVIL: ranges}, EVIL, {EVIL: sensitivity})))

    def without_names(tags):
        return [tag for tag in tags if tag != "data"]

    assert without_names(read.tags).count("script") == plain.tags.count("script")
    assert set(read.tags) == set(plain.tags)
    assert EVIL in read.texts


def test_a_target_of_which_nothing_more_is_known_has_no_empty_parts(report):
    texts = Reader(page.render(Contents(report))).texts

    assert {"Layers", "Activations", "Sensitivity", "Reproduce"}.isdisjoint(texts)
    assert "Mixed precision" in texts


def test_a_comparison_stands_alone_and_says_what_is_worse(contents):
    report = contents.report
    slow = report.targets[0].model_copy(
        update={"latency_ms": schema.Latency(p50=0.5, p90=0.6, p99=0.7, runs=100), "target": EVIL, "metric": 0.9}
    )
    worse = dataclasses.replace(contents, report=report.model_copy(update={"targets": (slow,)}))
    base = dataclasses.replace(contents, report=report.model_copy(update={"targets": report.targets[:1]}))
    found = comparison.compare(worse, base, comparison.limits(0.01, 3.0, 1.1, 1.05), ("new", EVIL))

    html = comparison_page.render(found)

    read = Reader(html)
    assert "url(" not in html
    assert read.tags.count("script") == 1
    for text in ("Worse than allowed: 2 findings.", EVIL, "new", "0.9822", "0.9000", "-0.0822", "▼ worse", "= same"):
        assert text in read.texts
