"""What quantization does to each layer: its weights, its own error, and what it costs the model's output."""
