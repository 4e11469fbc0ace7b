"""Operations on arrays, one folder each: an XLA reference, and kernels for the devices that have one."""
