"""Exact causal attention of whole prompts."""
