"""What turns gradients into a trained model: state, step, loop, optimizers, checkpoints, metrics."""
