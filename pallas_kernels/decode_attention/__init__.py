"""Attention of one new token a row over the stored keys and values."""
