"""Quantization and deployment: from a trained PyTorch model to a verified INT8 model."""
