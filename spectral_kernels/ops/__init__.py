"""The ops, a room each: public function, reference, Triton kernels."""
