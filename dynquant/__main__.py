"""Lets `python -m dynquant` do what the `dynquant` command does."""

from dynquant.cli.app import main

if __name__ == "__main__":
    main()
