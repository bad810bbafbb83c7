"""Records: one JSON line for each (case, operation, implementation), and their schema."""

import json
import os

SCHEMA_VERSION = 1
_NUMBER = (int, float)
_OPTIONAL_NUMBER = (int, float, type(None))

# Field: the types of its value. A record has these fields and no others.
SCHEMA = {
    "schema": (int,),
    "time": (str,),  # UTC, ISO 8601, start of the run
    "level": (str,),  # quick | full
    "suite": (str,),
    "operation": (str,),
    "implementation": (str,),
    "role": (str,),  # jlora | peer | limit
    "setting": (str,),  # how the implementation was set, in words
    "case": (dict,),  # name, model, layer, layers, m, n, rank, dtype, spectrum, tokens
    "status": (str,),  # measured | skipped | failed
    "reason": (str, type(None)),  # of a record that is not measured
    "lower_ms": _OPTIONAL_NUMBER,
    "compile_ms": _OPTIONAL_NUMBER,
    "times_ms": (list,),  # every run after the warm-up
    "rounds": (list,),  # the interleaved round of each run
    "peak_bytes": _OPTIONAL_NUMBER,  # arguments + results + temporaries of the compiled program
    "temporary_bytes": _OPTIONAL_NUMBER,
    "device_peak_bytes": _OPTIONAL_NUMBER,  # the device's statistics, of the process so far
    "errors": (dict,),  # kind: value; the first is the one to judge by
    "flops": _OPTIONAL_NUMBER,  # that the operation needs at least
    "bytes": _OPTIONAL_NUMBER,  # that the operation moves at least
    "floor_ms": _OPTIONAL_NUMBER,  # the larger of the two at the limits measured in this run
    "fraction_of_limit": _OPTIONAL_NUMBER,  # floor_ms / median time
    "limits": (dict,),  # flops_per_s, bytes_per_s behind floor_ms
    "load": _NUMBER,  # load average when it was measured
    "others_cores": _OPTIONAL_NUMBER,  # cores that other processes kept busy during the group
    "device": (dict,),
    "host": (dict,),
    "versions": (dict,),
    "commit": (str,),
    "dirty": (bool,),
}


def check_record(record):
    """Raise ValueError, naming the field, if a record does not follow the schema."""
    for name in SCHEMA.keys() | record.keys():
        if name not in SCHEMA or name not in record:
            problem = "is missing" if name in SCHEMA else "is unknown"
            raise ValueError(f"record: field {name!r} {problem}.")
        if not isinstance(record[name], SCHEMA[name]):
            raise ValueError(
                f"record: field {name!r} must be {_list_types(name)}, got {record[name]!r}."
            )
    if record["status"] not in ("measured", "skipped", "failed"):
        raise ValueError(f"record: status is {record['status']!r}.")
    if (record["status"] == "measured") != bool(record["times_ms"]):
        raise ValueError("record: a measured record has times, and no other has.")
    if len(record["times_ms"]) != len(record["rounds"]):
        raise ValueError("record: times_ms and rounds must be of one length.")


def append_records(path, records):
    """Append records to a file, whole lines, on the disk when this returns."""
    for record in records:
        check_record(record)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    with open(path, "a", encoding="utf-8") as file:
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())


def read_records(path):
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


def read_newest(folder):
    """Return the newest measured or skipped record of each key in the files of a folder."""
    newest = {}
    for path in sorted(folder.glob("*.jsonl")):
        for record in read_records(path):
            key = record_key(record)
            if key not in newest or _is_newer(record, newest[key]):
                newest[key] = record
    return list(newest.values())


def record_key(record):
    return (
        record["suite"],
        record["operation"],
        record["case"]["name"],
        record["implementation"],
    )


def _is_newer(record, other):
    # A peer that was not installed this time does not hide what was measured before.
    measured = record["status"] == "measured", other["status"] == "measured"
    return (
        measured[0] if measured[0] != measured[1] else record["time"] >= other["time"]
    )


def _list_types(name):
    return " or ".join(kind.__name__ for kind in SCHEMA[name])
