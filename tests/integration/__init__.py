"""Other libraries' models, trainers and exporters (marked `integration`: `make test-integration`)."""
