"""Rollouts by stock SGLang servers: their processes, the HTTP client, the weights they are given, the engine."""
