"""The numerics: tensors in, tensors out. No files, no configuration objects, no language model."""
