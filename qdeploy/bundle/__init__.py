"""The folder that is shipped: manifest, digests, golden samples."""
