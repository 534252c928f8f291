"""Everything static is in pyproject.toml; this file exists for the parts of the build that need code."""

from setuptools import setup

setup()
