"""RoPE settings of a config.json: one base and perhaps Llama 3's factor, or a refusal.

transformers 5 writes all of them into `rope_parameters`, 4 has `rope_theta` beside `rope_scaling`. A folder with both
is read as `rope_scaling` by the one and as `rope_parameters` by the other.
"""

from __future__ import annotations

from typing import Any

from megatron_hdpo.model.config_values import ConfigValues

_NEW, _OLD = "rope_parameters", "rope_scaling"
_DEFAULT_THETA = 10_000.0
# Constants of Llama 3's frequency scaling that are hard-coded in Megatron.
_LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def rope_settings(values: ConfigValues) -> tuple[float, float | None]:
    """Return (base, Llama 3's factor or None). Raises the reader's error for settings that are not supported."""
    rope = _rope(values)
    if rope["partial_rotary_factor"] not in (None, 1):
        raise values.refuse(f"partial_rotary_factor={rope['partial_rotary_factor']} is not supported; supported: 1")
    theta = values.positive_value("rope_theta", rope["rope_theta"])
    if rope["rope_type"] == "default":
        return theta, None
    if rope["rope_type"] != "llama3":
        raise values.refuse(f"rope_type={rope['rope_type']} is not supported; supported: default, llama3")
    for key, value in _LLAMA3_SCALING.items():
        if rope.get(key) != value:
            raise values.refuse(f"rope {key}={rope.get(key)} is not supported; Megatron-Core has {value} built in")
    return theta, values.positive_value("rope factor", rope["factor"])


def _rope(values: ConfigValues) -> dict[str, Any]:
    """Return the settings of the section that is there, with the defaults that transformers puts in."""
    found = {name: _complete(section, values) for name in (_NEW, _OLD) if (section := values.section(name))}
    if len(found) == 2 and found[_NEW] != found[_OLD]:
        keys = sorted(key for key in found[_NEW] | found[_OLD] if found[_NEW].get(key) != found[_OLD].get(key))
        raise values.refuse(
            f"{_NEW} and {_OLD} are both there and differ in {', '.join(keys)}: programs read the one or the other; "
            "keep the one that the weights were trained with"
        )
    return next(iter(found.values()), None) or _complete({}, values)


def _complete(section: dict[str, Any], values: ConfigValues) -> dict[str, Any]:
    nested = [key for key, value in section.items() if isinstance(value, dict)]
    if nested:
        raise values.refuse(f"RoPE settings for each kind of layer ({', '.join(nested)}) are not supported")
    outside = {key: values.config.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    kind = section.get("rope_type", section.get("type", "default"))
    rest = {key: value for key, value in section.items() if key != "type" and value is not None}
    rope = outside | rest | {"rope_type": kind}
    return rope | {"rope_theta": _DEFAULT_THETA if rope["rope_theta"] is None else rope["rope_theta"]}
