"""What measures speed and memory, and what was measured on devices."""
