"""Several processes held against one: DDP, FSDP2 and tensor parallelism. `conftest.py` starts and stops them."""
