"""What a quantized cache costs a model in quality."""
