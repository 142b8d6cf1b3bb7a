"""Builds code objects with the PyPI package `ziglang`: needed to build, never to run."""
