"""bom.cdx.json: what a bundle holds, as a CycloneDX 1.6 list for the tools that keep track of what a company ships.

https://cyclonedx.org/docs/1.6/json/

    components
      float               machine-learning-model; its files, each with its sha256
      ort-cpu, …          machine-learning-model; target and precision as properties; its files
      golden/inputs.npz…  file
      onnxruntime, …      library; not in the bundle, but what it was made and measured with

Neither it nor bundle.json is in the list: bundle.json holds the digest of this file. Equal bundles give equal lists,
so there is no date and no serial number in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from qdeploy.model import digest_of_files
from qdeploy.report.environment import PACKAGES

if TYPE_CHECKING:
    from qdeploy.bundle.manifest import BundledTarget, Manifest

BOM = "bom.cdx.json"
"""The name that CycloneDX gives to files of its kind."""

FLOAT = "float"
"""The folder of the float model."""


def write_bom(bundle: Path, name: str, manifest: Manifest) -> None:
    """Write the list beside the files that lie in a bundle, which is to be sealed next.

    Args:
        bundle: A finished bundle without bundle.json.
        name: Of the model.
        manifest: What it is to be sealed with; `files` may be empty.
    """
    from qdeploy.report.schema import json_text

    files = [path.relative_to(bundle).as_posix() for path in sorted(bundle.rglob("*")) if path.is_file()]
    digests = {file: digest_of_files((bundle / file,)) for file in files}
    (bundle / BOM).write_text(json_text(_content(name, manifest, digests)), "utf-8")


def _content(name: str, manifest: Manifest, digests: Mapping[str, str]) -> dict[str, Any]:
    made_of = {"qdeploy:source": manifest.source}
    properties = {each.folder: {**made_of, **_target_properties(each)} for each in manifest.targets}
    models = {FLOAT: made_of, **properties}
    others = [file for file in digests if file.partition("/")[0] not in models]
    environment = manifest.environment
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "tools": {"components": [{"type": "application", "name": "qdeploy", "version": manifest.qdeploy}]},
            "component": {"type": "data", "bom-ref": "bundle", "name": name},
        },
        "components": [
            *(_model(folder, found, digests) for folder, found in models.items()),
            *(_file(file, digests[file]) for file in others),
            *(_library(package, environment[package]) for package in PACKAGES if package in environment),
        ],
    }


def _target_properties(target: BundledTarget) -> dict[str, str]:
    return {"qdeploy:target": target.target, "qdeploy:precision": target.precision, "qdeploy:main": target.main}


def _model(folder: str, properties: Mapping[str, str], digests: Mapping[str, str]) -> dict[str, Any]:
    return {
        "type": "machine-learning-model",
        "bom-ref": folder,
        "name": folder,
        "properties": [{"name": name, "value": value} for name, value in properties.items()],
        "components": [_file(file, digest) for file, digest in digests.items() if file.startswith(f"{folder}/")],
    }


def _file(path: str, digest: str) -> dict[str, Any]:
    return {"type": "file", "bom-ref": path, "name": path, "hashes": [{"alg": "SHA-256", "content": digest}]}


def _library(name: str, version: str) -> dict[str, Any]:
    purl = f"pkg:pypi/{name}@{quote(version)}"
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "scope": "excluded", "purl": purl}
