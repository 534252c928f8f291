"""How `auto` comes to use a kernel: candidates are tried on this very machine, and the verdicts kept."""
