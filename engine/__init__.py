"""Training and evaluation of any model: start-up, backends, optimizer, loop, checkpoints, logging; knows no family."""
