"""The inputs worth keeping: one text file a target, one input a line in hexadecimal, ``#`` begins a remark."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent / "corpus"


def load(name: str) -> list[bytes]:
    """The inputs kept for target ``name``."""
    file = HERE / f"{name}.hex"
    if not file.exists():
        return []
    lines = (line.partition("#")[0].strip() for line in file.read_text("ascii").splitlines())
    return [bytes.fromhex(line) if line != "-" else b"" for line in lines if line]


def add(name: str, inputs: list[bytes], remark: str = "") -> int:
    """Keep ``inputs`` too; returns how many are new."""
    known = set(load(name))
    new = [data for data in dict.fromkeys(inputs) if data not in known]
    HERE.mkdir(exist_ok=True)
    with (HERE / f"{name}.hex").open("a", encoding="ascii") as out:
        for data in new:
            out.write((data.hex() or "-") + (f"  # {remark}" if remark else "") + "\n")
    return len(new)
