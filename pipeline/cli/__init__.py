"""The command line: `clt COMMAND [OVERRIDE]...`.

Typer declares the commands and their options; everything about configuration is handed to `pipeline.config`, which is
imported when a command runs, so that `clt --help` answers at once.
"""
