"""Text from a trained model: decoding with a key-value cache, sampling, streaming."""
