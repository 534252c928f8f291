"""The command line `regnet-fast`: a module for each command, over `app`, `errors` and `terminal`.

Exit status: 0 done; 1 the check that was asked for failed; 2 the request is wrong (an unknown model, an option);
3 an image, a checkpoint, pretrained weights or a table cannot be read. With `--json` standard output holds JSON alone;
progress and messages go to standard error.
"""

from . import classify, compare, convert, demo, explain, export, info, run, train, tune, verdicts, verify  # noqa: F401
from .app import app

__all__ = ["app"]
