"""Load a trained Hugging Face checkpoint with plain `transformers` and let it answer one problem.

python examples/quickstart/show_result.py runs/quickstart/hf
"""

from __future__ import annotations

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, logging

QUESTION = "State the final answer to the following arithmetic problem: 7 + 5 - 3 ="


def main() -> None:
    """The command line."""
    logging.disable_progress_bar()
    path = sys.argv[1]
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    messages = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=48, do_sample=False)
    print(f"\n{path} loads in transformers. It was asked:\n  {QUESTION}\nand answers:")
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    print("  " + answer.replace("\n", "\n  "))


if __name__ == "__main__":
    main()
