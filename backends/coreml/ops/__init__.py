"""One small handler an operator, in files by family."""
