"""A teacher with a model of its own: another checkpoint of the same vocabulary, on the same layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_hdpo.model.architecture import read_architecture
from megatron_hdpo.model.build import build_model
from megatron_hdpo.model.config import ModelConfig, ModelError
from megatron_hdpo.model.policy import Policy
from megatron_hdpo.teachers.sizes import check_sizes
from megatron_hdpo.teachers.teacher import TeacherState
from megatron_hdpo.weights.host import HostWeights, copy_to_host
from megatron_hdpo.weights.load import load_hf


class ExternalTeacher:
    """The checkpoint at `path`, for a policy of the same vocabulary; `model` is the recipe's model section.

    On a GPU run its weights are on the GPU only while it scores, otherwise in host memory. Raises ModelError when the
    sizes of teacher and policy do not fit.
    """

    kind = "external"
    follows_updates = False

    def __init__(self, path: str | Path, policy: Policy, model: ModelConfig) -> None:
        architecture = read_architecture(path)
        for line in check_sizes(architecture, policy.architecture, str(path)):
            raise ModelError(line)
        own = build_model(architecture, policy.context, model.model_copy(update={"path": str(path)}))
        load_hf(own, architecture, policy.context, path)
        policy.context.barrier("weights of the teacher read")
        own.requires_grad_(False)
        self.policy = Policy(
            architecture,
            policy.context,
            own,
            policy.micro_batch_tokens,
            head_chunk=policy.head_chunk,
            vocab_size=policy.vocab_size,
        )
        self.on_device = policy.context.device.type == "cuda"
        self.host_weights: HostWeights = copy_to_host(own) if self.on_device else {}
        self._move_to_host()

    @contextmanager
    def scorer(self) -> Iterator[Policy]:
        """Yield the teacher's own model, which stays on the device until the context ends."""
        if self.on_device:
            device = self.policy.context.device
            for name, parameter in self.policy.model.named_parameters():
                parameter.data = self.host_weights[name].to(device, non_blocking=True)
        try:
            yield self.policy
        finally:
            self._move_to_host()

    def _move_to_host(self) -> None:
        if self.on_device:
            for name, parameter in self.policy.model.named_parameters():
                parameter.data = self.host_weights[name]

    def after_update(self) -> None:
        """Do nothing: the weights never change."""

    def after_step(self) -> None:
        """Do nothing: the weights never change."""

    def state_dict(self) -> TeacherState:
        """Return an empty state: the weights are read from the teacher's own checkpoint."""
        return TeacherState()

    def load_state_dict(self, values: Mapping[str, Any], weights: HostWeights | None) -> None:
        """Do nothing: there is no state."""


def check_same_vocabulary(teacher: Mapping[str, int], student: Mapping[str, int], path: str) -> None:
    """Raise ModelError, with a token as example, unless both tokenizers give every token the same id."""
    if teacher == student:
        return
    token = min((t for t in teacher.keys() | student.keys() if teacher.get(t) != student.get(t)), key=_by_id(student))
    raise ModelError(
        f"teacher.path: the tokenizer of {path} is not the model's: token {token!r} has id {teacher.get(token)} there "
        f"and {student.get(token)} here. Distillation token by token needs one vocabulary"
    )


def _by_id(ids: Mapping[str, int]) -> Any:
    return lambda token: (ids.get(token, len(ids)), token)
