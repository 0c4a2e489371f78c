"""What PEFT asks of optimizers: Optax transforms, and transitions between two steps."""
