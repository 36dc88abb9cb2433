"""Checks across the sections of a recipe, before any weight is read.

`check_sections` compares sections with each other and needs no model. `check_recipe` adds the model's shape and the
number of ranks. Both report all reasons at once, each with the path of its key. Importing this module imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

from megatron_hdpo.config.packages import package_errors, package_warnings
from megatron_hdpo.config.recipe import Recipe, RecipeError
from megatron_hdpo.model.architecture import Architecture, ArchitectureError, read_architecture
from megatron_hdpo.model.config import transformer_engine_available
from megatron_hdpo.model.fp8_rules import precision_errors, precision_warnings, size_errors
from megatron_hdpo.objectives.settings import RecipeContext, surrogate_of
from megatron_hdpo.parallel.layout import LayoutError, check_layout
from megatron_hdpo.rewards.functions import HttpService
from megatron_hdpo.rollout.sglang.servers.arguments import expert_parallel, speculates
from megatron_hdpo.rollout.sglang.servers.command import CPU_CACHE_TOKENS
from megatron_hdpo.rollout.sglang.servers.config import REQUANTISED, SERVER_KEEPS_FREE
from megatron_hdpo.teachers.config import ExternalTeacherConfig
from megatron_hdpo.teachers.sizes import check_sizes
from megatron_hdpo.tracking.metrics import check_name

DEFAULT_IMPORTANCE_CAP = 2.0
_PHASES_OF_SERVERS = ("start engine", "sync", "self-test", "rollout", "rollouts ahead", "evaluate", "sample")
"""Phases in which a rank may wait for an answer of a server and show no progress."""


def check_sections(recipe: Recipe, elsewhere: bool = False) -> None:
    """Raise RecipeError, with all reasons, when sections of the recipe contradict each other.

    Reads no file and imports no torch: a command calls it before anything slow. elsewhere: as for `check_recipe`.
    """
    _raise_for(
        [
            *_objective_errors(recipe),
            *_engine_errors(recipe),
            *_patience_errors(recipe),
            *_export_errors(recipe),
            *_path_errors(recipe),
            *_name_errors(recipe),
            *package_errors(recipe, elsewhere),
        ]
    )


def check_recipe(recipe: Recipe, architecture: Architecture, world_size: int, elsewhere: bool = False) -> list[str]:
    """Return the warnings for a recipe that can run.

    recipe: without dtype=auto (`config.precision.resolve`). elsewhere: another machine will run it, which may have the
    Transformer Engine and the trackers that this one lacks. Raises RecipeError, with all reasons (those of
    `check_sections` too), for a recipe that cannot run.
    """
    _raise_for(
        [
            *_layout_errors(recipe, architecture, world_size),
            *length_errors(recipe, architecture),
            *_objective_errors(recipe),
            *_method_errors(recipe, architecture),
            *_teacher_errors(recipe, architecture, world_size),
            *_engine_errors(recipe),
            *_patience_errors(recipe),
            *_server_errors(recipe, architecture),
            *_routing_errors(recipe, architecture),
            *recipe.profile.errors(world_size, recipe.train.steps),
            *_precision_errors(recipe, architecture, elsewhere),
            *_export_errors(recipe),
            *_path_errors(recipe),
            *_name_errors(recipe),
            *package_errors(recipe, elsewhere),
        ]
    )
    return list(_warnings(recipe))


def _raise_for(errors: Sequence[str]) -> None:
    if errors:
        raise RecipeError("\n".join(errors))


def _export_errors(recipe: Recipe) -> Iterator[str]:
    if recipe.checkpoint.export and Path(recipe.model.path).resolve() == (recipe.output / "hf").resolve():
        yield f"model.path: {recipe.model.path} is where this run exports to: choose another output"


def _path_errors(recipe: Recipe) -> Iterator[str]:
    if recipe.output.exists() and not recipe.output.is_dir():
        yield f"output: {recipe.output} is a file: name a folder"
    replay = recipe.rollout.replay
    if replay is not None and not replay.is_dir():
        yield f"rollout.replay: there is no folder {replay}: name the rollouts folder of a run"


def _name_errors(recipe: Recipe) -> Iterator[str]:
    """Yield the tasks whose names no metric can have; a run would find that after its first evaluation."""
    for index, task in enumerate(recipe.data.evaluation):
        try:
            check_name(f"eval/{task.task_name}/pass@1")
        except ValueError:
            yield (
                f"data.evaluation.{index}.name: {task.task_name!r} cannot be part of a metric's name: give a `name` of "
                "letters, digits and . _ -"
            )
    names = [task.task_name for task in recipe.data.evaluation]
    for name in sorted(recipe.evaluation.task_samples.keys() - set(names)):
        yield (
            f"evaluation.task_samples.{name}: data.evaluation has no task of this name (it has: "
            f"{', '.join(names) or 'none'})"
        )


def _layout_errors(recipe: Recipe, architecture: Architecture, world_size: int) -> Iterator[str]:
    try:
        check_layout(recipe.parallel, architecture.sizes, world_size)
    except LayoutError as error:
        yield f"parallel: {error}"


def max_sequence(recipe: Recipe, architecture: Architecture) -> int:
    """Return the longest prompt plus response, in tokens."""
    return recipe.model.max_sequence or architecture.max_positions


def length_errors(recipe: Recipe, architecture: Architecture) -> Iterator[str]:
    """Yield the reasons why the longest sequences do not fit the model or a micro-batch, each with its key."""
    from megatron_hdpo.model.packing import RowLayout  # imports torch

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


def requested_lengths(recipe: Recipe) -> dict[str, int]:
    """Return the tokens of the longest prompts plus responses that an engine is asked for, by the words for them."""
    prompts, response = recipe.data.prompts, recipe.rollout.max_new_tokens
    pairs = [
        ("data.prompts.max_prompt_tokens", prompts.max_prompt_tokens, "rollout.max_new_tokens", response),
        ("data.prompts.max_privileged_tokens", prompts.privileged_limit, "rollout.max_new_tokens", response),
    ]
    if evaluated := recipe.evaluation.max_new_tokens:
        pairs.append(
            ("data.prompts.max_prompt_tokens", prompts.max_prompt_tokens, "evaluation.max_new_tokens", evaluated)
        )
    return {f"{key} {prompt} + {name} {new}": prompt + new for key, prompt, name, new in pairs}


def _objective_errors(recipe: Recipe) -> Iterator[str]:
    objective, kind = recipe.objective, recipe.teacher.kind
    if not objective.teachers and kind != "policy":
        yield f"teacher.kind: {kind}, but objective {objective.name} has no teacher"
    if objective.teachers and "teacher" not in recipe.model_fields_set:  # the method has no default either
        yield f"teacher: objective {objective.name} needs one: set teacher.kind to {' or '.join(objective.teachers)}"
    elif objective.teachers and kind not in objective.teachers:
        yield f"teacher.kind: {kind}, but objective {objective.name} learns from {' or '.join(objective.teachers)}"
    if missing := objective.hint_shows - recipe.data.prompts.hint_shows:
        names = " and ".join(sorted(missing))
        yield f"data.prompts.hint: the template does not use {names}, which {objective.name} shows to its teacher"
    makes_none = not objective.needs_privileged and not objective.hint_shows and recipe.warmup.kind == "none"
    if recipe.data.prompts.privileged_chat_template_kwargs and makes_none:
        yield (
            f"data.prompts.privileged_chat_template_kwargs: objective {objective.name} makes no privileged prompt; "
            "leave it out"
        )


def _method_errors(recipe: Recipe, architecture: Architecture) -> Iterator[str]:
    """Yield what the objective itself finds wrong; its divergence may depend on the vocabulary's size."""
    context = RecipeContext(
        architecture.vocab_size,
        recipe.teacher.kind,
        recipe.rollout.temperature,
        recipe.train.updates_per_step,
        recipe.rollout.samples_per_prompt,
    )
    yield from (f"objective.{line}" for line in recipe.objective.errors(context))


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


