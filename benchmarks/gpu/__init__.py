"""What a borrowed GPU is used for: two calls of some minutes each, ``benchmarks/gpu_run.sh 1 FOLDER`` and ``2 FOLDER``.

* ``calls.py``: the stages of each call, in order of importance.
* ``session.py``: runs them against the clock. Every finding is a line of JSON in ``FOLDER/summary.jsonl`` at once; logs
  and records are in ``FOLDER/run.tgz``, written anew after each stage. There is nothing else in the folder, and a call
  that is killed at any second leaves what it had found.
* ``checks.py``: a backend's kernels held against the reference, a line a check.
* ``cells.py``: the kernels timed beside their rivals, a line a cell: the GPU's time and the host's apart.
* ``tools.py``: what the machine says of itself, and which of CUDA's programs are there.
"""
