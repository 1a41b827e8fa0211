"""How good a model is: bits per byte on held-out text, beside what any model must beat."""
