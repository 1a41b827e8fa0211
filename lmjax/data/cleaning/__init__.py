"""Cleaning: small steps, each of which gives a document back, changed or not, or drops it."""