def _patience_errors(recipe: Recipe) -> Iterator[str]:
    """Yield the deadlines of servers that are longer than the one of a rank that waits for them without progress."""
    sglang, parallel = recipe.rollout.sglang, recipe.parallel
    patience = {"silence_minutes": parallel.silence_minutes}
    patience |= {f"phase_minutes.{p}": m for p, m in parallel.phase_minutes.items() if p in _PHASES_OF_SERVERS}
    deadlines = {"request_timeout_s": sglang.request_timeout_s, "sync.timeout_s": sglang.sync.timeout_s}
    if sglang.placement != "given":
        deadlines["servers.start_timeout_s"] = sglang.servers.start_timeout_s
    for (key, seconds), (waits, minutes) in product(deadlines.items(), patience.items()):
        if recipe.rollout.engine == "sglang" and seconds >= 60 * minutes:
            yield _impatient(waits, minutes, f"rollout.sglang.{key}", seconds)
    for index, function in enumerate(recipe.reward.functions or ()):
        for waits, minutes in patience.items():
            if isinstance(function, HttpService) and function.deadline_s >= 60 * minutes:
                yield _impatient(waits, minutes, f"reward.functions.{index}.deadline_s", function.deadline_s)


def _impatient(waits: str, minutes: float, key: str, seconds: float) -> str:
    return (
        f"parallel.{waits}: {minutes:g} is no longer than {key}={seconds:g} s, which a rank may wait without progress: "
        "raise it"
    )


