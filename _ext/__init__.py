"""Compiled data structures and arithmetic of orchestra; each module is imported by its one owner only."""

if __name__ != "orchestra._ext":  # the source folder at the root is importable by accident
    raise ImportError(f"import orchestra._ext, not {__name__!r}: this folder holds the sources of orchestra._ext")
