"""The loop and its state. Reads activations from a cache; never loads a language model to explain."""
