"""Systems of papers, trained on real data by ``python -m rl_kernels train`` (docs/systems.md).

* ``config.py``: what a run is told; ``contract.py``: what a system is; ``registry.py``: which there are.
* ``classification.py``: how images of one class each are read and scored.
* ``replacement.py``: Replacement Learning and its controls. ``local/``: supervised local learning. ``modulation/``:
  Kernel Modulation. ``detection/``: a detector.
* ``networks.py``: networks by name; ``models.py``: the small ones; ``data/``: images to train on.
* ``runner/``: the loop, checkpoints, records. ``matrices.py``: experiments. ``comparing.py``, ``report.py``: results.
* ``digits.py``: the demo's own short training, which needs none of these packages.

(A system is a trained whole. A recipe is how a weight is mixed: ``rl_kernels.ops.values.Recipe``.)
"""
