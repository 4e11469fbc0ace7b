"""Programs for users of a checkout, run from its root: `python -m scripts.demo`."""
