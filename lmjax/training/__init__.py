"""What makes a model of gradients: state, step, loop, optimizers, checkpoints, metrics."""
