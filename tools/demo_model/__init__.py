"""How the demo model is made: its text, its training, its evaluation and its export."""
