"""`python -m hipquant` is the command `hipquant`."""

from __future__ import annotations

from .cli import main

if __name__ == "__main__":
    main()
