import io

from qdeploy.report import schema, terminal, wording


def shown(report):
    file = io.StringIO()
    terminal.show(report, file)
    return file.getvalue()


class Screen(io.StringIO):
    def isatty(self):
        return True


def test_everything_is_said_within_100_columns(report):
    text = shown(report)

    assert max(map(len, text.splitlines())) <= 100
    for part in (
        "digits: 1 of 2 targets passed; cannot be built here: tensorrt:int8.",
        "top1",
        "0.9844",
        "88 kB",
        "0.9822",
        "0.0022",
        "[-0.0022, 0.0067]",
        "99.33 %",
        "31.2 dB",
        "27.5 kB",
        "3.20×",
        "0.250 ms",
        "2.00×",
        "executed",
        "largest difference 1.50e-06, SQNR 130.2 dB, agreement 100.00 %",
        "ort-cpu:int8: Drop 0.0022 is within 0.02.",
        "ort-cpu:int8: warning: One image is there twice: größe.png.",
        "tensorrt:int8: tensorrt is not installed.",
        "note: The module was float16.",
    ):
        assert part in " ".join(text.split())


def test_a_row_without_figures_shows_dashes_not_zeros(report):
    (row,) = (line for line in shown(report).splitlines() if line.startswith("tensorrt "))

    assert row.split() == ["tensorrt", "unavailable", "-", "-", "-", "-", "-", "-"]


def test_names_are_neither_markup_nor_control_sequences(report):
    report = report.model_copy(update={"model": schema.Model(name="[red]x\x1b[31m", digest="", parameters=1)})

    assert "[red]x?[31m: " in shown(report)


def test_only_a_terminal_gets_colours(report, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    screen = Screen()
    terminal.show(report, screen)

    assert "\x1b[32mpass\x1b[0m" in screen.getvalue()
    assert "\x1b" not in shown(report)


def test_sizes_have_three_digits():
    assert [wording.size(n) for n in (None, 0, 999, 88_000, 4_646_000, 18_696_477, 2_500_000_000)] == [
        "-",
        "0 B",
        "999 B",
        "88 kB",
        "4.65 MB",
        "18.7 MB",
        "2.5 GB",
    ]


def test_the_verdict_names_what_failed(report):
    failed = report.targets[0].model_copy(update={"status": "fail"})

    assert wording.verdict(report.model_copy(update={"targets": report.targets[:1]})) == "1 of 1 target passed."
    assert wording.verdict(report.model_copy(update={"targets": (failed, report.targets[1])})) == (
        "0 of 2 targets passed; failed: ort-cpu:int8; cannot be built here: tensorrt:int8."
    )


def test_times_of_nearby_sizes_are_equally_long():
    assert [wording.milliseconds(value) for value in (0.013, 0.0199, 0.25, 2.0, 12.0, 99.96, 1234.0, 0.0)] == [
        "0.0130 ms",
        "0.0199 ms",
        "0.250 ms",
        "2.00 ms",
        "12.0 ms",
        "100 ms",
        "1234 ms",
        "0.00 ms",
    ]
