"""Quantization and deployment: from a trained PyTorch model to a verified INT8 model.

The names below load when they are first used, so that `import qdeploy` costs nothing. Some of them are also names of
modules: `qdeploy.prepare` and `from qdeploy import prepare` give the function, and `from qdeploy.prepare import …`
reaches whatever else the module holds.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qdeploy import qat as qat
    from qdeploy.analysis.layers import layer_errors as layer_errors
    from qdeploy.analysis.sensitivity import sensitivity as sensitivity
    from qdeploy.analysis.weights import weight_reports as weight_reports
    from qdeploy.api import Deployment as Deployment
    from qdeploy.api import contract as contract
    from qdeploy.api import export as export
    from qdeploy.bundle.load import open_bundle as open_bundle
    from qdeploy.collect import collect as collect
    from qdeploy.errors import InputError as InputError
    from qdeploy.errors import QdeployError as QdeployError
    from qdeploy.errors import UnavailableError as UnavailableError
    from qdeploy.graph import describe as describe
    from qdeploy.pipeline import calibration_reader as calibration_reader
    from qdeploy.plan import plan as plan
    from qdeploy.prepare import prepare as prepare
    from qdeploy.quantize.lint import lint as lint
    from qdeploy.quantize.static import quantize as quantize
    from qdeploy.recover.steps import recover as recover
    from qdeploy.samples.open import open_samples as open_samples
    from qdeploy.samples.preprocessing import Preprocessing as Preprocessing
    from qdeploy.statistics import Statistics as Statistics

    __version__: str

_MODULES = {
    "Deployment": "api",
    "InputError": "errors",
    "Preprocessing": "samples.preprocessing",
    "QdeployError": "errors",
    "Statistics": "statistics",
    "UnavailableError": "errors",
    "calibration_reader": "pipeline",
    "collect": "collect",
    "contract": "api",
    "describe": "graph",
    "export": "api",
    "layer_errors": "analysis.layers",
    "lint": "quantize.lint",
    "open_bundle": "bundle.load",
    "open_samples": "samples.open",
    "plan": "plan",
    "prepare": "prepare",
    "quantize": "quantize.static",
    "recover": "recover.steps",
    "sensitivity": "analysis.sensitivity",
    "weight_reports": "analysis.weights",
}
"""The public names, and where each is defined."""

__all__ = ["__version__", *_MODULES]  # noqa: PLE0604 - the keys are strings


class _Package(ModuleType):
    """This package: finds its public names when they are asked for, and keeps sub-modules from taking their place."""

    def __getattr__(self, name: str) -> Any:
        if name == "__version__":
            from importlib.metadata import version

            return version("qdeploy")
        if name == "qat":
            return importlib.import_module("qdeploy.qat")
        if name not in _MODULES:
            message = f"module 'qdeploy' has no attribute {name!r}"
            raise AttributeError(message)
        return getattr(importlib.import_module(f"qdeploy.{_MODULES[name]}"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Whoever imports a sub-module has it bound here under its name; under a function's name stands the function.
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
