"""`python -m pipeline train ...`: the command line of a checkout that is not installed."""

from pipeline.cli.main import main

if __name__ == "__main__":
    main()
