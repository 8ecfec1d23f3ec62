"""Recovery: what a quantized model lost is brought back without giving up its codes."""
