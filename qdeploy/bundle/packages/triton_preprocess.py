"""Makes the model's input of a raw image, as the preprocess.py beside this file does; in Triton's Python backend."""

from __future__ import annotations

import json
from typing import Any

import triton_python_backend_utils as triton
from PIL import Image
from preprocess import prepared


class TritonPythonModel:
    """What the Python backend looks for."""

    def initialize(self, arguments: dict[str, str]) -> None:
        """Read what the input and the output are called."""
        config = json.loads(arguments["model_config"])
        self.input, self.output = config["input"][0]["name"], config["output"][0]["name"]

    def execute(self, requests: list[Any]) -> list[Any]:
        """One answer a request."""
        return [self.answer(request) for request in requests]

    def answer(self, request: Any) -> Any:
        """The model's input for a request's image, uint8 [height, width, 3], or why there is none."""
        pixels = triton.get_input_tensor_by_name(request, self.input).as_numpy()
        try:
            return triton.InferenceResponse([triton.Tensor(self.output, prepared(Image.fromarray(pixels)))])
        except ValueError as error:
            return triton.InferenceResponse(error=triton.TritonError(str(error)))
