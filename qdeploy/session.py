"""The one way an ONNX Runtime CPU session is opened, so that every measurement runs under the same conditions."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from numpy.typing import NDArray

from qdeploy.backend import Arrays, Evidence, Runner, input_arrays
from qdeploy.errors import InputError, InternalError, UnavailableError

if TYPE_CHECKING:
    import onnxruntime

GraphLevel = Literal["disable", "basic", "extended", "all"]

_THREADS: ContextVar[int] = ContextVar("threads", default=0)


@contextmanager
def threads_each(count: int) -> Iterator[None]:
    """Sessions opened meanwhile have so many threads unless told otherwise: for processes that share the cores."""
    token = _THREADS.set(count)
    try:
        yield
    finally:
        _THREADS.reset(token)


def open_session(
    path: Path,
    *,
    threads: int = 0,
    graph_level: GraphLevel = "all",
    optimized: Path | None = None,
    weights: str = "",
    observed: Sequence[str] = (),
) -> onnxruntime.InferenceSession:
    """A session on the CPU provider.

    Args:
        path: The .onnx file.
        threads: Threads within an operator; 0 for one a core, or as many as `threads_each` says.
        graph_level: How far ORT may rewrite the graph. Numerics are compared under "disable", latency under "all".
        optimized: Where ORT writes the graph that it really runs, if asked for.
        weights: Name of a file beside it for that graph's weights; empty to write them with it.
        observed: Names of further tensors that the session gives as outputs, behind the graph's own.

    Raises:
        UnavailableError: onnxruntime is not installed.
        InputError: ORT cannot load the model.
        OSError: There is no room for the optimized graph.
    """
    try:
        import onnxruntime as ort
    except ModuleNotFoundError as error:
        raise UnavailableError("onnxruntime is not installed.", "Install it: pip install 'qdeploy[cpu]'") from error
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or _THREADS.get()
    options.log_severity_level = 4  # what is an error is raised, too
    options.graph_optimization_level = {
        "disable": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
        "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
        "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
        "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    }[graph_level]
    # Within a run ORT's threads spin, as users run it. After it they would take the cores from whatever follows
    # (four times slower calibration).
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        if weights:
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", weights)
    model = _with_outputs(path, observed, options) if observed else str(path)
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ORT raises a different class for each of its status codes
        if optimized is not None and shutil.disk_usage(optimized.parent).free < path.stat().st_size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(optimized)) from error
        raise InputError(f"ONNX Runtime cannot load {path.name}: {str(error).strip()}") from error


def _with_outputs(path: Path, names: Sequence[str], options: onnxruntime.SessionOptions) -> bytes:
    """A model whose graph gives further tensors as outputs; ORT infers their types.

    Serialized protobuf messages merge when they are concatenated, and repeated fields are joined, so that nothing is
    parsed or written here (protobuf.dev, "Encoding", section "Last One Wins").
    """
    import onnx

    graph = onnx.GraphProto(output=[onnx.ValueInfoProto(name=name) for name in names])
    addition: bytes = onnx.ModelProto(graph=graph).SerializeToString()
    # Where external data lie is not known from bytes.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    return path.read_bytes() + addition


class SessionRunner(Runner):
    """Runs an ONNX file on ORT: the FP32 reference, a QDQ graph as it is written, or a target of ORT's itself.

    It runs on the CPU unless `opener` opens the session elsewhere.
    """

    evidence = Evidence.EXECUTED

    def __init__(
        self,
        path: Path,
        *,
        threads: int = 0,
        graph_level: GraphLevel = "all",
        opener: Callable[[], onnxruntime.InferenceSession] | None = None,
    ) -> None:
        self._path = path
        self._open = opener or partial(open_session, path, threads=threads, graph_level=graph_level)
        self._session: onnxruntime.InferenceSession | None = None
        self._names: list[str] = []

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs by name.

        Raises:
            InputError: ORT cannot run the model on these inputs.
        """
        if self._session is None:
            message = f"the runner of {self._path.name} is used outside `with`"
            raise InternalError(message)
        try:
            outputs = self._session.run(self._names, input_arrays(inputs))
        except Exception as error:  # ORT raises a different class for each of its status codes
            given = ", ".join(f"{name}={array.dtype}{list(array.shape)}" for name, array in inputs.items())
            taken = ", ".join(f"{i.name}={i.type}{i.shape}" for i in self._session.get_inputs())
            what = f"ONNX Runtime cannot run {self._path.name} on {given or 'no inputs'}: {error}"
            raise InputError(what, f"The model takes {taken}.") from error
        return dict(zip(self._names, outputs, strict=True))

    def __enter__(self) -> Self:
        self._session = self._open()
        self._names = [output.name for output in self._session.get_outputs()]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session = None