def _engine_errors(recipe: Recipe) -> Iterator[str]:
    rollout = recipe.rollout
    if recipe.parallel.virtual_stages > 1 and recipe.parallel.pipeline == 1:
        yield "parallel.virtual_stages: only the stages of a pipeline can be cut into parts: set parallel.pipeline > 1"
    if rollout.engine == "embedded":
        words, longest = max(requested_lengths(recipe).items(), key=lambda item: item[1])
        if longest > (room := rollout.embedded.max_batch_tokens):
            yield f"rollout.embedded.max_batch_tokens: {room} cannot hold one sequence of {words}"
        for key in ("ahead", "stop_at_reward"):
            if getattr(rollout, key) not in (0, None):
                yield f"rollout.{key}: needs rollout.engine=sglang, whose servers sample while the trainer works"
        return
    sglang = rollout.sglang
    if rollout.ahead and getattr(recipe.objective, "logits_from", "trainer") == "rollout":
        yield (
            f"objective.logits_from: with rollout.ahead={rollout.ahead} the engine's log-probs are of older weights, "
            "not of the teacher; set objective.logits_from=trainer"
        )
    if sglang.servers.memory_saver and sglang.placement != "colocated":
        yield "rollout.sglang.servers.memory_saver: only colocated servers have memory to give back to the trainer"
    if rollout.routing_replay and rollout.ahead and rollout.swap == "mid_generation":
        yield (
            "rollout.routing_replay: with swap=mid_generation expert choices would come from the new weights while the "
            "tokens came from the old ones: use swap=after_batch"
        )


def _routing_errors(recipe: Recipe, architecture: Architecture) -> Iterator[str]:
    if recipe.rollout.routing_replay and not architecture.num_experts:
        yield f"rollout.routing_replay: {recipe.model.path} has no experts; leave it out"


def _precision_errors(recipe: Recipe, architecture: Architecture, elsewhere: bool) -> Iterator[str]:
    yield from precision_errors(recipe.model, recipe.parallel, architecture)
    for key, optimizer in (("optimizer", recipe.optimizer), ("warmup.optimizer", recipe.warmup.optimizer)):
        if not optimizer.offload:
            continue
        if resolved_device(recipe.device) == "cpu":
            yield f"{key}.offload: on a CPU the optimizer is in host memory already: leave it out"
        elif recipe.model.dtype == "float32":
            yield f"{key}.offload: Megatron offloads only with model.dtype=bfloat16, not float32"
        elif not (elsewhere or transformer_engine_available()):
            yield f"{key}.offload: it uses Megatron's precision-aware optimizer, which needs Transformer Engine"


