"""The simulator is built by the host's C++ compiler; without one there is nothing to test here."""

import shutil

from simulator.machine import COMPILER

if shutil.which(COMPILER) is None:
    collect_ignore_glob = ["test_*.py"]
