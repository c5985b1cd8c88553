"""What the benchmarks of LLaVA share: the sizes of its decoder, and how near both sides must come."""

import argparse

from benchmarks.flags import add_shared_flags

# relative to the largest; the precisions to choose from are those with a limit
MAX_DIFFERENCE = {"float32": 1e-4, "bfloat16": 5e-2}


def llama_values(args: argparse.Namespace, *, num_positions: int) -> dict[str, float]:
    """A ``config.json`` of the decoder that the flags ask for."""
    return {
        "vocab_size": args.vocabulary, "hidden_size": args.width, "intermediate_size": int(args.width * 2.6875),
        "num_hidden_layers": args.layers, "num_attention_heads": args.heads, "max_position_embeddings": num_positions,
        "rms_norm_eps": 1e-5,
    }  # fmt: skip


def add_decoder_flags(parser: argparse.ArgumentParser, *, rounds: int) -> None:
    """Sizes of the decoder, and the shared flags."""
    for name, value in (("width", 512), ("layers", 8), ("heads", 8), ("vocabulary", 32000)):
        parser.add_argument(f"--{name}", type=int, default=value)
    add_shared_flags(parser, rounds=rounds, dtypes=MAX_DIFFERENCE)
