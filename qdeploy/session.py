"""The one way an ONNX Runtime CPU session is opened, so that every measurement runs under the same conditions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qdeploy.errors import InputError, UnavailableError

if TYPE_CHECKING:
    import onnxruntime

GraphLevel = Literal["disable", "basic", "extended", "all"]


def open_session(
    path: Path, *, threads: int = 0, graph_level: GraphLevel = "all", optimized: Path | None = None
) -> onnxruntime.InferenceSession:
    """A session on the CPU provider.

    Args:
        path: The .onnx file.
        threads: Threads within an operator; 0 for one a core.
        graph_level: How far ORT may rewrite the graph. Numerics are compared under "disable", latency under "all".
        optimized: Where ORT writes the graph that it really runs, if asked for.

    Raises:
        UnavailableError: onnxruntime is not installed.
        InputError: ORT cannot load the model.
    """
    try:
        import onnxruntime as ort
    except ModuleNotFoundError as error:
        raise UnavailableError("onnxruntime is not installed.", "Install it: pip install 'qdeploy[cpu]'") from error
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.graph_optimization_level = {
        "disable": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
        "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
        "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
        "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    }[graph_level]
    # ORT's threads spin after a run and take the cores from whatever follows (four times slower calibration).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ORT raises a different class for each of its status codes
        raise InputError(f"ONNX Runtime cannot load {path.name}: {str(error).strip()}") from error
