"""Pages made of what runs left on disk. Reads artifacts only: no tensor, no model."""
