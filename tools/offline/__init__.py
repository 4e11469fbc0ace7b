"""Compilation for TPUs and GPUs that need not be there, and what to read from its results."""
