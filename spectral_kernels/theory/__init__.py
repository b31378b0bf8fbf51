"""The spectral bands of the InfoNCE gradient (theory.md §3, docs/theory.md)."""
