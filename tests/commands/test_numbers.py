"""Numbers on a command line that no command can mean."""

from __future__ import annotations

import pytest

from megatron_hdpo import cli
from megatron_hdpo.commands.numbers import LARGEST

WRONG = {
    "check r.yaml --ranks 0": f"argument --ranks: must be an integer from 1 to {LARGEST}, not '0'",
    "check r.yaml --ranks -4": f"argument --ranks: must be an integer from 1 to {LARGEST}, not '-4'",
    "check r.yaml --ranks 2.5": f"argument --ranks: must be an integer from 1 to {LARGEST}, not '2.5'",
    "check r.yaml --ranks many": f"argument --ranks: must be an integer from 1 to {LARGEST}, not 'many'",
    "check r.yaml --ranks 99999999999": f"argument --ranks: must be an integer from 1 to {LARGEST}, not '99999999999'",
    "plan r.yaml --nodes 0": f"argument --nodes: must be an integer from 1 to {LARGEST}, not '0'",
    "plan r.yaml --cliff-rate 1.5": "argument --cliff-rate: must be a number from 0 to 1, not '1.5'",
    "plan r.yaml --cliff-rate nan": "argument --cliff-rate: must be a number from 0 to 1, not 'nan'",
    "plan r.yaml --response-tokens 0": f"argument --response-tokens: must be an integer from 1 to {LARGEST}, not '0'",
    "sample m p --samples 0": f"argument -n/--samples: must be an integer from 1 to {LARGEST}, not '0'",
    "sample m p --temperature inf": "argument --temperature: must be a number from 0 to 1000, not 'inf'",
    "sample m p --temperature -1": "argument --temperature: must be a number from 0 to 1000, not '-1'",
    "sample m p --seed -1": f"argument --seed: must be an integer from 0 to {LARGEST}, not '-1'",
    "chat m --max-new-tokens 0": f"argument --max-new-tokens: must be an integer from 1 to {LARGEST}, not '0'",
    "convert a b --to huggingface --tensor 0": f"argument --tensor: must be an integer from 1 to {LARGEST}, not '0'",
    "make-tiny-model out --layers 0": "argument --layers: must be an integer from 1 to 65536, not '0'",
    "make-tiny-model out --hidden 1e6": "argument --hidden: must be an integer from 1 to 65536, not '1e6'",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_numbers(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.parser().parse_args(line.split())
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].partition(": error: ")[2] == WRONG[line]


def test_right_numbers() -> None:
    given = cli.parser().parse_args(["sample", "m", "p", "-n", "3", "--temperature", "0", "--seed", "0"])
    assert (given.samples, given.temperature, given.seed) == (3, 0.0, 0)
    assert cli.parser().parse_args(["plan", "r.yaml", "--cliff-rate", "1", "--rollout-gpus", "0"]).cliff_rate == 1.0
