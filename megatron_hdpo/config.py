"""The recipe: a typed tree read from YAML, with `key.path=value` overrides. Unknown keys are refused.

Each section's class lives beside the code that reads it; this module joins them and checks what only the whole recipe
can tell. All errors of a recipe are reported together, by the path of their key, before any model is loaded.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_hdpo.checkpoint.store import CheckpointConfig
from megatron_hdpo.config_errors import error_lines
from megatron_hdpo.data.load import DataConfig
from megatron_hdpo.data.tasks import TaskConfig
from megatron_hdpo.evaluation.evaluate import EvaluationConfig
from megatron_hdpo.health.config import HealthConfig
from megatron_hdpo.model.architecture import Architecture, ArchitectureError, read_architecture
from megatron_hdpo.model.config import ModelConfig
from megatron_hdpo.model.optimizer import OptimizerConfig
from megatron_hdpo.model.packing import RowLayout
from megatron_hdpo.model.precision import precision_errors, precision_warnings, size_errors
from megatron_hdpo.model.specs import transformer_engine_available
from megatron_hdpo.objectives.registry import ObjectiveConfig
from megatron_hdpo.objectives.settings import Surroundings, surrogate_of
from megatron_hdpo.parallel.layout import LayoutError, ParallelConfig, check_layout
from megatron_hdpo.rewards.pool import RewardConfig
from megatron_hdpo.rollout.config import RolloutConfig
from megatron_hdpo.selftest import SelfTestConfig
from megatron_hdpo.teachers.config import ExternalTeacherConfig, PolicyTeacherConfig, TeacherConfig
from megatron_hdpo.teachers.sizes import check_sizes
from megatron_hdpo.tracking.backends import TrackingConfig
from megatron_hdpo.tracking.profile import ProfileConfig


class RecipeError(ValueError):
    """A recipe that cannot be run; one line per error, each with the path of its key."""


class TrainConfig(BaseModel):
    """The length of the run and the size of its micro-batches."""

    model_config = ConfigDict(extra="forbid")

    steps: int = Field(100, ge=0, description="Rollout steps.")
    updates_per_step: int = Field(1, ge=1, description="Optimizer steps per rollout step, each on a share of it.")
    micro_batch_tokens: int = Field(8192, ge=2, description="Tokens of a packed micro-batch, at most.")
    max_skipped_updates: int = Field(
        3,
        ge=0,
        description="Updates in a row that may be skipped because a gradient is not finite, before the run stops.",
    )


class WarmupConfig(BaseModel):
    """Supervised steps on worked solutions before reinforcement learning, for models too weak to start with."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["none", "sft"] = Field("none", description="sft: supervised fine-tuning; none: no warm-up.")
    steps: int = Field(100, ge=1, description="Optimizer steps.")
    examples_per_step: int = Field(64, ge=1, description="Worked solutions per step.")
    privileged_share: float = Field(0.4, ge=0, le=1, description="Share of them after the privileged prompt.")
    plain: list[TaskConfig] = Field(
        default_factory=list, description="Tasks solved after the student's prompt; default: data.train."
    )
    privileged: list[TaskConfig] = Field(
        default_factory=list, description="Tasks solved after the privileged prompt; default: data.train."
    )
    optimizer: OptimizerConfig = Field(
        default_factory=lambda: OptimizerConfig(lr=1e-5), description="Its own optimizer, dropped afterwards."
    )


