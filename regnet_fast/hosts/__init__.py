"""Hosts: which of a library's classes is which block."""
