"""From a saved package to a program that can run."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

from qdeploy.backends.coreml.interpreter.package import Package
from qdeploy.backends.coreml.interpreter.program import Program
from qdeploy.backends.coreml.interpreter.spec import read_feature, read_program
from qdeploy.errors import UnavailableError


def load_package(path: Path) -> Program:
    """Read an .mlpackage that holds an ML program, and decode its constants.

    A program with an operator that the interpreter does not know can be loaded and looked at, but not run.

    Raises:
        InputError: The package is damaged, or no ML program.
        UnavailableError: coremltools or torch is not installed.
    """
    package = Package.find(path)
    model = package.read_model()
    try:
        import torch  # noqa: F401 - asked for here, so that what is missing is told before any work
    except ModuleNotFoundError as error:
        raise UnavailableError("torch is not installed.", "Install it: pip install 'qdeploy[torch]'") from error
    from qdeploy.backends.coreml.interpreter.routine import prepare, unknown_operators

    main = read_program(package, model)
    unknown = unknown_operators(main.operations)
    description = model.description
    return Program(
        name=path.name,
        inputs=MappingProxyType({each.name: read_feature(each) for each in description.input}),
        outputs=MappingProxyType({each.name: read_feature(each) for each in description.output}),
        operations=main.operations,
        unknown_operators=unknown,
        executable=None if unknown else prepare(main),
    )
