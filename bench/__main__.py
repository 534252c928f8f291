"""`python -m bench ops | blocks | models | train | report | gpu | cpu`.

Exit status: 0 done; 1 a result is wrong, failed or out of date; 2 the request cannot be served; 130 interrupted: the
same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from . import cases

RESULTS = Path(__file__).parent / "results"


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="python -m bench", description="Times, and what they are compared with.")
    commands = root.add_subparsers(dest="command", required=True)
    for kind in cases.KINDS:
        sub = commands.add_parser(kind, help=f"measure {kind}")
        sub.add_argument("--case", nargs="+", action="extend", metavar="PATTERN", help="names, or patterns of names")
        sub.add_argument("--batch", nargs="+", action="extend", type=int, metavar="N", help="images")
        sub.add_argument("--dtype", nargs="+", action="extend", choices=cases.DTYPES)
        sub.add_argument("--size", type=int, help="height and width of the model's image [as trained]")
        sub.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1 [cpu]")
        sub.add_argument("--peers", nargs="+", action="extend", metavar="PATTERN", help="beside ours [all but extras]")
        sub.add_argument("--rounds", type=int, default=7, help="samples of each variant; 7 at least, to quote [7]")
        if kind in cases.FRESH_PROCESS:
            sub.add_argument("--processes", type=int, default=1, help="fresh ones for each case, one after another [1]")
        sub.add_argument("--json", type=Path, metavar="FILE", help="keep the results here, and go on where they end")
        sub.add_argument("--budget", type=float, metavar="SECONDS", help="stop after so long; goes on from the file")
        sub.add_argument("--list", action="store_true", help="name the cases and measure nothing")
    sub = commands.add_parser("report", help="tables, losses and figures from the results")
    sub.add_argument("--results", type=Path, default=RESULTS)
    sub.add_argument("--check", action="store_true", help="write nothing; name what is out of date")
    for name in ("gpu", "cpu"):
        sub = commands.add_parser(name, help=f"everything that is measured of a {name.upper()}, and the report")
        sub.add_argument("--budget", type=float, metavar="SECONDS", help="of this slice; the next goes on [no limit]")
        sub.add_argument("--results", type=Path, default=RESULTS)
        if name == "gpu":
            sub.add_argument("--dry-run", action="store_true", help="the same order on tiny shapes, on a CPU")
    return root


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        if options.command in cases.KINDS:
            return _measure(options, arguments)
        return {"report": _report, "gpu": _gpu, "cpu": _cpu}[options.command](options)
    except (ValueError, RuntimeError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench: interrupted; the same command goes on from the file given with --json", file=sys.stderr)
        return 130


def _measure(options: argparse.Namespace, arguments: list[str] | None) -> int:
    kind, device = options.command, options.device
    batches = options.batch or cases.DEFAULT_BATCHES.get(device.partition(":")[0], (1,))
    chosen = cases.select(kind, options.case, batches, options.dtype or ("float32", "bfloat16"), options.size)
    if options.list:
        print("\n".join(dict.fromkeys(case.name for case in chosen)))
        return 0
    if options.rounds < 1:
        raise ValueError("--rounds is at least 1")
    from . import peers, runner

    _check_device(device)
    peers.choose(options.peers, device.partition(":")[0], kind)
    processes = getattr(options, "processes", 1)
    if processes < 1:
        raise ValueError("--processes is at least 1")
    command = shlex.join(["python", "-m", "bench", *(sys.argv[1:] if arguments is None else arguments)])
    found = runner.run(
        kind, chosen, device, options.peers, options.rounds, processes, command, options.json, options.budget
    )
    wrong = [case for case in found["cases"] if case["status"] != "timed"]
    for case in wrong:
        print(f"bench: {case['id']}: {case['status']}: {case['reason']}", file=sys.stderr)
    return 1 if wrong else 0


def _check_device(device: str) -> None:
    """Raise ValueError where a device cannot be used."""
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"the device {device!r} cannot be used: {str(error).strip().splitlines()[0]}") from None


def _report(options: argparse.Namespace) -> int:
    from . import report

    paths = report.write(options.results, check=options.check)
    for path in paths:
        print(f"out of date: {path}" if options.check else path)
    return 1 if options.check and paths else 0


def _gpu(options: argparse.Namespace) -> int:
    from .gpu.run import run

    return run(options.results, options.budget, options.dry_run)


def _cpu(options: argparse.Namespace) -> int:
    from . import machine

    return machine.run(options.results, options.budget)


if __name__ == "__main__":
    sys.exit(main())
