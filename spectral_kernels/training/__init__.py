"""SimCLR training with batches chosen by effective rank, and the comparison of ways to choose them."""
