"""A server of models: continuous batching behind OpenAI's interface, and a chat page."""
