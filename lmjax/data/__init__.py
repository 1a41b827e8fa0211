"""Text to batches: sources, tokenizers, the token store, mixtures, and the loader."""
