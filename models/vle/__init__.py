"""VLE: CLIP's image tower, DeBERTa's text tower, fusion layers, heads."""
