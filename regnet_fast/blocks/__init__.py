"""Blocks: forms over units, and the mixin that runs them in a host's place."""
