"""The command `regnet-fast info`."""

from __future__ import annotations

from .app import JsonOption, app
from .errors import check_environment, reported_errors
from .terminal import line, print_json, show, table


@app.command()
def info(as_json: JsonOption = False) -> None:
    """What is installed, which devices there are, and which backend serves which dtype."""
    with reported_errors():
        from ..inspect.info import collect

        check_environment()
        facts = collect()
    if as_json:
        return print_json(facts)
    rows = table("Versions", "package", "version")
    for name, version in facts["versions"].items():
        rows.add_row(name, version or "not found")
    show(rows)
    rows = table("Devices", "device", "facts", flexible=("facts",))
    for device in facts["devices"]:
        described = (f"{key} {value}" for key, value in device.items() if key not in ("device", "name"))
        rows.add_row(device["device"], f"{device['name']}: {', '.join(described)}")
    show(rows)
    title = "Backends, asked for a grouped 3x3 convolution"
    rows = table(title, "device", "backend", "dtype", "available", flexible=("available",))
    for row in facts["backends"]:
        answer = "yes" if row["available"] else f"no: {row['reason']}"
        rows.add_row(row["device"], row["backend"], row["dtype"], answer)
    show(rows)
    for row in facts["tuned"]:
        known = f"{row['shapes']} tuned shapes" if row["shapes"] else "heuristics only"
        line(f"Triton kernels on {row['device']}: {known}; `regnet-fast tune MODEL` measures.")
    compiler, refused = facts["cpu_kernels"]["compiler"], facts["cpu_kernels"]["refused"]
    live = f"torch calls, for {refused}" if refused else f"compiled by {compiler}"
    line(f"Training passes on a CPU, float32: {live}.")
    for row in facts["cuda_kernels"]:
        where = f" on {row['device']}" if row["device"] else ""
        refused = "; ".join(f"not {way}: {reason}" for way, reason in row["refused"].items() if reason)
        compilers = f"built by nvcc {row['nvcc']} for {', '.join(row['built_for'])}" if row["nvcc"] else "not built"
        live = f"by {row['live']}" if row["live"] else "no way to them"
        line(f"CUDA C++ kernels{where}: {live} ({compilers}; NVRTC {row['nvrtc'] or 'none'}).")
        if refused:
            line(f"  {refused}.")
    if facts["forced_backend"]:
        line(f"REGNET_FAST_BACKEND forces {facts['forced_backend']}.")
