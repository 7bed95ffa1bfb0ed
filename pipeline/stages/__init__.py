"""One file per command: `run(config) -> path of what was made`. Wiring only; the rooms below do the work."""
