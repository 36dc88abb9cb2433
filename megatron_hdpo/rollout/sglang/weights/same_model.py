"""Check that a given server serves the model that is trained.

Weights of other shapes crash a server, and layers that it does not have are silently dropped, so this is checked before
any weight is sent. Shapes are read from the server's model folder; where that folder cannot be seen from here, the
names of the parameters at least show family, layers and head.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from megatron_hdpo.model.architecture import Architecture, ArchitectureError, read_architecture
from megatron_hdpo.rollout.sglang.engine import SGLangEngine
from megatron_hdpo.rollout.sglang.replica import Replica
from megatron_hdpo.rollout.sglang.weights.gate import derived
from megatron_hdpo.rollout.sglang.weights.served_parameters import part_of
from megatron_hdpo.weights.mapping import tensors

MAY_DIFFER = {"max_positions"}


def check_served_models(engine: SGLangEngine, architecture: Architecture) -> None:
    """Check the servers that this process did not start.

    Raises ValueError when one serves another model, ApiError when one does not answer.
    """
    for replica in engine.replicas:
        if replica.own is not None:
            continue
        # After an update from disk the server reports that folder as its model's, and it may be deleted.
        folders = (Path(path) for path in (replica.info.model_path, replica.info.tokenizer_path))
        folder = next((folder for folder in folders if (folder / "config.json").is_file()), None)
        problem = _other_sizes(folder, architecture) if folder else _other_names(engine, replica, architecture)
        if problem:
            raise ValueError(
                f"{replica.url} serves another model ({replica.info.model_path}) than model.path: {problem}"
            )


def _other_sizes(folder: Path, ours: Architecture) -> str:
    try:
        theirs = asdict(read_architecture(folder))
    except ArchitectureError as error:
        return str(error)
    wrong = {key: value for key, value in asdict(ours).items() if theirs[key] != value and key not in MAY_DIFFER}
    return ", ".join(f"{key} {theirs[key]}, not {value}" for key, value in wrong.items())


def _other_names(engine: SGLangEngine, replica: Replica, ours: Architecture) -> str:
    ranks = engine.thread.run(replica.api.checksums(engine.config.sync.timeout_s))
    served = {name for name in ranks[0]["checksums"] if not derived(name)}
    wanted = {part_of(tensor.name).name for tensor in tensors(ours)}
    missing, unknown = sorted(wanted - served), sorted(served - wanted)
    parts = [f"it has no {missing[0]} (of {len(missing)})"] if missing else []
    return ", ".join(parts + ([f"it has {unknown[0]} (of {len(unknown)})"] if unknown else []))
