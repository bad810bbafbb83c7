"""Numbers, marks and tables as Markdown."""

NONE = "–"
BUSY_MARK = "‡"
# The thread pools of torch and BLAS suffer most, which flatters jlora. So say it.
BUSY_NOTE = (
    f"{BUSY_MARK} Other processes kept a core busy at the same time. This slows some "
    "peers most."
)
TWO_RUNS_MARK = "†"
TWO_RUNS_NOTE = (
    f"{TWO_RUNS_MARK} of two runs: the medians are divided, and the machine may have "
    "changed between the runs."
)


def make_table(header, rows):
    """Return a Markdown table of texts, numbers to the right of the first column."""
    marks = [":--", *["--:"] * (len(header) - 1)]
    lines = []
    for row in [header, marks, *rows]:
        escaped = [cell.replace("|", "\\|") for cell in row]
        lines.append(f"| {' | '.join(escaped)} |")
    return "\n".join(lines)


def format_number(value):
    """Return three digits, never as a power of ten."""
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-3 or not value else f"{value:.5f}"


def format_spread(spread):
    """Return the median and, in brackets, the quartiles of a `Spread` or `Ratio`."""
    middle, lower, upper, count = spread
    runs = "one run" if count == 1 else f"{format_number(lower)}–{format_number(upper)}"
    return f"{format_number(middle)} ({runs})"


def format_error(error):
    """Return two digits of an error, or a dash for None."""
    return NONE if error is None else f"{error:.1e}"


def format_quotient(value, unit):
    """Return a value in a unit, or a dash where one of the two is missing."""
    return NONE if value is None or not unit else format_number(value / unit)
