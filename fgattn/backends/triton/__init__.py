"""The portable Triton kernels: any GPU that Triton supports."""
