"""Code that is shipped in packages: modules of this folder as they are, and the one that carries the preprocessing."""

from __future__ import annotations

import re
from importlib.resources import files
from typing import TYPE_CHECKING

from qdeploy.errors import InternalError
from qdeploy.samples.kinds import preprocessing_from_json
from qdeploy.samples.preprocessing import Preprocessing

if TYPE_CHECKING:
    from qdeploy.bundle.manifest import Manifest


def image_preprocessing(manifest: Manifest) -> Preprocessing | None:
    """What makes model inputs of image files, if the bundle was measured on such."""
    found = preprocessing_from_json(manifest.preprocessing) if manifest.preprocessing else None
    return found if isinstance(found, Preprocessing) else None


def preprocessing_code(preprocessing: Preprocessing) -> str:
    """A module that makes model inputs of image files, with the settings as its constants."""
    code = shipped("edge_preprocess.py")
    settings = {
        "RESIZE": preprocessing.resize,
        "CROP": preprocessing.crop_size,
        "COLOR": preprocessing.color,
        "LAYOUT": preprocessing.layout,
        "SCALE": preprocessing.scale,
        "MEAN": preprocessing.mean,
        "STD": preprocessing.std,
    }
    for name, value in settings.items():
        literal = f'"{value}"' if isinstance(value, str) else repr(value)
        code, found = re.subn(rf"^({name}: .* = ).*?(  #|$)", rf"\g<1>{literal}\g<2>", code, flags=re.MULTILINE)
        if found != 1:
            message = f"edge_preprocess.py holds {name} {found} times"
            raise InternalError(message)
    return code


def shipped(name: str) -> str:
    """The text of a module of this folder that goes into packages as it is."""
    return files("qdeploy.bundle.packages").joinpath(name).read_text("utf-8")
