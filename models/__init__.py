"""Model families as Flax NNX modules."""
