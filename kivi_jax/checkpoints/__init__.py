"""Reads models from folders and the Hugging Face Hub, and writes converted ones."""
