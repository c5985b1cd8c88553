"""LLaVA: a Llama decoder that reads images through a projector."""
