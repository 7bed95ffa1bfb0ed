"""Transcoders for other tools, and from them."""
