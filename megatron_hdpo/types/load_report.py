"""Report of the problems that loading dropped, counted by task and reason, with an example of each."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_hdpo.types.errors import DataError


@dataclass
class LoadReport:
    """Counts of dropped and kept problems.

    `counts[task][reason]`: dropped problems. `examples[task][reason]`: where the first of them was. `kept[task]`: the
    others. `cut[task]`: problems whose worked solution does not fit its prompt. `escaped[task]`: those whose text
    spells a control token, which is encoded as ordinary characters, and `first_escaped[task]` the first. notes: what
    the user should know of the prompts.
    """

    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    examples: dict[str, dict[str, str]] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    escaped: dict[str, int] = field(default_factory=dict)
    first_escaped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def drop(self, task: str, reason: str, where: str) -> None:
        """Count one dropped problem of `task`; `where` says which."""
        reasons = self.counts.setdefault(task, {})
        reasons[reason] = reasons.get(reason, 0) + 1
        self.examples.setdefault(task, {}).setdefault(reason, where)

    def escape(self, task: str, where: str) -> None:
        """Count one problem of `task` that spells a control token; `where` says which."""
        self.escaped[task] = self.escaped.get(task, 0) + 1
        self.first_escaped.setdefault(task, where)

    def reject(self, task: str, policy: str, reason: str, message: str) -> None:
        """Raise DataError for a bad row under the policy `error`; count it as dropped under `drop`."""
        if policy == "error":
            raise DataError(f"{message}; correct the row, or set on_bad_row: drop for task {task!r}")
        self.drop(task, reason, message)

    def merge(self, other: LoadReport) -> None:
        """Add what another report counted, of other tasks."""
        for task, counts in other.counts.items():
            self.counts.setdefault(task, {}).update(counts)
        for task, examples in other.examples.items():
            self.examples.setdefault(task, {}).update(examples)
        self.kept.update(other.kept)
        self.cut.update(other.cut)
        self.escaped.update(other.escaped)
        self.first_escaped.update(other.first_escaped)

    def lines(self) -> list[str]:
        """Return one line of text per note and task, and one per reason for which problems were dropped or escaped."""
        lines = [f"note: {note}" for note in self.notes]
        for task in sorted(self.kept.keys() | self.counts.keys() | self.cut.keys()):
            lines.append(f"{task}: {self.kept.get(task, 0)} problems")
            if cut := self.cut.get(task):
                lines.append(
                    f"{task}: {cut} solutions do not fit data.prompts.max_privileged_tokens: their ends are cut off, "
                    "and the answer is shown in addition"
                )
            for reason, count in sorted(self.counts.get(task, {}).items()):
                lines.append(f"{task}: {count} left out, {reason} (first: {self.examples[task][reason]})")
            if task in self.escaped:
                lines.append(
                    f"{task}: {self.escaped[task]} with the text of a control token, encoded as ordinary characters "
                    f"(first: {self.first_escaped[task]})"
                )
        return lines
