"""Architectures: one a file. To add one: its file, a line in ARCHS (table.py), a YAML in conf/arch/."""