class Recipe(BaseModel):
    """Everything that a run is made of."""

    model_config = ConfigDict(extra="forbid")

    output: Path = Field(description="Run folder: metrics, checkpoints, rollouts, logs. An existing one is resumed.")
    seed: int = Field(0, ge=0, description="Seed of data order and sampling.")
    device: Literal["auto", "cuda", "cpu"] = Field("auto", description="Where the model trains.")
    threads_per_rank: int | None = Field(None, ge=1, description="CPU threads of each rank; default: cores / ranks.")
    model: ModelConfig
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    data: DataConfig
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)
    objective: ObjectiveConfig = Field(description="The method, chosen by its name.")
    teacher: TeacherConfig = Field(
        default_factory=lambda: PolicyTeacherConfig(), description="Whose weights score for a distillation objective."
    )
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    warmup: WarmupConfig = Field(default_factory=WarmupConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    profile: ProfileConfig = Field(default_factory=ProfileConfig)
    self_test: SelfTestConfig = Field(default_factory=SelfTestConfig)
    health: HealthConfig = Field(default_factory=HealthConfig)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, after `key.path=value` overrides. Raises RecipeError with every error found."""
    path = Path(path)
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not UTF-8 text: {error}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: {_yaml_problem(error)}") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: must be a mapping of sections, not {type(tree).__name__}")
    tree = _unshared(tree)
    for override in overrides:
        apply_override(tree, override)
    return parse_recipe(tree, str(path))


def parse_recipe(tree: dict[str, Any], origin: str = "recipe") -> Recipe:
    """The typed recipe. Raises RecipeError with one line per wrong or unknown key."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError("\n".join(f"{origin}: {line}" for line in error_lines(error, Recipe))) from error


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one `key.path=value` in a tree of mappings and lists; the value is read as YAML. Raises RecipeError."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise RecipeError(f"override '{override}': write key.path=value")
    node: Any = tree
    *parents, last = path.split(".")
    for depth, key in enumerate(parents):
        if isinstance(node, dict) and node.get(key) is None:
            node[key] = {}
        node = _child(node, key, override, ".".join(parents[: depth + 1]))
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"override '{override}': the value {_yaml_problem(error)}") from error
    if isinstance(node, list):
        _child(node, last, override, path)
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise RecipeError(f"override '{override}': {'.'.join(parents)} is a value, not a section")


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the recipe with every default filled in; reading it back gives the same recipe."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def recipe_changes(path: Path, recipe: Recipe) -> list[str]:
    """`key.path: old -> new` for every value in which a recipe differs from the one that `save_recipe` wrote."""
    if not path.is_file():
        return []
    old, new = dict(_leaves(yaml.safe_load(path.read_text()))), dict(_leaves(recipe.model_dump(mode="json")))
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in {**old, **new} if old.get(key) != new.get(key)]


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if items is None:
        yield path, tree
        return
    for key, value in items:
        yield from _leaves(value, f"{path}.{key}" if path else str(key))


def check_recipe(recipe: Recipe, architecture: Architecture, world_size: int) -> list[str]:
    """Warnings of a recipe that runs but deserves a word. Raises RecipeError, with all reasons, for one that cannot."""
    errors = [*_layout_errors(recipe, architecture, world_size), *length_errors(recipe, architecture)]
    errors += [*_objective_errors(recipe, architecture), *_teacher_errors(recipe, architecture, world_size)]
    errors += [
        *_engine_errors(recipe, architecture),
        *_routing_errors(recipe, architecture),
        *recipe.profile.errors(world_size, recipe.train.steps),
        *_precision_errors(recipe, architecture),
    ]
    if recipe.checkpoint.export and Path(recipe.model.path).resolve() == (recipe.output / "hf").resolve():
        errors.append(f"model.path: {recipe.model.path} is where this run exports to: choose another output")
    if errors:
        raise RecipeError("\n".join(errors))
    return list(_warnings(recipe))


def _child(node: Any, key: str, override: str, path: str) -> Any:
    if isinstance(node, list):
        if not key.isdigit() or int(key) >= len(node):
            has = f"has items 0 to {len(node) - 1}" if node else "is empty"
            raise RecipeError(f"override '{override}': {path}: the list {has}")
        return node[int(key)]
    if isinstance(node, dict):
        return node[key]
    raise RecipeError(f"override '{override}': {path} is below a value, not a section")


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice; PyYAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen and key_node.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key} is given twice", key_node.start_mark
                )
            seen.add(key if isinstance(key, Hashable) else None)
        return super().construct_mapping(node, deep)


def _unshared(node: Any) -> Any:
    """The tree with a copy for every alias (`*name`), so that an override changes the one place that it names."""
    if isinstance(node, dict):
        return {key: _unshared(value) for key, value in node.items()}
    return [_unshared(value) for value in node] if isinstance(node, list) else node


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f"is not YAML: {' '.join(str(error).split())}"
    return f"is not YAML: line {mark.line + 1}, column {mark.column + 1}: {getattr(error, 'problem', None)}"


def _layout_errors(recipe: Recipe, architecture: Architecture, world_size: int) -> Iterator[str]:
    try:
        check_layout(recipe.parallel, architecture.sizes, world_size)
    except LayoutError as error:
        yield f"parallel: {error}"


def max_sequence(recipe: Recipe, architecture: Architecture) -> int:
    """Longest prompt plus response, in tokens."""
    return recipe.model.max_sequence or architecture.max_positions


