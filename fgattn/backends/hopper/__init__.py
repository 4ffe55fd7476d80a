"""The Gluon kernels for compute capability 9.0."""
