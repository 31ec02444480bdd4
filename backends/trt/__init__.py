"""TensorRT and TensorRT-RTX: engines built from strongly typed ONNX graphs, with proof of what each layer became."""
