"""The operations on a GPU: Triton kernels over torch tensors, CUDA and ROCm from one source.

Imported only when a GPU is asked for. Under TRITON_INTERPRET=1, set before triton is imported, the
same kernels run on the CPU, slowly; the tests do that.
"""
