"""Models made smaller: weights in few bits, and what that costs."""
