"""The study of trust: what each trust gains against GRPO, from a pre-registration that is older than its results.

`world.py`, `judges.py`: policies whose true rewards are known, and judges who err; `arms.py`, `surrogate.py`: training
them; `groups.py`, `signals.py`: real groups with an oracle; `comparison.py`: paired statistics; `results.py`,
`report.py`: files.
"""
