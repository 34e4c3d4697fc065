"""torch's transforms on the ops and layers: compile, export, torch.func, autocast, fakes, subclasses."""
