"""What the backends for GPUs share on the host: how operands lie, and how a product is cut into programs."""
