"""Several streams of text that take turns on one output. Knows no model and no terminal."""


class Rows:
    """Several streams on one output, row after row, whatever the order in which they come.

    The first row is shown as it comes while the others wait; when it has ended the next one shows
    what it has and goes on. So the text does not depend on how it was cut in pieces.
    `line_open`: what has been shown does not end a line.
    """

    def __init__(self, n: int):
        self.n, self.current = n, 0
        self.waiting: dict[int, str] = {}
        self.ended: set[int] = set()
        self.line_open = False

    def push(self, row: int, text: str, ended: bool = False) -> str:
        """`row` has gained `text`: what may be shown now."""
        self.waiting[row] = self.waiting.get(row, "") + text
        self.ended |= {row} if ended else set()
        ready = ""
        while self.current < self.n:
            ready += self.waiting.pop(self.current, "")
            if self.current not in self.ended:
                break
            self.current += 1
        self.line_open = not ready.endswith("\n") if ready else self.line_open
        return ready

    def leave(self, end_line: bool) -> str:
        """What to show when all is broken off: the rows that have ended and still wait, on a line
        of their own; `end_line`: so is what others show after it, as on a terminal."""
        kept = [text for row, text in sorted(self.waiting.items()) if row in self.ended]
        ready = "\n" * (self.line_open and (end_line or any(kept))) + "".join(kept)
        self.waiting, self.line_open = {}, False
        return ready
