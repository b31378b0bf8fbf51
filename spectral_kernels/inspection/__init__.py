"""Diagnostics of anyone's embeddings: `spectral-kernels inspect FILE`."""
