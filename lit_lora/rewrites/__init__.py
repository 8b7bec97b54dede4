"""Other ways to compute the same: less memory, fewer kernels."""
