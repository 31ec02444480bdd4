"""Core ML: ONNX → MIL → a saved .mlpackage, read back and checked."""
