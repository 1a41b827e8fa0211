"""Training: learner, gradients, loop, optimizers, schedules, feeds."""
