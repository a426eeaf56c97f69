"""What Triton kernels share: dispatch, launches, and tables of many tensors."""
