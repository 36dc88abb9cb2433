"""Models of the Hugging Face hub: `model.path: org/name` or `org/name@revision` in place of a folder.

`megatron_hdpo prepare` downloads them. Every other command takes the snapshot that is on this machine, without asking
the hub. HF_HOME and HF_HUB_CACHE say where snapshots lie, as for every tool of Hugging Face.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from megatron_hdpo.config.recipe import Recipe
from megatron_hdpo.teachers.config import ExternalTeacherConfig
from megatron_hdpo.types.errors import UserError

_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?")
_WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken")
"""Files of a repository that are read: config, weights and tokenizer, not the weights again in other formats."""


class HubError(UserError, RuntimeError):
    """A model that cannot be downloaded; the text says which, why, and what to do."""


@dataclass(frozen=True)
class HubModel:
    """A repository of the hub at a revision; None is its main branch."""

    repository: str
    revision: str | None = None

    @classmethod
    def named(cls, path: str) -> HubModel | None:
        """Return the model that `path` may name; None for a folder, and for what cannot be a name."""
        match = _NAME.fullmatch(path)
        return cls(*match.groups()) if match and not Path(path).exists() else None

    def snapshot(self) -> Path | None:
        """Return the folder of the snapshot on this machine, None without one. Asks no network."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repository, "config.json", revision=self.revision)
        return Path(found).parent if isinstance(found, str) else None

    def download(self) -> Path:
        """Return the folder of the snapshot, after download of what it lacks. Raises HubError."""
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(self.repository, revision=self.revision, allow_patterns=list(_WANTED)))
        except Exception as error:  # the hub's own errors, those of its HTTP client and of the operating system
            reason = " ".join(str(error).split())
            raise HubError(
                f"{self.repository} cannot be downloaded: {type(error).__name__}: {reason[:300]}; check its name, the "
                "network, HF_HUB_OFFLINE, and for gated models HF_TOKEN"
            ) from error


def model_paths(recipe: Recipe) -> dict[str, str]:
    """Return the paths of the recipe's models by the key that holds each."""
    teacher = {"teacher.path": recipe.teacher.path} if isinstance(recipe.teacher, ExternalTeacherConfig) else {}
    return {"model.path": recipe.model.path, **teacher}


def with_snapshots(recipe: Recipe) -> Recipe:
    """Return the recipe with the folder of its snapshot for each hub model that is on this machine.

    So a run's recipe.yaml names the very revision that it used.
    """
    folders = {
        key.partition(".")[0]: str(snapshot)
        for key, path in model_paths(recipe).items()
        if (model := HubModel.named(path)) is not None and (snapshot := model.snapshot()) is not None
    }
    sections = {section: getattr(recipe, section).model_copy(update={"path": f}) for section, f in folders.items()}
    return recipe.model_copy(update=sections)
