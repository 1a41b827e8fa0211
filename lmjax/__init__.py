"""lmjax: language models in JAX, from raw text to a trained model that answers."""

__version__ = "0.1.0"
