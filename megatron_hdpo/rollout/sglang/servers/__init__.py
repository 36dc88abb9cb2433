"""SGLang server processes: settings, command line, start, restart and stop, and which rank owns which server.

May import parallel and the recipe section of the folder above, never the client or `../weights/`. Start reading at
`server.py` (one process), then `fleet.py` (all servers of a process).
"""
