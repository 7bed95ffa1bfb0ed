"""Features that are edited on a prompt."""
