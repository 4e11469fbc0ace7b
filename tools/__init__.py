"""What programs, benchmarks and tests share."""
