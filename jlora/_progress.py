"""Progress for people: a bar on a terminal, plain lines elsewhere."""

import sys
import time


class Progress:
    """Reports steps of one job on stderr; `enabled=None` means a bar only on a terminal."""

    def __init__(self, description, total=None, *, enabled=None, every=100):
        self._stream = sys.stderr
        self._description = description
        self._total = total
        self._enabled = enabled is not False
        self._every = every
        self._start = time.perf_counter()
        self._done = 0
        self._last_look = self._start
        self._bar = None
        if self._enabled and self._stream.isatty():
            # Imported where it is used: importing jlora is to cost next to nothing.
            import tqdm

            self._bar = tqdm.tqdm(
                total=total, desc=description, file=self._stream, leave=False, unit=" steps"
            )

    def is_due(self, num_waiting):
        """Say whether to look at what the device has done: a bar wants to move twice a second."""
        waited = time.perf_counter() - self._last_look
        return num_waiting >= self._every or (self._bar is not None and waited > 0.5)

    def advance(self, count, text=""):
        """Count `count` more steps as done, and show `text` beside them."""
        self._done += count
        self._last_look = time.perf_counter()
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(count)
        elif self._enabled:
            rate = self._done / max(time.perf_counter() - self._start, 1e-9)
            total = "" if self._total is None else f"/{self._total}"
            print(
                f"{self._description}: step {self._done}{total}, {text}, {rate:.1f} steps/s",
                file=self._stream,
            )

    def close(self):
        if self._bar is not None:
            self._bar.close()


def report(text):
    """Write one line to stderr without breaking a bar that is being drawn."""
    import tqdm

    tqdm.tqdm.write(text, file=sys.stderr)
