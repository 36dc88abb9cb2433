"""What a run will take before it is started: memory by kind, time by arithmetic, memory traffic and communication.

Pure functions of an architecture, a cluster, a layout and a workload. Only what the trainer runs today is planned;
everything else is refused with a PlanError.
"""
