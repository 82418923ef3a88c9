"""What is a quantized matrix, and what multiplies it? int8 and int4 weights, 16-bit activations."""
