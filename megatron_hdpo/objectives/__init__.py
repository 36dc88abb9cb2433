"""Training objectives: groups of rollouts in, per-token numbers out; one file per method.

May import types, data and rewards; never the model, the trainer or torch.distributed.
Start with base.py (what a method answers), then grpo.py, then opsd.py. registry.py lists the methods.

| method | file | source (arXiv) |
|---|---|---|
| grpo | grpo.py | 2402.03300; options of 2503.14476 (DAPO), 2507.18071 (GSPO), 2503.20783 (Dr. GRPO) |
| hdpo | hdpo.py | 2603.23871 |
| opd | opd.py | 2306.13649; single sample: Thinking Machines, "On-policy distillation", 2025 |
| vopd | vopd.py | 2605.07865 |
| akl | akl.py | 2404.02657 |
| opsd | opsd.py | 2601.18734 |
| sdpo | sdpo.py | 2601.20802 |
| srpo | srpo.py | 2604.02288 |
| rlsd | rlsd.py | 2604.03128; evidence=contrast: 2606.11709 |
| rlcsd | rlcsd.py | 2606.11709 |
| contrastive_opsd | contrastive_opsd.py | 2606.11709 |
| paced | paced.py | 2603.11178 |
"""
