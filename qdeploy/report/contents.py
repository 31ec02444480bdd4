"""What a page shows of a bundle: the report, and what lies beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from qdeploy.backend import Layer
from qdeploy.errors import InputError
from qdeploy.report.schema import Layers, Ranges, Report, Sensitivity, TensorRange


@dataclass(frozen=True)
class Contents:
    """What there is to show.

    Attributes:
        report: The figures.
        layers: What each node became, by the target's folder.
        ranges: The quantized activations, by the target's folder; a target that was not calibrated has none.
        recipe: The TOML file from which the bundle can be made again; may be empty.
        sensitivity: What each layer alone costs the output, by the target's folder; none unless it was analyzed.
    """

    report: Report
    layers: Mapping[str, tuple[Layer, ...]] = field(default_factory=dict)
    ranges: Mapping[str, tuple[TensorRange, ...]] = field(default_factory=dict)
    recipe: str = ""
    sensitivity: Mapping[str, Sensitivity] = field(default_factory=dict)

    def with_sensitivity(self, path: Path) -> Contents:
        """The contents with what `qdeploy analyze sensitivity --json` printed into a file.

        Raises:
            InputError: The file is damaged, or of another model or target.
        """
        found = Sensitivity.read(path)
        names = {f"{row.target}:{row.precision}": row.folder for row in reversed(self.report.targets) if row.folder}
        # A target without a precision means its first one, which comes first among its rows if it is there at all.
        names |= {row.target: row.folder for row in reversed(self.report.targets) if row.folder}
        folder = names.get(found.target)
        if folder is None:
            cure = f"Analyze one that it has, with --target: {', '.join(names)}."
            raise InputError(f"{path} is of the target {found.target}, which this bundle does not have.", cure)
        known = {layer.node for layer in self.layers[folder]}
        if strangers := [layer.node for layer in found.layers if layer.node not in known]:
            what = f"{path} is of another model: this one has no layer {strangers[0]!r}."
            raise InputError(what, "Analyze the model that the bundle was made of.")
        return replace(self, sensitivity={**self.sensitivity, folder: found})


def read_contents(bundle: Path) -> Contents:
    """The contents of a bundle, whose digests are not checked here.

    Raises:
        InputError: A file is missing or damaged.
    """
    report = Report.read(bundle / "report.json")
    folders = [row.folder for row in report.targets if row.folder]
    recipe, ranges = bundle / "recipe.toml", {name: bundle / "calibration" / f"{name}.json" for name in folders}
    return Contents(
        report,
        {name: Layers.read(bundle / name / "layers.json").layers for name in folders},
        {name: Ranges.read(path).tensors for name, path in ranges.items() if path.is_file()},
        recipe.read_text("utf-8") if recipe.is_file() else "",
    )
