"""The Triton kernels in Triton's interpreter, every one in every configuration, on memory that is NaN before."""
