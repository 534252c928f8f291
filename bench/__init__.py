"""Measurements of regnet_fast against everything else a user could run: `python -m bench --help`."""
