"""Comparison with FP32: accuracy with intervals, latency, size, verdict."""
