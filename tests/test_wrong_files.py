"""A table of wrong files: each gets one line that says what is wrong, before a model is built or weights are read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from wrong_files import (
    LLAMA3,
    Content,
    Reader,
    config,
    group,
    index,
    manifest,
    metrics,
    packed,
    replay,
    rows,
    state,
)

from megatron_hdpo.types.errors import UserError

JSONL, JSON, CSV, PARQUET = rows("jsonl"), rows("json"), rows("csv"), rows("parquet")
GOOD = '{"problem": "q", "answer": "1"}\n'
DEEP = "[" * 100_000
DAMAGED = gzip.compress(json.dumps(group()).encode() * 50)
NAN = packed([float("nan"), -1.0], "<f4")
ENTRY = {"bytes": 1, "blake2b": "0"}

TABLE: list[tuple[Reader, Content, str]] = [
    # config.json
    (config, "", "config.json is not JSON: Expecting value: line 1 column 1 (char 0)"),
    (config, '{"hidden_size": ', "config.json is not JSON: Expecting value"),
    (config, DEEP, "config.json is not JSON: "),
    (config, b"\xff\xfe{}", "config.json is not JSON: 'utf-8' codec can't decode byte 0xff"),
    (config, "[]", "config.json must hold an object, not list"),
    (config, "{}", "architectures=(none) is not supported; supported: LlamaForCausalLM, "),
    (config, {"architectures": 3}, "architectures=3 must be a list of texts"),
    (config, {"architectures": [3]}, "architectures=[3] must be a list of texts"),
    (config, {"hidden_size": "32"}, "hidden_size='32' must be a whole number from 1 to 2147483647"),
    (config, {"hidden_size": None}, "hidden_size=None must be a whole number"),
    (config, {"hidden_size": -32}, "hidden_size=-32 must be a whole number"),
    (config, {"hidden_size": 32.0}, "hidden_size=32.0 must be a whole number"),
    (config, {"hidden_size": True}, "hidden_size=True must be a whole number"),
    (config, {"hidden_size": 30}, "hidden_size=30 is no multiple of num_attention_heads=4, and head_dim is missing"),
    (config, {"num_hidden_layers": 0}, "num_hidden_layers=0 must be a whole number"),
    (config, {"num_attention_heads": 0}, "num_attention_heads=0 must be a whole number"),
    (config, {"num_key_value_heads": 3}, "num_attention_heads=4 is no multiple of num_key_value_heads=3"),
    (config, {"head_dim": [8]}, "head_dim=[8] must be a whole number"),
    (config, {"vocab_size": 10**12}, "vocab_size=1000000000000 must be a whole number"),
    (config, {"max_position_embeddings": None}, "max_position_embeddings=None must be a whole number"),
    (config, {"rms_norm_eps": "small"}, "rms_norm_eps='small' must be a finite number above 0"),
    (config, {"rms_norm_eps": float("nan")}, "rms_norm_eps=nan must be a finite number above 0"),
    (config, {"rms_norm_eps": 0}, "rms_norm_eps=0 must be a finite number above 0"),
    (config, {"rope_theta": "big"}, "rope_theta='big' must be a finite number above 0"),
    (config, {"rope_theta": -1.0}, "rope_theta=-1.0 must be a finite number above 0"),
    (config, {"rope_scaling": [1]}, "rope_scaling=[1] must be an object"),
    (config, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type=yarn is not supported"),
    (config, {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "RoPE settings for each kind of layer"),
    (config, {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
    (config, {"rope_scaling": LLAMA3 | {"factor": "8"}}, "rope factor='8' must be a finite number above 0"),
    (config, {"rope_scaling": LLAMA3 | {"low_freq_factor": 2.0}}, "rope low_freq_factor=2.0 is not supported"),
    (
        config,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "rope_scaling": LLAMA3},
        "rope_parameters and rope_scaling are both there and differ in factor, high_freq_factor, low_freq_factor, ",
    ),
    (
        config,
        {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}, "rope_scaling": LLAMA3},
        "rope_parameters and rope_scaling are both there and differ in rope_theta: programs read the one or the other",
    ),
    (config, {"tie_word_embeddings": "false"}, "tie_word_embeddings='false' must be true or false"),
    (config, {"attention_bias": 1}, "attention_bias=1 must be true or false"),
    (config, {"layer_types": "sliding_attention"}, "layer_types='sliding_attention' must be a list of texts"),
    # model.safetensors.index.json
    (index, "", "model.safetensors.index.json is not JSON (Expecting value: line 1 column 1 (char 0)): download"),
    (index, '{"weight_map": {"a"', "model.safetensors.index.json is not JSON"),
    (index, DEEP, "model.safetensors.index.json is not JSON"),
    (index, b"\xff", "model.safetensors.index.json is not JSON ('utf-8' codec can't decode byte 0xff"),
    (index, [], "model.safetensors.index.json has no weight_map from tensors to files"),
    (index, {}, "has no weight_map from tensors to files"),
    (index, {"weight_map": {}}, "has no weight_map from tensors to files"),
    (index, {"weight_map": ["a"]}, "has no weight_map from tensors to files"),
    (index, {"weight_map": {"a": 3}}, "has no weight_map from tensors to files"),
    (index, {"weight_map": {"a": "../other.safetensors"}}, "names the file '../other.safetensors', which is not in"),
    (index, {"weight_map": {"a": "/etc/passwd"}}, "names the file '/etc/passwd', which is not in this folder"),
    (index, {"weight_map": {"a": ""}}, "names the file '', which is not in this folder"),
    (index, {"weight_map": {"a": "model-1.safetensors"}}, "model-1.safetensors cannot be read ("),
    # JSON lines
    (JSONL, "", "no problem is left of"),
    (JSONL, GOOD + DEEP, "rows.jsonl:2: not JSON: its lists or objects are nested too deep"),
    (JSONL, GOOD + "7\n", "rows.jsonl:2: has no key 'problem' (it has: int)"),
    (JSONL, GOOD + "null\n", "rows.jsonl:2: has no key 'problem' (it has: NoneType)"),
    (JSONL, GOOD.encode("utf-16"), "rows.jsonl:1: not JSON"),
    (JSONL, b'{"problem": "caf\xe9", "answer": "1"}', "rows.jsonl:1: holds bytes that are not UTF-8 text, around 'caf"),
    (JSONL, '{"problem": "\\ud83d", "answer": "1"}', "rows.jsonl:1: holds bytes that are not UTF-8 text"),
    (JSONL, '{"problem": "q", "answer": "\\udc00"}', "rows.jsonl:1: holds bytes that are not UTF-8 text"),
    (JSONL, '{"problem": "q", "answer": "1", "answer": "2"}', "rows.jsonl:1: not JSON: an object has the key 'answer'"),
    (JSONL, '{"problem": "q", "answer": "1", "x": {"a": 1, "a": 1}}', "an object has the key 'a' twice"),
    (JSONL, '{"problem": "q", "answer": NaN}', "rows.jsonl:1: the answer at 'answer' is nan, not a finite number"),
    (JSONL, '{"problem": "q", "answer": 1e999999999}', "is a number of 999,999,999 digits, not a final answer"),
    (JSONL, f'{{"problem": "q", "answer": {"1" * 6000}}}', "not JSON: it holds a number of 6,000 digits"),
    (JSONL, '{"problem": "q", "answer": ["1", "2"]}', "the answer at 'answer' is list, not text or a number"),
    (JSONL, '{"problem": "q", "answer": "<NA>"}', "the answer at 'answer' is '<NA>', which is no value"),
    (JSONL, '{"problem": "q", "answer": "1", "solution": [1]}', "the solution at 'solution' is list, not text"),
    (JSONL, '{"problem": "q", "answer": "1", "solution": "None"}', "the solution at 'solution' is 'None', which is no"),
    (JSONL, '{"problem": "q", "answer": "1", "level": {}}', "the level at 'level' is dict, not text or a number"),
    # a JSON list, CSV, Parquet
    (JSON, "", "rows.json:1 is not JSON: Expecting value"),
    (JSON, DEEP, "rows.json is not JSON: its lists or objects are nested too deep"),
    (JSON, '[{"a": 1, "a": 2}]', "rows.json is not JSON: an object has the key 'a' twice"),
    (JSON, "7", "rows.json holds one int; kind: json reads a list of objects"),
    (CSV, "problem,answer\nq,nan\n", "rows.csv:2: the answer at 'answer' is 'nan', which is no value"),
    (CSV, "problem,answer,solution\nq,1,nan\n", "rows.csv:2: the solution at 'solution' is 'nan', which is no value"),
    (CSV, b"problem,answer\ncaf\xe9,1\n", "rows.csv:2: holds bytes that are not UTF-8 text"),
    (
        CSV,
        "problem,answer\n" + "q" * 200_000 + ",1\n",
        "rows.csv:2: not CSV up to line 2: field larger than field limit",
    ),
    (PARQUET, "", "rows.parquet is not a readable Parquet file"),
    (PARQUET, b"PAR1" + b"\0" * 40 + b"PAR1", "rows.parquet is not a readable Parquet file"),
    # saved rollouts
    (replay, "", "the files of step 1 hold no rollouts"),
    (replay, b"", "the files of step 1 hold no rollouts"),
    (replay, b"not gzip", "jsonl.gz: the compressed file is damaged: Not a gzipped file"),
    (replay, DAMAGED[: len(DAMAGED) // 2], "jsonl.gz: the compressed file ends too early"),
    (replay, DAMAGED[:40] + b"\xff" * 20 + DAMAGED[60:], "jsonl.gz: "),
    (replay, "[]\n", "jsonl.gz:1: not a group of rollouts in format 1"),
    (replay, DEEP, "jsonl.gz:1: broken line: nested too deep"),
    (replay, group(format=2), "not a group of rollouts in format 1"),
    (replay, group(of=2), "step 1 has 2 groups, but its files 1"),
    (replay, group(of="x"), "of is 'x', not a whole number"),
    (replay, group(group=[1]), "group is '[1]', not a whole number"),
    (replay, group(question=3), "question is int, not text"),
    (replay, group(samples=3), "a value has the wrong type"),
    (replay, group(samples=["x"]), "a value has the wrong type"),
    (replay, group(samples=[]), "0 samples but arrays for 1"),
    (replay, group(replay=None), "a value has the wrong type"),
    (replay, group(samples=[], replay__samples=[]), "the group has no rollouts, and says of none why it is missing"),
    (replay, group(samples__0__reward=float("nan")), "problem t/1: rollout 1: the reward is nan"),
    (replay, group(samples__0__reward="good"), "could not convert string to float"),
    (replay, group(samples__0__finish_reason="abort"), "finish_reason 'abort' is neither stop nor length"),
    (replay, group(replay__prompt_ids=packed([1, 64], "<i4")), "the prompt has the token 64, which the model's vocab"),
    (replay, group(replay__prompt_ids=packed([], "<i4")), "the prompt has no tokens"),
    (replay, group(replay__prompt_ids=packed([[1]], "<i4")), "the prompt is an array of shape (1, 1) and type int32"),
    (
        replay,
        group(replay__prompt_ids=packed([1], "<i4") | {"dtype": "O"}),
        "an array has the type 'O', which no rollouts have",
    ),
    (replay, group(replay__prompt_ids=packed([1], "<i4") | {"shape": [7]}), "cannot reshape array"),
    (replay, group(replay__prompt_ids=packed([1], "<i4") | {"base64": "%%"}), "jsonl.gz:1: "),
    (replay, group(replay__samples__0__token_ids=packed([5, 99], "<i4")), "the response has the token 99, which"),
    (replay, group(replay__samples__0__token_ids=packed([5, -1], "<i4")), "the response has the token -1, which"),
    (
        replay,
        group(replay__samples__0__token_ids=packed([5], "<i4")),
        "arrays of one completion have different lengths",
    ),
    (replay, group(replay__samples__0__token_ids=packed([5, 6], "<f4")), "is an array of shape (2,) and type float32"),
    (replay, group(replay__samples__0__logprobs=NAN), "the log-probs are not all finite numbers of at most 0"),
    (replay, group(replay__samples__0__logprobs=packed([0.5, -1], "<f4")), "the log-probs are not all finite numbers"),
    (replay, group(replay__samples__0__logprobs=packed([0, -1], "<i4")), "the log-probs are of type int32"),
    # run_state.json, manifest.json
    (state, "", "run_state.json cannot be read (Expecting value: line 1 column 1 (char 0)): delete"),
    (state, "[]", "run_state.json cannot be read (it holds a list, not an object): delete"),
    (state, DEEP, "run_state.json cannot be read ("),
    (state, {"step": "2"}, "run_state.json cannot be read (step: Input should be a valid integer): delete"),
    (
        state,
        {"step": 3},
        "run_state.json cannot be read (step is 3, which the name of the folder does not say): delete",
    ),
    (state, {"architecture": 3}, "run_state.json cannot be read (architecture: Input should be an object)"),
    (state, {"memory": None}, "run_state.json cannot be read (memory: Input should be an object)"),
    (state, {"memory": {"teacher": 3}}, "run_state.json cannot be read (memory.teacher is no object)"),
    (state, {"reshardable": "no"}, "run_state.json cannot be read (reshardable: Input should be a valid boolean)"),
    (state, {"spec": "fast"}, "run_state.json cannot be read (spec: Input should be "),
    (state, {"later": 1}, "unexpected keyword argument 'later'"),
    (manifest, "", "manifest.json cannot be read: JSONDecodeError"),
    (manifest, DEEP, "manifest.json cannot be read: RecursionError"),
    (manifest, [], "manifest.json cannot be read: TypeError"),
    (manifest, {"files": 3}, "manifest.json cannot be read: AttributeError"),
    (manifest, {"files": {"a": 3}}, "manifest.json cannot be read: TypeError"),
    (manifest, {"files": {"a": {"bytes": "many"}}}, "manifest.json cannot be read: ValueError"),
    (manifest, {"files": {"a": ENTRY}}, "a is missing"),
    # metrics.jsonl
    (metrics, "", "metrics.jsonl: no finished step in it yet"),
    (metrics, DEEP + "\n", "metrics.jsonl, line 1: not JSON ("),
    (metrics, b"\xff\n", "metrics.jsonl, line 1: not JSON ("),
    (metrics, "[]\n", "metrics.jsonl, line 1: no JSON object with an integer `step`"),
    (metrics, '{"step": true}\n', "metrics.jsonl, line 1: no JSON object with an integer `step`"),
    (metrics, '{"step": 1, "time": "now"}\n', "metrics.jsonl, line 1: time is 'now', not a number; remove or repair"),
    (metrics, '{"step": 1, "rollout/reward_mean": "high"}\n', "line 1: rollout/reward_mean is 'high', not a number"),
    (metrics, '{"step": 1, "rollout/reward_mean": [1]}\n', "line 1: rollout/reward_mean is '[1]', not a number"),
    (metrics, f'{{"step": 1, "a/b": 1{"0" * 400}}}\n', "line 1: a/b is '1000"),
    (metrics, '{"step": 2}\n{"step": 1}\n', "metrics.jsonl, line 2: step 1 after step 2"),
]


@pytest.mark.parametrize(("read", "content", "says"), TABLE, ids=lambda value: getattr(value, "__name__", None))
def test_one_line_says_what_is_wrong(tmp_path: Path, read: Reader, content: Content, says: str) -> None:
    with pytest.raises((UserError, ValueError)) as refused:
        read(tmp_path, content)
    message = str(refused.value)
    assert says in message and "\n" not in message


def test_the_table_is_long() -> None:
    assert len(TABLE) >= 130


@pytest.mark.parametrize(
    ("read", "content"),
    [
        (config, {}),
        (config, {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}, "rope_scaling": LLAMA3 | {"rope_theta": 5e5}}),
        (config, {"rope_parameters": LLAMA3, "rope_scaling": None}),
        (config, {"rope_scaling": LLAMA3 | {"type": "llama3"}}),
        (JSONL, GOOD),
        (JSON, f"[{GOOD}]"),
        (CSV, "problem,answer\nq,1\n"),
        (replay, group()),
        (replay, group(samples=[], replay__samples=[], dropped={"generation_failed": 1})),
        (state, {}),
        (manifest, {"files": {}}),
        (metrics, '{"step": 1, "rollout/reward_mean": null, "time": 1.5}\n'),
    ],
)
def test_what_is_right_is_read(tmp_path: Path, read: Reader, content: Any) -> None:
    assert read(tmp_path, content) is not None
