"""`python -m kivi_jax.cli`."""

from kivi_jax.cli import app

if __name__ == "__main__":
    app(prog_name="kivi-jax")
