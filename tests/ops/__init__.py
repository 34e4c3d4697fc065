"""The ops, on every backend that this machine has.

`body.py` is the one test body: a case is drawn, run, and held against float64. `test_property.py` draws cases at
random, `test_options.py` turns each option on, `test_torch_samples.py` takes torch's own samples.
"""
