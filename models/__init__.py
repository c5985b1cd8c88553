"""Hand-written networks, one package per family; they import torch and nothing of ours outside this folder."""
