"""A module beside a script, which the script imports by its bare name."""

HERE = __file__
