"""What a network has to move and compute, and what a machine's ceilings leave of it: docs/roofline.md."""
