"""What goes on around a training step: averages, optimizers, parametrizations."""
