"""BEiT-3 (Wang et al., 2022, "Image as a Foreign Language"): multiway encoder and task heads."""
