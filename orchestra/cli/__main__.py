"""``python -m orchestra.cli``: the same as the ``orchestra`` script."""

from orchestra.cli import main

if __name__ == "__main__":
    main()
