"""The C++ fast path beside the way through Python, what it declines, and the kernels' memory."""
