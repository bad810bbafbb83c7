"""Records, one JSON line for each contender of each case, and their schema."""

import json
import os
import pathlib

SCHEMA_VERSION = 1
_NUMBER = (int, float)
_OPTIONAL_NUMBER = (int, float, type(None))

# Field: the types of its value. A record has exactly these fields.
SCHEMA = {
    "schema": (int,),
    "time": (str,),  # start of the run, UTC, ISO 8601
    "level": (str,),  # quick | full
    "suite": (str,),
    "operation": (str,),
    "implementation": (str,),
    "role": (str,),  # jlora | peer | limit
    "setting": (str,),  # the settings of the implementation, in words
    # name, model, layer, layers, m, n, rank, dtype, spectrum, tokens
    "case": (dict,),
    "status": (str,),  # measured | skipped | failed
    "reason": (str, type(None)),  # why it is not measured
    "lower_ms": _OPTIONAL_NUMBER,
    "compile_ms": _OPTIONAL_NUMBER,
    "times_ms": (list,),  # every run after the warm-up
    "rounds": (list,),  # the interleaved round of each run
    # Arguments, results and temporaries of the compiled program.
    "peak_bytes": _OPTIONAL_NUMBER,
    "temporary_bytes": _OPTIONAL_NUMBER,
    # The device's own statistics, of the process so far.
    "device_peak_bytes": _OPTIONAL_NUMBER,
    "errors": (dict,),  # kind: value; the first is the one to judge by
    "flops": _OPTIONAL_NUMBER,  # the least that the operation needs
    "bytes": _OPTIONAL_NUMBER,  # the least that the operation moves
    # The larger of the times for flops and bytes at the limits measured in this run.
    "floor_ms": _OPTIONAL_NUMBER,
    "fraction_of_limit": _OPTIONAL_NUMBER,  # floor_ms / median time
    "limits": (dict,),  # flops_per_s, bytes_per_s behind floor_ms
    "load": _NUMBER,  # load average at the time of the record
    # Cores that other processes kept busy during the group.
    "others_cores": _OPTIONAL_NUMBER,
    "device": (dict,),
    "host": (dict,),
    "versions": (dict,),
    "commit": (str,),
    "dirty": (bool,),
}


def check_record(record: dict) -> None:
    """Check that a record follows the schema.

    Raises:
        ValueError: A field is missing, unknown or of a wrong type, or two fields
            contradict each other. The message names the field.
    """
    for name in SCHEMA.keys() | record.keys():
        _check_field(record, name)

    if record["status"] not in ("measured", "skipped", "failed"):
        raise ValueError(f"record: status is {record['status']!r}.")
    if (record["status"] == "measured") != bool(record["times_ms"]):
        raise ValueError("record: a measured record has times, and no other has.")
    if len(record["times_ms"]) != len(record["rounds"]):
        raise ValueError("record: times_ms and rounds must be of one length.")


def _check_field(record, name):
    if name not in SCHEMA or name not in record:
        problem = "is missing" if name in SCHEMA else "is unknown"
        raise ValueError(f"record: field {name!r} {problem}.")

    value, types = record[name], SCHEMA[name]
    if not isinstance(value, types):
        rule = " or ".join(each.__name__ for each in types)
        raise ValueError(f"record: field {name!r} must be {rule}, got {value!r}.")


def append_records(path: str | os.PathLike, records: list[dict]) -> None:
    """Append records to a file; they are on the disk when this returns."""
    for record in records:
        check_record(record)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

    # One write of whole lines: an interrupted run leaves no half record.
    with open(path, "a", encoding="utf-8") as file:
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())


def read_records(path: str | os.PathLike) -> list[dict]:
    """Return the records of a file, each checked."""
    with open(path, encoding="utf-8") as file:
        lines = file.read().splitlines()

    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            check_record(record)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        records.append(record)
    return records


def read_newest(folder: pathlib.Path) -> list[dict]:
    """Return the newest record of each key in the files of a folder.

    A measured record counts as newer than every record that is not measured, so that
    the times of a peer stay when the peer is not installed in a later run.
    """
    newest = {}
    for path in sorted(folder.glob("*.jsonl")):
        for record in read_records(path):
            key = record_key(record)
            if key not in newest or _is_newer(record, newest[key]):
                newest[key] = record
    return list(newest.values())


def record_key(record: dict) -> tuple[str, str, str, str]:
    """Return (suite, operation, case name, implementation), the key of a record."""
    return (
        record["suite"],
        record["operation"],
        record["case"]["name"],
        record["implementation"],
    )


def _is_newer(record, other):
    is_measured, was_measured = (
        each["status"] == "measured" for each in (record, other)
    )
    if is_measured != was_measured:
        return is_measured
    return record["time"] >= other["time"]
