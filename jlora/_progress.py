"""Progress for people: a bar on a terminal, plain lines elsewhere."""

import sys
import time


class Progress:
    """Reports steps of one job on stderr: a bar on a terminal, elsewhere lines unless quiet."""

    def __init__(
        self,
        description,
        total=None,
        *,
        enabled=None,
        every=100,
        unit="steps",
        is_quiet=False,
    ):
        self._stream = sys.stderr
        self._description = description
        self._total = total
        self._enabled = enabled is not False
        self._every = every
        self._start = time.perf_counter()
        self._unit = unit
        self._is_quiet = is_quiet
        self._done = 0
        self._num_bytes = 0
        self._last_look = self._start
        self._bar = None
        if self._enabled and self._stream.isatty():
            # Imported where it is used: importing jlora is to cost next to nothing.
            import tqdm

            self._bar = tqdm.tqdm(
                total=total,
                desc=description,
                file=self._stream,
                leave=False,
                unit=f" {unit}",
            )

    def is_due(self, num_waiting):
        """Say whether to look at what the device has done: a bar wants to move twice a second."""
        waited = time.perf_counter() - self._last_look
        return num_waiting >= self._every or (self._bar is not None and waited > 0.5)

    def advance(self, count, text="", num_bytes=0):
        """Count `count` more steps as done, and show `text` or the bytes a second beside them."""
        self._done += count
        self._num_bytes += num_bytes
        self._last_look = time.perf_counter()
        elapsed = max(self._last_look - self._start, 1e-9)
        if self._num_bytes:
            text = f"{self._num_bytes / elapsed / 1e6:.0f} MB/s"
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(count)
        elif self._enabled and not self._is_quiet:
            total = "" if self._total is None else f"/{self._total}"
            step = "step " if self._unit == "steps" else ""
            print(
                f"{self._description}: {step}{self._done}{total}"
                f"{'' if step else f' {self._unit}'}, {text}, "
                f"{self._done / elapsed:.1f} {self._unit}/s",
                file=self._stream,
            )

    def close(self):
        if self._bar is not None:
            self._bar.close()


def report(text):
    """Write one line to stderr without breaking a bar that is being drawn."""
    import tqdm

    tqdm.tqdm.write(text, file=sys.stderr)
