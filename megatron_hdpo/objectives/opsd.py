"""OPSD: on-policy self-distillation from the model that has read the reference solution.

arXiv 2601.18734: the student samples from the bare problem, the teacher scores those tokens after the privileged
prompt, and L = (1/N) sum_t D(teacher, q) over all of them, whether the rollout was right or wrong. The defaults are
those of its later revision, as reported with arXiv 2606.11709: forward KL, each vocabulary entry's summand clipped at
0.05, top 100 of the teacher and one bucket for the rest. With the clip the loss may be negative; its minimum is not at
q = teacher. "Fixed" means `teacher.kind: frozen`, a copy of the weights.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from megatron_hdpo.objectives.distillation import Distillation, StudentDistillationConfig
from megatron_hdpo.objectives.settings import FROZEN, TeacherSection
from megatron_hdpo.types.learning import DivergenceConfig
from megatron_hdpo.types.rollouts import Group


class OPSDConfig(StudentDistillationConfig):
    """On-policy self-distillation."""

    privileged_prompts: ClassVar[bool] = True
    default_teacher: ClassVar[TeacherSection | None] = FROZEN

    name: Literal["opsd"] = "opsd"
    distill: DivergenceConfig = Field(
        default_factory=lambda: DivergenceConfig(
            coefficient=1.0, kind="forward_kl", tail="bucket", top_k=100, clip=0.05
        ),
        description="The divergence and its weight.",
    )


class OPSD(Distillation):
    """Distillation from a teacher that reads the privileged prompt."""

    def teacher_context(self, group: Group, index: int) -> np.ndarray:
        """Return the prompt that shows the ground truth, int32 [P]."""
        return self.prompts.privileged_prompt(group.problem)
