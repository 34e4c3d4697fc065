"""What users check with: planted faults must be found."""