def _server_errors(recipe: Recipe, architecture: Architecture) -> Iterator[str]:
    """Yield the reasons why the SGLang servers cannot run on this device."""
    if recipe.rollout.engine == "embedded":
        return
    device, sglang = resolved_device(recipe.device), recipe.rollout.sglang
    try:
        sglang.servers.check(device)
    except ValueError as error:
        yield f"rollout.sglang.servers: {error}"
    if sglang.placement != "given":
        yield from _started_server_errors(recipe, architecture, device)
    if sglang.trainer_memory != "keep":
        if device == "cuda" and not sglang.servers.memory_saver:
            yield (
                f"rollout.sglang.trainer_memory={sglang.trainer_memory}: servers never release what the trainer makes "
                "room for; set rollout.sglang.servers.memory_saver=true"
            )
        if recipe.rollout.ahead:
            yield (
                f"rollout.sglang.trainer_memory={sglang.trainer_memory}: with rollout.ahead servers sample while the "
                "trainer works, and nothing can leave"
            )
    if recipe.rollout.ahead and sglang.placement == "colocated" and device == "cuda":
        yield "rollout.ahead: colocated servers share the GPUs with the trainer, so they cannot sample while it trains"


def _started_server_errors(recipe: Recipe, architecture: Architecture, device: str) -> Iterator[str]:
    """Yield the reasons why servers that the run starts cannot serve the recipe."""
    servers = recipe.rollout.sglang.servers
    words, longest = max(requested_lengths(recipe).items(), key=lambda item: item[1])
    rooms = {
        "context_length": servers.context_length or architecture.max_positions,
        "max_total_tokens": servers.max_total_tokens or (CPU_CACHE_TOKENS if device == "cpu" else None),
    }
    for key, room in rooms.items():
        if room is not None and longest > room - SERVER_KEEPS_FREE:
            yield (
                f"rollout.sglang.servers.{key}: {room} cannot hold {words}, together {longest} tokens: SGLang keeps "
                f"{SERVER_KEEPS_FREE} tokens free and would cut a response short; lower one of them"
            )
    if servers.quantization is not None and architecture.family not in REQUANTISED:
        yield (
            f"rollout.sglang.servers.quantization: SGLang takes new weights of quantised layers for "
            f"{' and '.join(REQUANTISED)} only, not for {architecture.family}: leave it out"
        )
    groups = expert_parallel(servers.extra_args)
    if groups > 1 and not architecture.num_experts:
        yield f"rollout.sglang.servers.extra_args: ep-size={groups}, but {recipe.model.path} has no experts"
    elif architecture.num_experts % groups:
        yield (
            f"rollout.sglang.servers.extra_args: ep-size={groups} does not divide the model's "
            f"{architecture.num_experts} experts"
        )
    if servers.tensor_parallel % groups:
        yield (
            f"rollout.sglang.servers.extra_args: ep-size={groups} does not divide tensor_parallel="
            f"{servers.tensor_parallel}, the ranks of a server"
        )
    if recipe.rollout.routing_replay and speculates(servers.extra_args):
        yield (
            "rollout.routing_replay: SGLang does not record the experts of tokens that it decodes speculatively; take "
            "speculative-algorithm out of rollout.sglang.servers.extra_args"
        )
    if device == "cpu" and recipe.rollout.routing_replay:
        yield (
            "rollout.routing_replay: SGLang cannot return routed experts on a CPU (it needs CUDA pinned memory); set "
            "rollout.routing_replay=false"
        )
    if device == "cpu" and architecture.num_kv_heads % servers.tensor_parallel:
        yield (
            f"rollout.sglang.servers.tensor_parallel: {servers.tensor_parallel} ranks do not divide the model's "
            f"{architecture.num_kv_heads} key-value heads, which SGLang would pad on a CPU"
        )


