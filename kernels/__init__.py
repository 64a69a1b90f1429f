"""fomoe.kernels: quantisation types, plain references, and what launches the fast code."""
