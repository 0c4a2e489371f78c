"""Several adapters of one base in one tree, and which of them act."""