def resolved_device(device: str) -> str:
    """Return cuda or cpu; for `auto`, cuda where torch finds a GPU."""
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _warnings(recipe: Recipe) -> Iterator[str]:
    yield from package_warnings(recipe)
    yield from precision_warnings(recipe.model)
    surrogate = surrogate_of(recipe.objective)
    if recipe.rollout.filtered and surrogate is not None and surrogate.importance_cap is None:
        yield (
            "rollout.top_p/top_k truncate the distribution, log-probs are those of the whole: importance ratios are "
            f"biased, by the mass that was kept; objective.surrogate.importance_cap={DEFAULT_IMPORTANCE_CAP} is used"
        )
    yield from _hint_warnings(recipe)
    servers = recipe.rollout.sglang
    quantised = recipe.rollout.engine == "sglang" and servers.placement != "given" and servers.servers.quantization
    if quantised:
        yield (
            "rollout.sglang.servers.quantization: nobody has seen it on a GPU yet, and the check after a weight sync "
            "does not compare quantised weights; watch train/mismatch_k3"
        )
    if recipe.rollout.engine == "sglang" and servers.placement != "given" and speculates(servers.servers.extra_args):
        yield (
            "rollout.sglang.servers.extra_args: nobody has seen speculative decoding on a GPU yet; by SGLang's sources "
            "it leaves the distribution and the log-probs those of the model; watch train/mismatch_k3"
        )
    rounding = [f"model.{key}" for key in ("fp8", "fp8_emulation") if getattr(recipe.model, key) is not None]
    rounding += ["rollout.sglang.servers.quantization"] if quantised else []
    if rounding and surrogate is not None and surrogate.importance_cap is None:
        yield (
            f"{rounding[0]}: trainer and engine round differently, and without objective.surrogate.importance_cap "
            "nothing corrects for the difference; watch train/mismatch_k3"
        )
    if (
        recipe.rollout.engine == "sglang"
        and servers.placement != "given"
        and servers.servers.dtype not in ("auto", recipe.model.dtype)
    ):
        yield (
            f"rollout.sglang.servers.dtype is {servers.servers.dtype}, model.dtype {recipe.model.dtype}: weights are "
            "rounded on their way to the servers, and log-probs of engine and trainer differ by as much"
        )
    yield from _ahead_warnings(recipe)
    if recipe.rollout.stop_at_reward is not None:
        yield (
            "rollout.stop_at_reward: a prompt ends at its first right rollout, so the surrogate sees short responses "
            "more often than long ones; meant for objectives that learn from cliffs alone"
        )
    if recipe.rollout.samples_per_prompt == 1:
        yield "rollout.samples_per_prompt=1: a group of one has advantage 0, so the surrogate learns nothing"


def _hint_warnings(recipe: Recipe) -> Iterator[str]:
    """Yield that the room for a sibling's response in the teacher's prompt is less than the longest response."""
    prompts, response = recipe.data.prompts, recipe.rollout.max_new_tokens
    room = prompts.privileged_limit - prompts.max_prompt_tokens
    if "attempt" in recipe.objective.hint_shows and room < response:
        yield (
            f"data.prompts.max_privileged_tokens: {prompts.privileged_limit} tokens hold a prompt of "
            f"{prompts.max_prompt_tokens} and {room} of a sibling's response, which may have rollout.max_new_tokens="
            f"{response}: of longer ones only the {prompts.hint_keep} is shown (hint/cut_share); set "
            f"{prompts.max_prompt_tokens + response} or more, and some for the template's words"
        )


def _ahead_warnings(recipe: Recipe) -> Iterator[str]:
    """Yield what must be known of rollouts that are sampled ahead, by weights older than those that learn from them."""
    rollout, surrogate = recipe.rollout, surrogate_of(recipe.objective)
    if not rollout.ahead:
        return
    age = "one step" if rollout.ahead == 1 else f"up to {rollout.ahead} steps"
    if surrogate is not None and surrogate.importance_cap is None:
        yield (
            f"rollout.ahead: rollouts are {age} old, which importance weights correct for; "
            f"objective.surrogate.importance_cap={DEFAULT_IMPORTANCE_CAP} is used"
        )
    distill = getattr(recipe.objective, "distill", None)
    if surrogate is None and distill is not None and distill.importance_cap is None:
        yield (
            f"rollout.ahead: rollouts are {age} old, and objective {recipe.objective.name} has no surrogate whose "
            "importance weights correct for it; objective.distill.importance_cap does for the student's own tokens"
        )
    if rollout.ahead > 1 and rollout.swap == "after_batch":
        yield (
            f"rollout.ahead={rollout.ahead} with rollout.swap=after_batch: each weight sync waits for the step that is "
            "being sampled, so rollouts get older and hardly any time is won; set rollout.swap=mid_generation"
        )
