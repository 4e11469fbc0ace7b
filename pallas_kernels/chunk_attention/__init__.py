"""Attention of chunks of new tokens over stored ones."""
