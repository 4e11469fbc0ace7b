"""Independent computations of what the library computes, to compare with."""
