"""`python -m packhorse`: the same as the `packhorse` command."""

from packhorse.cli import main

if __name__ == "__main__":
    main()
