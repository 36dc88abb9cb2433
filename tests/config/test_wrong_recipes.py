"""Every kind of wrong recipe or override, and all that is said of it: what is wrong, where, and what would be right.

The messages are those of `load_recipe` and `check_sections`, which every command that takes a recipe calls first.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_hdpo.config import RecipeError, check_sections, load_recipe

BASE = """\
output: runs/x
model: {path: nowhere}
data:
  train:
    - {kind: digit_sums, name: sums, lengths: [2, 3]}
objective:
  name: hdpo
"""
LAUGHS = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdef", "bcdefg", strict=True)
)
METHODS = "grpo, hdpo, opd, vopd, akl, opsd, sdpo, srpo, rlsd, rlcsd, contrastive_opsd, paced"
OWN = "; a class of your own is module:Name or path/to/file.py:Name"


@dataclass(frozen=True)
class Wrong:
    """One wrong recipe. says: the message, with {recipe}, {folder} and {override} for the paths and the override.

    text: of the file. overrides: on top of it.
    """

    name: str
    says: str
    text: str | bytes = BASE
    overrides: Sequence[str] = ()


TABLE = [
    Wrong(
        "an empty file",
        "{recipe}: must be a mapping of sections, not nothing (is the file empty?)",
        text="",
    ),
    Wrong(
        "only comments",
        "{recipe}: must be a mapping of sections, not nothing (is the file empty?)",
        text="# nothing\n",
    ),
    Wrong(
        "a list at the top",
        "{recipe}: must be a mapping of sections, not a list",
        text="- 1\n- 2\n",
    ),
    Wrong(
        "a word at the top",
        "{recipe}: must be a mapping of sections, not a text",
        text="train\n",
    ),
    Wrong(
        "a number at the top",
        "{recipe}: must be a mapping of sections, not a single value",
        text="7\n",
    ),
    Wrong(
        "a tab as indentation",
        "{recipe}: is not YAML: line 3, column 1: found character '\\t' that cannot start any token",
        text="output: runs/x\nmodel:\n\tpath: m\n",
    ),
    Wrong(
        "an indentation that falls between",
        "{recipe}: is not YAML: line 3, column 3: expected <block end>, but found '<block mapping start>'",
        text="model:\n    path: m\n  dtype: auto\n",
    ),
    Wrong(
        "a list that is not closed",
        "{recipe}: is not YAML: line 2, column 5: expected ',' or ']', but got ':'",
        text="output: [1, 2\nseed: 3\n",
    ),
    Wrong(
        "a quote that is not closed",
        "{recipe}: is not YAML: line 2, column 1: found unexpected end of stream",
        text='output: "runs\n',
    ),
    Wrong(
        "a colon in a plain text",
        "{recipe}: is not YAML: line 1, column 10: mapping values are not allowed here",
        text="output: a: b\n",
    ),
    Wrong(
        "a template without quotes",
        "{recipe}: is not YAML: line 1, column 28: found unhashable key",
        text="data: {prompts: {student: {{ question }}}}\n",
    ),
    Wrong(
        "a key given twice",
        "{recipe}: is not YAML: line 2, column 1: the key seed is given twice",
        text="seed: 1\nseed: 2\n",
    ),
    Wrong(
        "a key given twice below",
        "{recipe}: is not YAML: line 3, column 3: the key steps is given twice",
        text="train:\n  steps: 1\n  steps: 2\n",
    ),
    Wrong(
        "two documents",
        "{recipe}: is not YAML: line 2, column 1: but found another document",
        text="seed: 1\n---\nseed: 2\n",
    ),
    Wrong(
        "an alias without its anchor",
        "{recipe}: is not YAML: line 1, column 8: found undefined alias 'other'",
        text="train: *other\n",
    ),
    Wrong(
        "an alias inside itself",
        "{recipe}: is not YAML: line 1, column 12: an alias inside the value that it stands for",
        text="train: &a [*a]\n",
    ),
    Wrong(
        "a merge of itself",
        "{recipe}: is not YAML: line 1, column 16: an alias inside the value that it stands for",
        text="train: &a {<<: *a}\n",
    ),
    Wrong(
        "a merge of a number",
        "{recipe}: is not YAML: line 1, column 13: expected a mapping or list of mappings for merging, "
        "but found scalar",
        text="train: {<<: 3}\n",
    ),
    Wrong(
        "aliases that explode",
        "{recipe}: is not YAML: line 5, column 4: aliases make more than 20,000 values of this",
        text=LAUGHS,
    ),
    Wrong(
        "300 levels",
        "{recipe}: is not YAML: line 1, column 53: more than 50 levels inside each other",
        text="x: " + "[" * 300 + "]" * 300,
    ),
    Wrong(
        "too many values",
        "{recipe}: is not YAML: line 1, column 40003: more than 20,000 values",
        text="x: [" + "1," * 30000 + "]",
    ),
    Wrong(
        "too long",
        "{recipe}: is not YAML: it has 262,145 characters, a recipe at most 262,144",
        text="# " + "x" * 300000,
    ),
    Wrong(
        "a tag of Python",
        "{recipe}: is not YAML: line 1, column 9: recipes have no values of the type "
        "tag:yaml.org,2002:python/object/apply:os.system",
        text="output: !!python/object/apply:os.system [ls]\n",
    ),
    Wrong(
        "a tag of another type",
        "{recipe}: is not YAML: line 1, column 9: recipes have no values of the type tag:yaml.org,2002:timestamp",
        text="output: !!timestamp 2020-01-01\n",
    ),
    Wrong(
        "bytes",
        "{recipe}: is not YAML: line 1, column 9: recipes have no values of the type tag:yaml.org,2002:binary",
        text="output: !!binary aGk=\n",
    ),
    Wrong(
        "an unknown tag",
        "{recipe}: is not YAML: line 1, column 9: recipes have no values of the type !env",
        text="output: !env RUNS\n",
    ),
    Wrong(
        "a text that is tagged as a number",
        "{recipe}: is not YAML: line 1, column 7: this is no int",
        text="seed: !!int x\n",
    ),
    Wrong(
        "a number with leading zeros",
        "{recipe}: is not YAML: line 1, column 7: 010 may be read with base 8 or 10: write it without "
        "leading zeros, or quote it as text",
        text="seed: 010\n",
    ),
    Wrong(
        "a number of 5000 digits",
        "{recipe}: is not YAML: line 1, column 7: an integer of 5,000 characters does not fit into 64 bits",
        text="seed: " + "9" * 5000,
    ),
    Wrong(
        "a NUL character",
        "{recipe}: is not YAML: unacceptable character #x0000: special characters are not allowed in "
        '"<unicode string>", position 9',
        text="output: a\x00b\n",
    ),
    Wrong(
        "a control character",
        "{recipe}: is not YAML: unacceptable character #x0007: special characters are not allowed in "
        '"<unicode string>", position 9',
        text="output: a\x07b\n",
    ),
    Wrong(
        "Latin-1",
        "{recipe}: is not UTF-8 text: 'utf-8' codec can't decode byte 0xe9 in position 11: invalid continuation byte",
        text="output: Caf\u00e9\n".encode("latin-1"),
    ),
    Wrong(
        "UTF-16",
        "{recipe}: is not UTF-8 text: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte",
        text="output: x\n".encode("utf-16"),
    ),
    Wrong(
        "a binary file",
        "{recipe}: is not UTF-8 text: 'utf-8' codec can't decode byte 0x89 in position 0: invalid start byte",
        text=b"\x89PNG\r\n\x1a\n\x00\x00",
    ),
    Wrong(
        "a list as a key",
        "{recipe}: is not YAML: line 1, column 3: found unhashable key",
        text="? [a]\n: b\n",
    ),
    Wrong(
        "a clock time for a number",
        "{override}: train.steps: Input should be a valid integer, unable to parse string as an integer "
        "(given: '1:30')",
        overrides=["train.steps=1:30"],
    ),
    Wrong(
        "a date for a number",
        "{override}: train.steps: Input should be a valid integer, unable to parse string as an integer "
        "(given: '2020-01-01')",
        overrides=["train.steps=2020-01-01"],
    ),
    Wrong(
        "an octal number",
        "{override}: train.steps: Input should be a valid integer, unable to parse string as an integer "
        "(given: '0o17')",
        overrides=["train.steps=0o17"],
    ),
    Wrong(
        "leading zeros in an override",
        "{override}: the value is not YAML: line 1, column 1: 010 may be read with base 8 or 10: write "
        "it without leading zeros, or quote it as text",
        overrides=["train.steps=010"],
    ),
    Wrong(
        "true for a number",
        "{override}: train.steps: must be a number (given: true)",
        overrides=["train.steps=true"],
    ),
    Wrong(
        "yes for a number",
        "{override}: optimizer.lr: must be a number (given: true)",
        overrides=["optimizer.lr=yes"],
    ),
    Wrong(
        "true in a list of numbers",
        "{override}: evaluation.k.0: must be a number (given: true)",
        overrides=["evaluation.k=[true]"],
    ),
    Wrong(
        "null for a number",
        "{override}: train.steps: Input should be a valid integer (given: null)",
        overrides=["train.steps=null"],
    ),
    Wrong(
        "nothing for a number",
        "{override}: train.steps: Input should be a valid integer (given: null)",
        overrides=["train.steps="],
    ),
    Wrong(
        "a fraction for an integer",
        "{override}: train.steps: Input should be a valid integer, got a number with a fractional part (given: 2.5)",
        overrides=["train.steps=2.5"],
    ),
    Wrong(
        "a text for a number",
        "{override}: train.steps: Input should be a valid integer, unable to parse string as an integer "
        "(given: 'many')",
        overrides=["train.steps=many"],
    ),
    Wrong(
        "a list for a number",
        "{override}: train.steps: Input should be a valid integer (given: a list)",
        overrides=["train.steps=[1]"],
    ),
    Wrong(
        "a section for a number",
        "{override}: train.steps: Input should be a valid integer (given: a section)",
        overrides=["train.steps={a: 1}"],
    ),
    Wrong(
        "a number for a boolean",
        "{override}: parallel.sequence: Input should be a valid boolean, unable to interpret input (given: 7)",
        overrides=["parallel.sequence=7"],
    ),
    Wrong(
        "a number for a text",
        "{override}: tracking.wandb.project: Input should be a valid string (given: 7)",
        overrides=["tracking.wandb.project=7"],
    ),
    Wrong(
        "a boolean for a text",
        "{override}: tracking.wandb.project: Input should be a valid string (given: False)",
        overrides=["tracking.wandb.project=no"],
    ),
    Wrong(
        "a number for a section",
        "{override}: train: must be a section with keys of its own (given: 2)",
        overrides=["train=2"],
    ),
    Wrong(
        "a list for a section",
        "{override}: train: must be a section with keys of its own (given: [1])",
        overrides=["train=[1]"],
    ),
    Wrong(
        "null for a section",
        "{override}: train: must be a section with keys of its own (given: null)",
        overrides=["train=null"],
    ),
    Wrong(
        "a number for a list",
        "{override}: data.train: Input should be a valid list (given: 3)",
        overrides=["data.train=3"],
    ),
    Wrong(
        "a number in a list of sections",
        "{override}: data.train.0: must be a section with keys of its own (given: 3)",
        overrides=["data.train=[3]"],
    ),
    Wrong(
        "an infinite number",
        "{override}: optimizer.weight_decay: Input should be a finite number (given: inf)",
        overrides=["optimizer.weight_decay=.inf"],
    ),
    Wrong(
        "an infinite number by its size",
        "{override}: optimizer.eps: Input should be a finite number (given: inf)",
        overrides=["optimizer.eps=1e999"],
    ),
    Wrong(
        "an infinite number as text",
        "{override}: objective.distill.coefficient: Input should be a finite number (given: 'inf')",
        overrides=["objective.distill.coefficient='inf'"],
    ),
    Wrong(
        "no number",
        "{override}: objective.distill.temperature: Input should be a finite number (given: nan)",
        overrides=["objective.distill.temperature=.nan"],
    ),
    Wrong(
        "an infinite number in a list",
        "{override}: optimizer.betas.1: Input should be a finite number (given: nan)",
        overrides=["optimizer.betas=[0.9, .nan]"],
    ),
    Wrong(
        "an infinite number in free values",
        "{override}: data.prompts.chat_template_kwargs.a.0: Input should be a finite number (given: inf)",
        overrides=["data.prompts.chat_template_kwargs={a: [.inf]}"],
    ),
    Wrong(
        "an infinite weight of a task",
        "{override}: data.train.0.weight: Input should be a finite number (given: inf)",
        overrides=["data.train.0.weight=.inf"],
    ),
    Wrong(
        "an infinite time",
        "{override}: parallel.timeout_minutes: Input should be a finite number (given: inf)",
        overrides=["parallel.timeout_minutes=.inf"],
    ),
    Wrong(
        "a seed beyond 64 bits",
        "{override}: seed: must fit into 64 bits",
        overrides=["seed=99999999999999999999"],
    ),
    Wrong(
        "a seed of a task beyond 64 bits",
        "{override}: data.train.0.seed: must fit into 64 bits",
        overrides=["data.train.0.seed=99999999999999999999"],
    ),
    Wrong(
        "a negative seed",
        "{override}: seed: Input should be greater than or equal to 0 (given: -1)",
        overrides=["seed=-1"],
    ),
    Wrong(
        "a time of centuries",
        "{override}: rollout.sglang.request_timeout_s: must be at most 1e+08: nothing waits for longer "
        "than three years (given: 1e+12)",
        overrides=["rollout.sglang.request_timeout_s=1e12"],
    ),
    Wrong(
        "a deadline of centuries",
        "{override}: parallel.timeout_minutes: must be at most 1.6e+06: nothing waits for longer than "
        "three years (given: 1e+12)",
        overrides=["parallel.timeout_minutes=1e12"],
    ),
    Wrong(
        "a threshold above every reward",
        "{override}: evaluation.success_threshold: must be between 1e-06 and 1: rewards go from 0 to 1, "
        "so any other threshold is reached always or never (given: 7)",
        overrides=["evaluation.success_threshold=7"],
    ),
    Wrong(
        "a threshold below every reward",
        "{override}: objective.privileged.success_threshold: must be between 1e-06 and 1: rewards go "
        "from 0 to 1, so any other threshold is reached always or never (given: 0)",
        overrides=["objective.privileged.success_threshold=0"],
    ),
    Wrong(
        "a reward that no rollout gets",
        "{override}: rollout.stop_at_reward: must be between 1e-06 and 1: rewards go from 0 to 1, so "
        "any other threshold is reached always or never (given: 2)",
        overrides=["rollout.stop_at_reward=2"],
    ),
    Wrong(
        "a temperature that is nearly zero",
        "{override}: rollout.temperature: must be between 0.001 and 1000: lower ones take the likeliest "
        "token, higher ones any, up to rounding (given: 1e-30)",
        overrides=["rollout.temperature=1e-30"],
    ),
    Wrong(
        "a temperature that is huge",
        "{override}: objective.distill.temperature: must be between 0.001 and 1000: lower ones take the "
        "likeliest token, higher ones any, up to rounding (given: 1e+06)",
        overrides=["objective.distill.temperature=1e6"],
    ),
    Wrong(
        "a temperature of zero",
        "{override}: evaluation.temperature: Input should be greater than 0 (given: 0)",
        overrides=["evaluation.temperature=0"],
    ),
    Wrong(
        "a learning rate that rises",
        "{override}: optimizer.min_lr: 1 is above the peak, optimizer.lr=1e-06: a schedule falls",
        overrides=["optimizer.min_lr=1"],
    ),
    Wrong(
        "a learning rate of the warm-up that rises",
        "{override}: warmup.optimizer.min_lr: 0.0001 is above the peak, warmup.optimizer.lr=1e-05: a schedule falls",
        overrides=["warmup.optimizer={lr: 1e-5, min_lr: 1e-4}"],
    ),
    Wrong(
        "a weight decay of more than the weight",
        "{override}: optimizer.weight_decay: 20 x optimizer.lr=0.1 takes every weight to 0 or beyond in one step",
        overrides=["optimizer={lr: 0.1, weight_decay: 20}"],
    ),
    Wrong(
        "no tokens",
        "{override}: rollout.max_new_tokens: Input should be greater than or equal to 1 (given: 0)",
        overrides=["rollout.max_new_tokens=0"],
    ),
    Wrong(
        "a share above one",
        "{override}: rollout.top_p: Input should be less than or equal to 1 (given: 1.5)",
        overrides=["rollout.top_p=1.5"],
    ),
    Wrong(
        "a choice that is not there",
        "{override}: device: Input should be 'auto', 'cuda' or 'cpu' (given: 'tpu')",
        overrides=["device=tpu"],
    ),
    Wrong(
        "a method that is not there",
        "{override}: objective.name: hpdo is not one of " + METHODS + "; did you mean hdpo?",
        overrides=["objective.name=hpdo"],
    ),
    Wrong(
        "a number for a method",
        "{override}: objective.name: 3 is not one of " + METHODS + OWN,
        overrides=["objective.name=3"],
    ),
    Wrong(
        "a list for a method",
        "{override}: objective.name: ['hdpo'] is not one of " + METHODS + "; did you mean hdpo?",
        overrides=["objective.name=[hdpo]"],
    ),
    Wrong(
        "a section without its method",
        "{override}: objective.name: required key is missing, one of " + METHODS,
        overrides=["objective={}"],
    ),
    Wrong(
        "a null method",
        "{override}: objective: must be a section with keys of its own (given: null)",
        overrides=["objective=null"],
    ),
    Wrong(
        "a task that is not there",
        "{override}: data.train.0.kind: sums is not one of digit_sums, knights_knaves, letter_choice, "
        "reasoning_gym, jsonl, json, csv, parquet, huggingface" + OWN,
        overrides=["data.train.0.kind=sums"],
    ),
    Wrong(
        "an unknown key",
        "{override}: trian: unknown key; did you mean train?",
        overrides=["trian.steps=3"],
    ),
    Wrong(
        "an unknown key below",
        "{override}: train.step: unknown key; did you mean steps?",
        overrides=["train.step=3"],
    ),
    Wrong(
        "an empty key",
        "{override}: train.: unknown key; known keys: steps, updates_per_step, micro_batch_tokens, "
        "head_chunk, max_skipped_updates, max_mismatch_k3",
        overrides=["train..steps=3"],
    ),
    Wrong(
        "a key that ends with a dot",
        "{override}: train.: unknown key; known keys: steps, updates_per_step, micro_batch_tokens, "
        "head_chunk, max_skipped_updates, max_mismatch_k3",
        overrides=["train.=3"],
    ),
    Wrong(
        "a key with a blank",
        "{override}: train. steps: unknown key; did you mean steps?",
        overrides=["train. steps=3"],
    ),
    Wrong(
        "no key",
        "{override}: write key.path=value",
        overrides=["=3"],
    ),
    Wrong(
        "no value",
        "{override}: write key.path=value",
        overrides=["train.steps"],
    ),
    Wrong(
        "a position that is no digit",
        "{override}: data.train.²: the list has items 0 to 0",
        overrides=["data.train.²=1"],
    ),
    Wrong(
        "a position beyond the list",
        "{override}: data.train.3: the list has items 0 to 0",
        overrides=["data.train.3.size=5"],
    ),
    Wrong(
        "a position of 5000 digits",
        "override 'data.train."
        + "9" * 189
        + "... (5,013 characters)': data.train."
        + "9" * 189
        + "... (5,011 characters): the list has items 0 to 0",
        overrides=["data.train." + "9" * 5000 + "=5"],
    ),
    Wrong(
        "a negative position",
        "{override}: data.train.-1: the list has items 0 to 0",
        overrides=["data.train.-1.size=5"],
    ),
    Wrong(
        "a key below a value",
        "{override}: train.steps: Input should be a valid integer (given: a section)",
        overrides=["train.steps.max=2"],
    ),
    Wrong(
        "a key of 100 parts",
        "override '" + "a." * 99 + "a=... (201 characters)': the key has more than 50 parts",
        overrides=["a." * 99 + "a=1"],
    ),
    Wrong(
        "a value that is not YAML",
        "{override}: the value is not YAML: line 1, column 6: expected ',' or ']', but got '<stream end>'",
        overrides=["model.path=[1, 2"],
    ),
    Wrong(
        "a template that YAML takes for a mapping",
        "{override}: the value is not YAML: line 1, column 2: found unhashable key; a template needs "
        "quotes inside those of the shell: key='\"{{ question }}\"'",
        overrides=["data.prompts.student={{ question }}"],
    ),
    Wrong(
        "NUL in a path",
        "{override}: output: must not contain the character NUL",
        overrides=['output="a\\0b"'],
    ),
    Wrong(
        "half a surrogate pair",
        "{override}: output: must not contain half a surrogate pair (is it UTF-8?)",
        overrides=['output="a\\ud800"'],
    ),
    Wrong(
        "a path that is too long",
        "override 'output="
        + "x" * 193
        + "... (307 characters)': output: "
        + "x" * 200
        + "... (300 characters) cannot be looked up: File name too long",
        overrides=["output=" + "x" * 300],
    ),
    Wrong(
        "a model path that is too long",
        "override 'model.path="
        + "x" * 189
        + "... (311 characters)': model.path: "
        + "x" * 200
        + "... (300 characters) cannot be looked up: File name too long",
        overrides=["model.path=" + "x" * 300],
    ),
    Wrong(
        "a path through a loop of links",
        "{override}: output: {folder}/loop/run cannot be looked up: Too many levels of symbolic links",
        overrides=["output={folder}/loop/run"],
    ),
    Wrong(
        "a number as a key",
        "{override}: data.prompts.chat_template_kwargs.1: a key must be text: quote it",
        overrides=["data.prompts.chat_template_kwargs={1: a}"],
    ),
    Wrong(
        "a lone override of a long value",
        "override "
        "'train.steps=" + "x" * 188 + "... "
        "(5,012 characters)': train.steps: Input should be a valid integer, unable to parse string as "
        "an integer (given: "
        "'" + "x" * 199 + "... "
        "(5,002 characters))",
        overrides=["train.steps=" + "x" * 5000],
    ),
    Wrong(
        "k above the samples",
        "{override}: evaluation: k=[99] cannot be estimated from samples=8: each k must be 1..samples",
        overrides=["evaluation.k=[1, 99]"],
    ),
    Wrong(
        "k of zero",
        "{override}: evaluation: k=[0] cannot be estimated from samples=8: each k must be 1..samples",
        overrides=["evaluation.k=[0]"],
    ),
    Wrong(
        "variables for privileged prompts that nobody reads",
        "data.prompts.privileged_chat_template_kwargs: objective grpo makes no privileged prompt; leave it out",
        overrides=["objective={name: grpo}", "data.prompts.privileged_chat_template_kwargs={enable_thinking: true}"],
    ),
    Wrong(
        "a method that needs a teacher, without one",
        "teacher: objective akl needs one: set teacher.kind to policy or frozen or snapshot or ema or external",
        overrides=["objective={name: akl, tokens: teacher}"],
    ),
    Wrong(
        "samples of a task that is not evaluated on",
        "evaluation.task_samples.aime: data.evaluation has no task of this name (it has: none)",
        overrides=["evaluation.task_samples={aime: 12}"],
    ),
    Wrong(
        "a threshold that makes every prompt a cliff",
        "{override}: objective.cliff_threshold: must be between 0 and 0.999999: rewards go from 0 to 1, so every "
        "prompt would be a cliff (given: 1)",
        overrides=["objective.cliff_threshold=1"],
    ),
    Wrong(
        "a template that does not parse",
        "{override}: data.prompts.student: the template does not parse: unexpected end of template, "
        "expected 'end of print statement'. (its line 1) (given: '{{ question')",
        overrides=["data.prompts.student='{{ question'"],
    ),
    Wrong(
        "a template without the question",
        "{override}: data.prompts.student: the template does not use the variable question, so every "
        "prompt would be the same (given: 'solve it')",
        overrides=["data.prompts.student='solve it'"],
    ),
    Wrong(
        "a teacher without a use",
        "teacher.kind: frozen, but objective grpo has no teacher",
        overrides=["objective={name: grpo}", "teacher.kind=frozen"],
    ),
    Wrong(
        "urls without placement",
        "{override}: rollout.sglang: urls: name the servers' addresses with placement=given, and only then",
        overrides=["rollout.sglang.urls=[http://a:1]"],
    ),
    Wrong(
        "two tasks of one name",
        "{recipe}:3: data: several tasks are called sums: give each its own `name`",
        overrides=["data.evaluation=[{kind: digit_sums, name: sums, lengths: [2, 3]}]"],
    ),
    Wrong(
        "a deadline longer than the patience",
        "parallel.silence_minutes: 1 is no longer than rollout.sglang.request_timeout_s=1800 s, which a "
        "rank may wait without progress: raise it\n"
        "parallel.silence_minutes: 1 is no longer than rollout.sglang.sync.timeout_s=600 s, which a "
        "rank may wait without progress: raise it\n"
        "parallel.silence_minutes: 1 is no longer than rollout.sglang.servers.start_timeout_s=900 s, "
        "which a rank may wait without progress: raise it",
        overrides=["rollout.engine=sglang", "parallel.silence_minutes=1"],
    ),
    Wrong(
        "an early stop of the embedded engine",
        "rollout.stop_at_reward: needs rollout.engine=sglang, whose servers sample while the trainer works",
        overrides=["rollout.stop_at_reward=1"],
    ),
    Wrong(
        "a wrong number in the file",
        "{recipe}:9: train.steps: Input should be greater than or equal to 0 (given: -1)",
        text=BASE + "train:\n  steps: -1\n",
    ),
    Wrong(
        "a wrong number below a list in the file",
        "{recipe}:12: evaluation.k.1: must be a number (given: true)",
        text=BASE + "evaluation:\n  samples: 4\n  k:\n    - 1\n    - true\n",
    ),
    Wrong(
        "an unknown key in the file",
        "{recipe}:10: train.step: unknown key; did you mean steps?",
        text=BASE + "train:\n  micro_batch_tokens: 64\n  step: 3\n",
    ),
    Wrong(
        "a missing key in the file",
        "{recipe}:9: tracking.wandb.project: required key is missing",
        text=BASE + "tracking:\n  wandb:\n    name: a\n",
    ),
    Wrong(
        "an infinite number in the file",
        "{recipe}:9: optimizer.eps: Input should be a finite number (given: inf)",
        text=BASE + "optimizer:\n  eps: .inf\n",
    ),
    Wrong(
        "several errors in the file",
        "{recipe}:9: rollout.top_p: Input should be less than or equal to 1 (given: 2)\n"
        "{recipe}:8: train.steps: Input should be greater than or equal to 0 (given: -1)\n"
        "{recipe}:10: modle: unknown key; did you mean model?",
        text=BASE + "train: {steps: -1}\nrollout: {top_p: 2}\nmodle: {path: x}\n",
    ),
    Wrong(
        "an error in a section that an alias repeats",
        "{recipe}:8: optimizer.lr: Input should be greater than 0 (given: 0)\n"
        "{recipe}:8: warmup.optimizer.lr: Input should be greater than 0 (given: 0)",
        text=BASE + "optimizer: &slow {lr: 0}\nwarmup:\n  optimizer: *slow\n",
    ),
    Wrong(
        "a threshold in the file",
        "{recipe}:9: evaluation.success_threshold: must be between 1e-06 and 1: rewards go from 0 to 1, "
        "so any other threshold is reached always or never (given: 1.5)",
        text=BASE + "evaluation:\n  success_threshold: 1.5\n",
    ),
    Wrong(
        "a missing section",
        "{recipe}: data: required key is missing",
        text="output: x\nmodel: {path: m}\nobjective: {name: grpo}\n",
    ),
    Wrong(
        "a missing key below",
        "{recipe}:2: model.path: required key is missing\n{recipe}:5: data.train.0.lengths: required key is missing",
        text="output: x\nmodel: {}\ndata:\n  train:\n    - {kind: digit_sums}\nobjective: {name: grpo}\n",
    ),
    Wrong(
        "a number for a section in the file",
        "{recipe}:8: train: must be a section with keys of its own (given: 3)",
        text=BASE + "train: 3\n",
    ),
]


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_message(case: Wrong, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(case.text if isinstance(case.text, bytes) else case.text.encode())
    (tmp_path / "loop").symlink_to("loop")
    overrides = [override.replace("{folder}", str(tmp_path)) for override in case.overrides]
    with pytest.raises(RecipeError) as refused:
        check_sections(load_recipe(recipe, overrides))
    says = case.says.replace("{override}", f"override '{overrides[0]}'" if overrides else "")
    assert str(refused.value) == says.replace("{recipe}", str(recipe)).replace("{folder}", str(tmp_path))


def test_the_table_has_every_kind_once() -> None:
    assert len({case.name for case in TABLE}) == len(TABLE) >= 80


def test_the_recipe_of_the_table_is_right(tmp_path: Path) -> None:
    """Else its cases would be refused for what is wrong with all of them."""
    (tmp_path / "recipe.yaml").write_text(BASE)
    check_sections(load_recipe(tmp_path / "recipe.yaml"))


def test_a_recipe_is_refused_before_anything_slow_is_imported(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(BASE)
    for command in ("check", "train"):
        program = [sys.executable, "-X", "importtime", "-m", "megatron_hdpo", command, "recipe.yaml", "seed=x"]
        done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True)
        lines = done.stderr.splitlines()
        imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
        assert "megatron_hdpo.config" in imported
        assert not imported & {"torch", "transformers", "megatron", "sympy", "pandas", "pyarrow"}
        (said,) = (line for line in lines if not line.startswith("import time:"))
        assert said.startswith("RecipeError: override 'seed=x': seed: ") and done.returncode == 2
