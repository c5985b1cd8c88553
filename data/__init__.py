"""Files to tensors: readers, index builders, tokenizers, transforms, samplers, metrics; no model, no engine."""
