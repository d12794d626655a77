"""``python -m pyroflows`` is the command ``pyroflows``."""

from pyroflows.cli import main

if __name__ == "__main__":
    main()
