"""What single commands of `spectral-kernels` do; the command line itself is in cli.py."""
