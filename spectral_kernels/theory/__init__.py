"""The spectral bands of the InfoNCE gradient (docs/theory.md §3)."""
