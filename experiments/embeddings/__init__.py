"""What splitting an encoder does to its embeddings: `python -m experiments.embeddings`."""
