"""Progress of long loops on stderr: a bar on a terminal, plain lines elsewhere.

Of several processes of `jax.distributed` the first one reports and warns.
"""

from __future__ import annotations

import sys
import time
import warnings

from jlora._processes import is_first_process


class Progress:
    """A display of the steps of one task, as a bar on a terminal or as lines elsewhere.

    Args:
        description: the name of the task.
        total: the number of steps. None: unknown.
        enabled: False: show nothing. None or True: show progress.
        every: the most steps that may wait until `is_due` says yes.
        unit: of a step, in the plural.
        is_quiet: write no lines where there is no terminal.
    """

    def __init__(
        self,
        description: str,
        total: int | None = None,
        *,
        enabled: bool | None = None,
        every: int = 100,
        unit: str = "steps",
        is_quiet: bool = False,
    ) -> None:
        self._stream = sys.stderr
        self._description = description
        self._total = total
        self._enabled = enabled is not False and is_first_process()
        self._every = every
        self._unit = unit
        self._is_quiet = is_quiet

        self._num_done = 0
        self._num_bytes = 0
        self._waiting = (0, 0)  # steps and bytes of `count` that are not shown yet
        self._started_at = time.perf_counter()
        self._updated_at = self._started_at

        self._bar = None
        if self._enabled and self._stream.isatty():
            # Imported on use, which keeps the import of jlora fast.
            import tqdm

            self._bar = tqdm.tqdm(
                total=total,
                desc=description,
                file=self._stream,
                leave=False,
                unit=f" {unit}",
            )

    def is_due(self, num_waiting: int) -> bool:
        """Return whether to wait for the device and call `advance`.

        That is after `every` steps, and for a bar also after half a second.
        """
        waited = time.perf_counter() - self._updated_at
        return num_waiting >= self._every or (self._bar is not None and waited > 0.5)

    def count(self, count: int = 1, num_bytes: int = 0) -> None:
        """Count steps as done, and show them when that is due, or on `close`."""
        steps, waiting_bytes = self._waiting
        self._waiting = (steps + count, waiting_bytes + num_bytes)
        if self.is_due(self._waiting[0]):
            self._show_waiting()

    def _show_waiting(self) -> None:
        steps, num_bytes = self._waiting
        self._waiting = (0, 0)
        if steps:
            self.advance(steps, num_bytes=num_bytes)

    def advance(self, count: int, text: str = "", num_bytes: int = 0) -> None:
        """Count `count` more steps as done, and show `text` or the bytes per second."""
        self._num_done += count
        self._num_bytes += num_bytes
        self._updated_at = time.perf_counter()

        elapsed = max(self._updated_at - self._started_at, 1e-9)
        if self._num_bytes:
            text = f"{self._num_bytes / elapsed / 1e6:.0f} MB/s"
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(count)
        elif self._enabled and not self._is_quiet:
            rate = self._num_done / elapsed
            if self._total is not None and self._num_bytes:
                left = (self._total - self._num_done) / max(rate, 1e-9)
                text += f", {left:.0f} s left"
            self._print_line(text, rate)

    def _print_line(self, text: str, rate: float) -> None:
        """Write one line, such as "fit: step 20/50, loss 0.1, 30.0 steps/s"."""
        done = str(self._num_done)
        if self._total is not None:
            done = f"{done}/{self._total}"
        done = f"step {done}" if self._unit == "steps" else f"{done} {self._unit}"
        parts = [done, text, f"{rate:.1f} {self._unit}/s"]
        line = ", ".join(part for part in parts if part)
        print(f"{self._description}: {line}", file=self._stream)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Show what `count` still holds, and remove the bar."""
        self._show_waiting()
        if self._bar is not None:
            self._bar.close()


def report(text: str) -> None:
    """Write one line to stderr without breaking a bar on the same terminal."""
    if not is_first_process():
        return
    import tqdm

    tqdm.tqdm.write(text, file=sys.stderr)


def warn(text: str, stacklevel: int = 1) -> None:
    """Warn with a text; the level is counted as in `warnings.warn` of the caller."""
    if is_first_process():
        warnings.warn(text, stacklevel=stacklevel + 1)