def length_errors(recipe: Recipe, architecture: Architecture) -> Iterator[str]:
    """Reasons why the recipe's longest sequences fit neither the model nor a micro-batch, each with its key."""
    padded_length = RowLayout(context=recipe.parallel.context).padded
    longest, response = max_sequence(recipe, architecture), recipe.rollout.max_new_tokens
    prompts = recipe.data.prompts
    if longest > architecture.max_positions:
        yield f"model.max_sequence: {longest} is beyond the model's {architecture.max_positions} positions"
    for key, prompt in (
        ("max_prompt_tokens", prompts.max_prompt_tokens),
        ("max_privileged_tokens", prompts.privileged_limit),
    ):
        if prompt + response > longest:
            yield (
                f"data.prompts.{key}: {prompt} + rollout.max_new_tokens {response} exceed the context of {longest} "
                "tokens"
            )
        rows = padded_length(prompt + response)
        if rows > recipe.train.micro_batch_tokens:
            padded = f", padded to {rows} for parallel.context" if rows > prompt + response else ""
            yield (
                f"train.micro_batch_tokens: {recipe.train.micro_batch_tokens} cannot hold one sequence of "
                f"data.prompts.{key} {prompt} + rollout.max_new_tokens {response}{padded}"
            )
    evaluated = recipe.evaluation.max_new_tokens
    if evaluated and prompts.max_prompt_tokens + evaluated > longest:
        yield f"evaluation.max_new_tokens: {evaluated} does not fit the context of {longest} tokens"


def _objective_errors(recipe: Recipe, architecture: Architecture) -> Iterator[str]:
    objective, kind = recipe.objective, recipe.teacher.kind
    if not objective.teachers and kind != "policy":
        yield f"teacher.kind: {kind}, but objective {objective.name} has no teacher"
    if objective.teachers and kind not in objective.teachers:
        yield f"teacher.kind: {kind}, but objective {objective.name} learns from {' or '.join(objective.teachers)}"
    around = Surroundings(
        architecture.vocab_size,
        kind,
        recipe.rollout.temperature,
        recipe.train.updates_per_step,
        recipe.rollout.samples_per_prompt,
    )
    yield from (f"objective.{line}" for line in objective.errors(around))
    if missing := objective.hint_shows - recipe.data.prompts.hint_shows:
        names = " and ".join(sorted(missing))
        yield f"data.prompts.hint: the template does not use {names}, which {objective.name} shows to its teacher"


def _teacher_errors(recipe: Recipe, architecture: Architecture, world_size: int) -> Iterator[str]:
    teacher = recipe.teacher
    if not isinstance(teacher, ExternalTeacherConfig):
        return
    try:
        other = read_architecture(teacher.path)
    except ArchitectureError as error:
        yield f"teacher.path: {str(error).replace('model.path', 'it')}"
        return
    yield from (line.replace("parallel:", "teacher.path:") for line in _layout_errors(recipe, other, world_size))
    yield from check_sizes(other, architecture, teacher.path)
    yield from (line.replace("model.fp8", "teacher.path") for line in size_errors(recipe.model, recipe.parallel, other))
    longest = max_sequence(recipe, architecture)
    if other.max_positions < longest:
        yield f"teacher.path: {teacher.path} has {other.max_positions} positions, sequences may have {longest} tokens"


def _engine_errors(recipe: Recipe, architecture: Architecture) -> Iterator[str]:
    rollout = recipe.rollout
    if rollout.engine == "embedded":
        for key in ("ahead", "stop_at_reward"):
            if getattr(rollout, key) not in (0, None):
                yield f"rollout.{key}: needs rollout.engine=sglang, whose servers sample while the trainer works"
        return
    device = resolved_device(recipe.device)
    sglang = rollout.sglang
    try:
        sglang.servers.check(device)
    except ValueError as error:
        yield f"rollout.sglang.servers: {error}"
    if sglang.placement != "given":
        yield from _server_errors(recipe, architecture, device)
    if rollout.ahead and getattr(recipe.objective, "logits_from", "trainer") == "rollout":
        yield (
            "objective.logits_from: with rollout.ahead=1 the engine's log-probs are of weights one step old, not of "
            "the teacher; set objective.logits_from=trainer"
        )
    if rollout.ahead and sglang.placement == "colocated" and device == "cuda":
        yield "rollout.ahead: colocated servers share the GPUs with the trainer, so they cannot sample while it trains"
    if sglang.servers.memory_saver and sglang.placement != "colocated":
        yield "rollout.sglang.servers.memory_saver: only colocated servers have memory to give back to the trainer"


