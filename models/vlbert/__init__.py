"""VL-BERT: words and image regions in one Transformer; a policy may decide which blocks of it are fine-tuned."""
