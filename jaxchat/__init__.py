"""jaxchat: a language model from raw text to a chat page, in JAX."""

__version__ = "0.2.0"
