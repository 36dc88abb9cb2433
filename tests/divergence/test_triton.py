"""The Triton kernels in Triton's interpreter, which must be on before they are imported: in another process."""

from __future__ import annotations

from run_script import needs_triton, run_script


@needs_triton
def test_kernels_agree_with_the_definitions_in_the_interpreter() -> None:
    assert "cases" in run_script("triton_in_interpreter.py", TRITON_INTERPRET="1")


@needs_triton
def test_kernels_compile_for_hopper_within_their_budget_of_instructions() -> None:
    """Registers, loads and instructions per logit, read from the machine code.

    An H200 delivers about 10 bfloat16 logits per cycle and SM, which issues 128 lanes' instructions in that time.
    """
    assert "gradient_kernel" in run_script("triton_ahead.py")
