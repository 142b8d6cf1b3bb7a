"""Builds code objects with the PyPI package `ziglang`. Needed to build, never to run; imports nothing but the tables."""
