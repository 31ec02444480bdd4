import dataclasses
from html.parser import HTMLParser

from qdeploy.report import page, schema

EVIL = "<script>alert('x')</script>&\""


class Reader(HTMLParser):
    """Collects texts and tags, and insists that every tag is closed in its place."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(html)
        self.close()

        assert self.open == []

    def handle_starttag(self, tag, _attributes):
        self.tags.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append(data.strip())


def test_the_page_says_what_the_report_says(report, layers):
    read = Reader(page.render(report, {"ort-cpu": layers}))

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
        "p50 0.25 ms, p90 0.3 ms, p99 0.4 ms, 100 runs",
        "[1.90, 2.10]",
        *("logits", "31.2 dB", "0.999500", "0.125", "50.00 %", "count", "100.00 %"),
        "tensorrt is not installed.",
        "The module was float16.",
        "2 layers",
        "conv1_quant",
        "1.32.0",
        "21,034",
    ):
        assert text in read.texts
    assert read.texts.index("1 of 2 targets passed; cannot be built here: tensorrt:int8.") < read.texts.index("Target")


def test_the_page_stands_alone(report, layers):
    html = page.render(report, {"ort-cpu": layers})

    assert {"script", "link", "img", "iframe"}.isdisjoint(Reader(html).tags)
    assert "url(" not in html
    assert "http" not in html


def test_no_text_becomes_markup(report, layers):
    plain = Reader(page.render(report, {"ort-cpu": layers}))
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
    evil_layers = tuple(
        dataclasses.replace(layer, **fields, inputs=(EVIL,), outputs=(EVIL,), fused_with=(EVIL,)) for layer in layers
    )
    read = Reader(page.render(evil, {EVIL: evil_layers}))

    assert read.tags == plain.tags
    assert EVIL in read.texts


def test_a_target_without_layers_has_no_table_of_them(report):
    assert "details" not in Reader(page.render(report, {})).tags
