"""`python -m regnet_fast`: the command line, also for `torchrun -m regnet_fast train ...`."""

from .cli import app

if __name__ == "__main__":
    app(prog_name="regnet-fast")
