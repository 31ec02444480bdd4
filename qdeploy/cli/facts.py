"""What a model file or a bundle holds, as plain data."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir

    from qdeploy.bundle.load import Bundle


def model_facts(path: Path) -> dict[str, Any]:
    """What an ONNX file holds: interface, constants, operators, and how far it is quantized."""
    from qdeploy.graph import describe, load_graph, require_sound
    from qdeploy.model import model_files, size_of_files

    require_sound(path)
    graph = load_graph(path)
    model = describe(path, path.stem, {})
    return {
        "model": path.name,
        "sha256": model.digest,
        "size_bytes": size_of_files(model_files(path)),
        "opset": graph.opset_imports.get("", 0),
        "inputs": [str(spec) for spec in model.inputs],
        "outputs": [str(spec) for spec in model.outputs],
        "constants": _constants(graph),
        "operators": dict(Counter(node.op_type for node in graph.graph).most_common()),
        **_quantization(graph),
    }


def bundle_facts(bundle: Bundle) -> dict[str, Any]:
    """What a bundle holds, from its manifest."""
    manifest = bundle.manifest
    return {
        "bundle": bundle.path.name,
        "qdeploy": manifest.qdeploy,
        "sha256": manifest.source,
        "inputs": [str(spec) for spec in manifest.inputs],
        "outputs": [str(spec) for spec in manifest.outputs],
        "dims": {name: f"{r.minimum}:{r.typical}:{r.maximum}" for name, r in manifest.dims.items()},
        "states": dict(manifest.states),
        "preprocessing": manifest.preprocessing or {},
        "targets": {t.folder: f"{t.target}:{t.precision} in {t.main}" for t in manifest.targets},
        "environment": manifest.environment,
        "files": {name: (bundle.path / name).stat().st_size for name in manifest.files},
    }


def _constants(graph: ir.Model) -> dict[str, int]:
    """Numbers stored in the file, by element type."""
    stored: Counter[str] = Counter()
    for value in graph.graph.initializers.values():
        if value.const_value is not None:
            stored[value.const_value.dtype.numpy().name] += value.const_value.size
    return dict(stored.most_common())


def _quantization(graph: ir.Model) -> dict[str, Any]:
    """Operators by what they compute in, and the schemes of tensors by how often each is seen."""
    from qdeploy.graph import stored_scheme

    schemes = Counter(
        f"{'constant' if node.inputs[0].is_initializer() else 'activation'} {stored_scheme(node.outputs[0])}"
        for node in graph.graph
        if node.op_type == "DequantizeLinear" and node.inputs[0] is not None
    )
    computed = Counter(_computes_in(node) for node in graph.graph)
    return {
        "computed_in": {kind: computed[kind] for kind in ("integers", "float")},
        "schemes": dict(schemes.most_common()),
    }


def _computes_in(node: ir.Node) -> str:
    """Integers, float, or neither: QDQ pairs themselves, shapes and indices.

    In a QDQ graph a runtime computes in integers where all is there for it: an operator with a weight needs that as
    integers, any other needs an input.
    """
    from qdeploy.graph import is_real, stored_scheme, weight_of
    from qdeploy.quantize.lint import NOT_QDQ

    if node.op_type in NOT_QDQ:
        return "integers"
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return "neither"
    read = [stored_scheme(value) for value in node.inputs]
    if any(read) and (weight_of(node) is None or read[1] is not None):
        return "integers"
    return "float" if any(is_real(value) or value.dtype is None for value in node.outputs) else "neither"
