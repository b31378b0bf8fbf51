"""Triton that several ops share: launch, numbers, rows, statistics, sums over programs, products, moments."""
