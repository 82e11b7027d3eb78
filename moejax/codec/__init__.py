"""Storage formats, arrays in, arrays out: ternary below one bit (ours, QMoE v1), packed 2 to 4."""
