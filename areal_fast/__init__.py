"""areal_fast: the process between RL agents and an inference server."""

__version__ = "0.1.0"
