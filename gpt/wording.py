"""How messages write numbers. Sizes in bytes are written by `rich.filesize.decimal`: 5.3 MB."""


def counted(n: int, noun: str) -> str:
    """`n` with its noun, in the plural if needed: 1 file, 2,000 files, 3 micro-batches."""
    if n == 1:
        return f"1 {noun}"
    ending = "es" if noun.endswith("h") else "s"
    return f"{n:,} {noun}{ending}"
