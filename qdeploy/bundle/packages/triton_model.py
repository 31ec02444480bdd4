"""Runs the model.onnx beside this file with ONNX Runtime, in Triton's Python backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as triton


class TritonPythonModel:
    """What the Python backend looks for."""

    def initialize(self, _: dict[str, str]) -> None:
        """Load the model."""
        path = Path(__file__).with_name("model.onnx")
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.inputs = {each.name: len(each.shape) for each in self.session.get_inputs()}
        self.outputs = [each.name for each in self.session.get_outputs()]

    def execute(self, requests: list[Any]) -> list[Any]:
        """One answer a request."""
        return [self.answer(request) for request in requests]

    def answer(self, request: Any) -> Any:
        """The outputs for a request's inputs, or why there are none."""
        given = {}
        for name, rank in self.inputs.items():
            array = triton.get_input_tensor_by_name(request, name).as_numpy()
            given[name] = array if rank else array.reshape(())  # Triton has no scalars
        try:
            arrays = self.session.run(self.outputs, given)
        except Exception as error:  # onnxruntime has a class for each of its status codes
            return triton.InferenceResponse(error=triton.TritonError(str(error)))
        named = zip(self.outputs, arrays, strict=True)
        return triton.InferenceResponse([triton.Tensor(name, np.atleast_1d(array)) for name, array in named])
