"""The tests, by what they hold; `CONTRIBUTING.md` says which command runs which.

* `ops`, `cpu`, `backends`: the ops on every backend, the C++ fast path, and the choice between backends.
* `interpreter`, `offline`, `emulated`, `gpu`: the GPU kernels, in the four tiers that judge them.
* `nn`, `conversion`, `testing`, `benchmarks`: the layers, whole models, what users check with, the measurements.
* `transforms`, `distributed`, `training`, `integration`, `hostile`: what torch users do with layers.

A helper that two folders need is in the one whose subject it is (`tests.ops.body`, `tests.backends.planted`).
"""