def _routing_errors(recipe: Recipe, architecture: Architecture) -> Iterator[str]:
    if recipe.rollout.routing_replay and not architecture.num_experts:
        yield f"rollout.routing_replay: {recipe.model.path} has no experts to choose from; leave it out"
    if recipe.rollout.routing_replay and recipe.rollout.ahead and recipe.rollout.swap == "mid_generation":
        yield (
            "rollout.routing_replay: with swap=mid_generation a server would tell the experts of the new weights for "
            "tokens that the old ones sampled: use swap=after_batch"
        )


def _precision_errors(recipe: Recipe, architecture: Architecture) -> Iterator[str]:
    yield from precision_errors(recipe.model, recipe.parallel, architecture)
    for key, optimizer in (("optimizer", recipe.optimizer), ("warmup.optimizer", recipe.warmup.optimizer)):
        if not optimizer.offload:
            continue
        if resolved_device(recipe.device) == "cpu":
            yield f"{key}.offload: on a CPU the optimizer is in host memory already: leave it out"
        elif recipe.model.dtype != "bfloat16":
            yield f"{key}.offload: Megatron offloads for model.dtype=bfloat16 alone, not {recipe.model.dtype}"
        elif not transformer_engine_available():
            yield f"{key}.offload: Megatron's precision-aware optimizer, which it takes, needs Transformer Engine"


def _server_errors(recipe: Recipe, architecture: Architecture, device: str) -> Iterator[str]:
    """Of servers that the run starts."""
    servers, prompts = recipe.rollout.sglang.servers, recipe.data.prompts
    prompt = max(prompts.max_prompt_tokens, prompts.privileged_limit)
    context, response = servers.context_length, recipe.rollout.max_new_tokens
    if context is not None and prompt + response > context:
        yield (
            f"rollout.sglang.servers.context_length: {context} cannot hold a prompt of {prompt} tokens (data.prompts) "
            f"and rollout.max_new_tokens {response}"
        )
    if device == "cpu" and recipe.rollout.routing_replay:
        yield "rollout.routing_replay: on a CPU SGLang cannot tell experts, it notes them in memory that CUDA pins"
    if device == "cpu" and architecture.num_kv_heads % servers.tensor_parallel:
        yield (
            f"rollout.sglang.servers.tensor_parallel: {servers.tensor_parallel} ranks do not divide the model's "
            f"{architecture.num_kv_heads} key-value heads, which SGLang would pad on a CPU"
        )


def resolved_device(device: str) -> str:
    """cuda or cpu, for `auto` what is there."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _warnings(recipe: Recipe) -> Iterator[str]:
    yield from precision_warnings(recipe.model)
    surrogate = surrogate_of(recipe.objective)
    if recipe.rollout.filtered and surrogate is not None and surrogate.importance_cap is None:
        yield (
            "rollout.top_p/top_k truncate the distribution, log-probs are those of the whole: importance ratios are "
            f"biased; objective.surrogate.importance_cap={DEFAULT_IMPORTANCE_CAP} is used"
        )
    if recipe.model.fp8 is not None and surrogate is not None and surrogate.importance_cap is None:
        yield (
            "model.fp8: the engine samples in its own precision, and without objective.surrogate.importance_cap "
            "nothing corrects for the difference; watch train/mismatch_k3"
        )
    servers = recipe.rollout.sglang
    if (
        recipe.rollout.engine == "sglang"
        and servers.placement != "given"
        and servers.servers.dtype != recipe.model.dtype
    ):
        yield (
            f"rollout.sglang.servers.dtype is {servers.servers.dtype}, model.dtype {recipe.model.dtype}: weights are "
            "rounded on their way to the servers, and log-probs of engine and trainer differ by as much"
        )
    if recipe.rollout.ahead and surrogate is not None and surrogate.importance_cap is None:
        yield (
            "rollout.ahead: rollouts are one step old, which importance weights correct for; "
            f"objective.surrogate.importance_cap={DEFAULT_IMPORTANCE_CAP} is used"
        )
    if recipe.rollout.stop_at_reward is not None:
        yield (
            "rollout.stop_at_reward: a prompt ends at its first right rollout, so the surrogate sees short responses "
            "more often than long ones; meant for objectives that learn from cliffs alone"
        )
    if recipe.rollout.samples_per_prompt == 1:
        yield "rollout.samples_per_prompt=1: a group of one has advantage 0, so the surrogate learns nothing"


DEFAULT_IMPORTANCE_CAP = 2.0
