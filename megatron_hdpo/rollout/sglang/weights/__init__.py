"""Weights for SGLang servers: how they are sent, and how it is checked that they arrived.

May import the client (`..`) and `../servers/`. Start reading at `push.py`, then `transports.py` (three ways to send)
and `gate.py` (the checks after each update).
"""
