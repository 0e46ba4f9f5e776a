"""Triton kernels of the operators, one module each, for NVIDIA GPUs from sm_80 on.

`rskernels.library.define(..., triton="module.function")` registers a launcher for CUDA tensors; its module,
and with it Triton, is imported by the operator's first call there. Without a GPU the same kernels run in
Triton's interpreter (TRITON_INTERPRET=1, tests) and are compiled ahead of time (`rskernels.triton.aot`).
"""
