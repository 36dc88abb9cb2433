"""Construction of a recipe's teacher."""

from __future__ import annotations

from megatron_hdpo.model.config import ModelConfig
from megatron_hdpo.model.policy import Policy
from megatron_hdpo.teachers.config import (
    EmaTeacherConfig,
    ExternalTeacherConfig,
    PolicyTeacherConfig,
    SnapshotTeacherConfig,
    TeacherConfig,
)
from megatron_hdpo.teachers.external import ExternalTeacher
from megatron_hdpo.teachers.teacher import PolicyTeacher, Teacher
from megatron_hdpo.teachers.weight_copies import EmaTeacher, FrozenTeacher, SnapshotTeacher


def build_teacher(config: TeacherConfig, policy: Policy, model: ModelConfig) -> Teacher:
    """Build the teacher from the policy's current weights (an external teacher from its own checkpoint).

    Raises ModelError, ArchitectureError, LayoutError or WeightsError when an external checkpoint does not fit.
    """
    if isinstance(config, PolicyTeacherConfig):
        return PolicyTeacher(policy)
    if isinstance(config, SnapshotTeacherConfig):
        return SnapshotTeacher(policy, config)
    if isinstance(config, EmaTeacherConfig):
        return EmaTeacher(policy, config)
    if isinstance(config, ExternalTeacherConfig):
        return ExternalTeacher(config.path, policy, model)
    return FrozenTeacher(policy)
