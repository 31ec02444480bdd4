"""Sample sources: anything that yields model inputs, re-iterable and streamed."""
