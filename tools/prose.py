"""A text to run models on: chapter I of Alice's Adventures in Wonderland (Carroll 1865)."""

from pathlib import Path

PROSE = Path(__file__).with_name("alice.txt")
