"""Everything that touches text, tokens, the language model or the cache on disk."""
