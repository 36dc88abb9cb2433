"""Digests of everything that decides which problems of a task can be used: equal digests, equal problems."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import megatron_hdpo
from megatron_hdpo.data.checked import ProblemChecker
from megatron_hdpo.data.tasks import Task
from megatron_hdpo.data.text_tokens import TokenizerLike
from megatron_hdpo.rewards.gold import JUDGES
from megatron_hdpo.types.task import TaskBase

PACKAGES = ("megatron-hdpo", *JUDGES, "transformers", "tokenizers", "jinja2")
"""Packages whose version may change what is read, parsed or fits."""
ROOMS = ("data", "rewards", "types")
"""Folders of this package whose code reads and checks problems."""


def task_key(task: Task, checker: ProblemChecker) -> str | None:
    """Return the digest of a task's content, its keys, the prompts, the tokenizer and the code that checks.

    None for a task that is not cached: it reads no file, its class comes from outside this package (its code is not
    known here), or the tokenizer cannot be told from others. Raises DataError for content that cannot be read.
    """
    if not isinstance(task, TaskBase) or not type(task).__module__.startswith("megatron_hdpo."):
        return None
    content, tokenizer = task.content(), tokenizer_digest(checker.prompts.tokenizer)
    if content is None or tokenizer is None:
        return None
    prompts = checker.prompts.config.model_dump_json()
    return _digest(
        content,
        task.model_dump_json(exclude={"weight"}),
        prompts,
        tokenizer,
        str((checker.privileged, checker.hints, checker.prompts.vocab_size)),
        rules_digest(),
    )


def tokenizer_digest(tokenizer: TokenizerLike) -> str | None:
    """Return the digest of a fast tokenizer's vocabulary, rules and chat template; None for any other tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    special = [tokenizer.eos_token_id, tokenizer.unk_token_id, *sorted(tokenizer.all_special_tokens)]
    return _digest(backend.to_str(), json.dumps(special), json.dumps(getattr(tokenizer, "chat_template", None)))


@lru_cache(maxsize=1)
def rules_digest() -> str:
    """Return the digest of the code that checks problems, and of the packages that it uses."""
    root = Path(megatron_hdpo.__file__).parent
    files = [file for room in ROOMS for file in sorted((root / room).rglob("*.py"))]
    return _digest(*(f"{name} {_version(name)}" for name in PACKAGES), *(file.read_text("utf-8") for file in files))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
