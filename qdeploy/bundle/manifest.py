"""bundle.json: what a bundle holds, and the digests that protect it.

The file is the manifest followed by `digest`, the sha256 of the manifest's own text, and its bytes must be exactly
those that `sealed_text` writes: any change of any byte is found. This rule holds for every schema, so that a newer
bundle is recognised as such. The digests find damage and accidents; a forger could compute them anew.

Import this module inside functions: it loads pydantic.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import (  # noqa: TID253  # this module is made of pydantic models and is only imported inside functions
    AfterValidator,
    Field,
    JsonValue,
)

from qdeploy.bundle.write import MANIFEST
from qdeploy.errors import InputError, InternalError
from qdeploy.model import DimRange, TensorSpec, digest_of_files
from qdeploy.report.schema import Document, Value, json_text, validated
from qdeploy.scheme import QuantContract, Scheme


def _inside(path: str) -> str:
    """A path that cannot lead out of the bundle, on any system."""
    if PurePosixPath(path).is_absolute() or {"..", "."} & set(path.split("/")) or "\\" in path or ":" in path:
        message = f"{path!r} leads out of the bundle or is not a plain relative path"
        raise ValueError(message)
    return path


RelativePath = Annotated[str, Field(min_length=1), AfterValidator(_inside)]
"""A path inside the bundle, with forward slashes."""


class BundledTarget(Value):
    """One target at one precision, as it lies in the bundle.

    Attributes:
        target: Backend name.
        precision: For example "int8".
        folder: Its folder in the bundle.
        main: The file or package to open, relative to the folder.
        contract: The rules it was made under, from `readable_contract`.
        options: The backend's options.
    """

    target: str
    precision: str
    folder: RelativePath
    main: RelativePath
    contract: Mapping[str, JsonValue]
    options: Mapping[str, JsonValue] = Field(default_factory=dict)


class Manifest(Document):
    """What a bundle holds. There is no date in it: equal inputs give equal bundles.

    Attributes:
        qdeploy: The version that wrote it.
        recipe: The recipe, with the command line's values in it.
        source: sha256 of the float model.
        inputs: The models' inputs, in order.
        outputs: The models' outputs, in order.
        dims: Ranges of the dynamic dimensions, by name.
        states: The output that feeds each input which carries a state from call to call.
        preprocessing: What turns a raw sample into inputs; null if nothing does.
        targets: In the order asked for.
        environment: Versions, processor and system, by name.
        files: sha256 of every file but bundle.json, by path, sorted.
    """

    qdeploy: str
    recipe: Mapping[str, JsonValue]
    source: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: Mapping[str, DimRange] = Field(default_factory=dict)
    states: Mapping[str, str] = Field(default_factory=dict)
    preprocessing: Mapping[str, JsonValue] | None = None
    targets: tuple[BundledTarget, ...]
    environment: Mapping[str, str] = Field(default_factory=dict)
    files: Mapping[RelativePath, str] = Field(default_factory=dict)


def readable_contract(contract: QuantContract) -> dict[str, JsonValue]:
    """A contract's rules as people read them, for the manifest."""

    def words(scheme: Scheme | None) -> str:
        return str(scheme) if scheme else "float"

    rules: list[JsonValue] = [
        {
            "op_type": rule.op_type,
            "when": [str(condition) for condition in rule.when],
            "inputs": {str(index): words(scheme) for index, scheme in rule.inputs.items()},
            "output": words(rule.output),
            "moves_values": rule.moves_values,
            "reason": rule.reason,
        }
        for rule in contract.rules
    ]
    return {
        "opsets": list(contract.opsets),
        "bias": contract.bias,
        "placement": contract.placement,
        "rules": rules,
    }


def entries(folder: Path) -> Iterator[tuple[str, int]]:
    """Path with forward slashes and mode of all that lies below a folder but plain sub-folders; follows no link."""

    def refuse(error: OSError) -> None:
        raise error

    for parent, folders, files in os.walk(folder, onerror=refuse):
        for name in (*folders, *files):
            path = Path(parent, name)
            mode = path.lstat().st_mode
            if not stat.S_ISDIR(mode):
                yield path.relative_to(folder).as_posix(), mode


def seal(folder: Path, manifest: Manifest) -> Manifest:
    """Write bundle.json beside the files that lie in `folder`; nothing may change there afterwards.

    Args:
        folder: A finished bundle without its bundle.json.
        manifest: The manifest without `files`.

    Returns:
        The manifest with the digest of every file.
    """
    found = sorted(entries(folder))
    odd = [name for name, mode in found if not stat.S_ISREG(mode) or name == MANIFEST]
    if odd:
        message = f"a bundle is sealed once, and holds only regular files: {', '.join(odd)}"
        raise InternalError(message)
    files = {name: digest_of_files((folder / name,)) for name, _ in found}
    sealed = manifest.model_copy(update={"files": files})
    (folder / MANIFEST).write_bytes(sealed_text(sealed.model_dump(mode="json", warnings=False, by_alias=True)))
    return sealed


def sealed_text(content: Mapping[str, JsonValue]) -> bytes:
    """The bytes of bundle.json for the content of a manifest: the content, and the digest of its text."""
    digest = hashlib.sha256(json_text(content).encode()).hexdigest()
    return json_text({**content, "digest": digest}).encode()


def read_manifest(path: Path) -> Manifest:
    """The manifest in a bundle.json, checked byte for byte.

    Raises:
        InputError: The file was changed, or is of a newer schema.
    """
    written = path.read_bytes()
    try:
        content = json.loads(written)
        content.pop("digest")
        unchanged = sealed_text(content) == written
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        unchanged = False
    if not unchanged:
        raise InputError(f"{path} was changed after the bundle was made.", "Copy or export the bundle anew.")
    return validated(Manifest, content, str(path))
