"""Models on disk: what is read from a folder or the Hub, and what `convert` writes."""
