"""Rollouts on stock SGLang servers.

This folder is the client: `engine.py` (start here) sends one HTTP request per sample through `api.py`; `parsers.py` has
the answers read (`reading.py`) and checked (`answers.py`); `watch.py` checks the servers' health. `servers/` runs
server processes, `weights/` sends weights to them. `servers/` imports nothing of the client; the client does not import
`weights/`.
"""
