"""What only a GPU shows: skipped, with the reason, where there is none."""
