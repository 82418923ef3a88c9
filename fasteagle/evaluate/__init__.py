"""How good is a model, and how close to another? Perplexity and agreement along texts."""
