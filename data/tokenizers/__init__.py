"""Text to token ids, on sentencepiece or word pieces, with the id layouts of the published models."""
