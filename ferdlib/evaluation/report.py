"""The result of an evaluation: what each sample was taken for under each attack, and all figures of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from ferdlib import _oldchecks as _checks
from ferdlib.evaluation.figures import AttackResult
from ferdlib.evaluation.protocols import Protocol
from ferdlib.evaluation.trust import Finding

FORMAT = "ferdlib.RobustnessReport"
VERSION = 1
WORST_CASE = "worst case"


@dataclass(frozen=True, eq=False, kw_only=True)
class RobustnessReport:
    """Class-wise robustness of one model under one protocol.

    `report["PGD-20"]` is an `AttackResult` with the figures of that attack; so are `report["clean"]`,
    `report["worst case"]` (a sample counts if it is correct under all of them), and
    `report["AutoAttack/apgd-t"]`, AutoAttack as far as that member. `print(report)` shows a table.

    Two reports are equal if all but their timing is.

    Attributes:
        protocol: the attacks.
        class_names: of the K classes.
        index: int64 `(N,)`, which samples of the data set, rising.
        targets: int64 `(N,)`, their labels.
        predictions: for "clean" and each attack int64 `(N,)`, what the samples were taken for.
        fooled_at: the same, the first stage that fooled a sample; the number of stages if none did.
        stages: the names of each attack's stages: iterates, or the members of AutoAttack after "clean", which
            is "before" where it was run on survivors.
        groups: int64 `(N,)`, if the rows are groups instead of classes; `group_names` names them.
        manifest: versions, device, model and data with their fingerprints.
        findings: of the trust checks, if they were asked for.
        timing: when it was made, and the seconds of each attack.
    """

    protocol: Protocol
    class_names: tuple[str, ...]
    index: Tensor
    targets: Tensor
    predictions: dict[str, Tensor]
    fooled_at: dict[str, Tensor]
    stages: dict[str, tuple[str, ...]]
    groups: Tensor | None = None
    group_names: tuple[str, ...] = ()
    manifest: dict[str, Any] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    timing: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def row_names(self) -> tuple[str, ...]:
        """Of the groups if there are some, else of the classes."""
        return self.class_names if self.groups is None else self.group_names

    @property
    def rows(self) -> Tensor:
        """The row that each sample is in, int64 `(N,)`."""
        return self.targets if self.groups is None else self.groups

    @property
    def columns(self) -> tuple[str, ...]:
        """ "clean", the attacks in their order, "worst case"."""
        return (*self.predictions, WORST_CASE)

    def members(self, attack: str) -> tuple[str, ...]:
        """The columns `"AutoAttack/apgd-ce"` and so on of an AutoAttack; none of another attack."""
        spec = next((a for a in self.protocol.attacks if a.name == attack), None)
        if spec is None or spec.kind != "autoattack":
            return ()
        return tuple(f"{attack}/{stage}" for stage in self.stages[attack][1:])

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __contains__(self, column: object) -> bool:
        return column in self._known

    @property
    def _known(self) -> tuple[str, ...]:
        members = (m for attack in self.predictions for m in self.members(attack))
        return (*self.columns, *members)

    def __getitem__(self, column: str) -> AttackResult:
        _checks.choice("RobustnessReport", "column", column, self._known)
        return AttackResult.of(
            column,
            self._predictions(column),
            self.targets,
            num_classes=self.num_classes,
            row_names=self.row_names,
            rows=self.rows,
        )

    def _predictions(self, column: str) -> Tensor:
        if column in self.predictions:
            return self.predictions[column]
        if column == WORST_CASE:
            winner = self.winner
            found = self.targets.clone()
            for k, attack in enumerate(self.predictions):
                found = torch.where(winner == k, self.predictions[attack], found)
            return found
        attack, _, member = column.rpartition("/")
        fallen = self.fooled_at[attack] <= self.stages[attack].index(member)
        return torch.where(fallen, self.predictions[attack], self.targets)

    @property
    def winner(self) -> Tensor:
        """Per sample the first column that fooled it, an index into `columns`; -1 if none did."""
        winner = torch.full_like(self.targets, -1)
        for k, predicted in enumerate(self.predictions.values()):
            winner = torch.where((winner < 0) & (predicted != self.targets), k, winner)
        return winner

    @property
    def winners(self) -> tuple[str, ...]:
        """Per sample the name of what fooled it first, "" if nothing did; AutoAttack's by member."""
        names = []
        for i, k in enumerate(self.winner.tolist()):
            attack = self.columns[k] if k >= 0 else ""
            member = self.stages[attack][int(self.fooled_at[attack][i])] if attack else ""
            names.append(f"{attack}/{member}" if self.members(attack) else attack)
        return tuple(names)

    def survival(self, attack: str) -> Tensor:
        """Share of each row that no stage up to the t-th has fooled, `(R, stages)`.

        For PGD and CW the t-th stage is the iterate x^(t), from the start to the last step.
        """
        _checks.choice("RobustnessReport.survival", "attack", attack, tuple(self.predictions))
        count, length = len(self.row_names), len(self.stages[attack])
        fallen = torch.zeros(count, length + 1, dtype=torch.int64)
        fallen.index_put_(
            (self.rows, self.fooled_at[attack]), torch.ones_like(self.rows), accumulate=True
        )
        totals = fallen.sum(dim=1, keepdim=True).double()
        return 1 - fallen[:, :-1].cumsum(dim=1) / totals

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RobustnessReport):
            return NotImplemented
        mine, theirs = self.to_dict(), other.to_dict()
        del mine["timing"], theirs["timing"]
        return mine == theirs

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        from ferdlib.evaluation.tables import report_text

        return report_text(self)

    def to_markdown(self) -> str:
        """Both tables, the protocol and the findings, in Markdown."""
        from ferdlib.evaluation.tables import report_markdown

        return report_markdown(self)

    def to_latex(self) -> str:
        """The papers' line: average, worst and NSD under each attack, with booktabs."""
        from ferdlib.evaluation.compare import compare

        return compare({str(self.manifest.get("model", {}).get("class", "model")): self}).to_latex()

    def to_csv(self) -> str:
        """A line for each attack and row: counts, accuracy, Wilson bounds."""
        from ferdlib.evaluation.tables import report_csv

        return report_csv(self)

    def to_pandas(self) -> Any:
        """The lines of `to_csv` as a `pandas.DataFrame`."""
        from ferdlib.evaluation.tables import FIELDS, report_lines

        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "RobustnessReport.to_pandas: expected pandas, got none; pip install pandas"
            ) from error
        return pandas.DataFrame(report_lines(self), columns=FIELDS)

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain values, for JSON."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "protocol": self.protocol.to_dict(),
            "class_names": list(self.class_names),
            "index": self.index.tolist(),
            "targets": self.targets.tolist(),
            "predictions": {name: p.tolist() for name, p in self.predictions.items()},
            "fooled_at": {name: f.tolist() for name, f in self.fooled_at.items()},
            "stages": {name: list(s) for name, s in self.stages.items()},
            "groups": None if self.groups is None else self.groups.tolist(),
            "group_names": list(self.group_names),
            "manifest": self.manifest,
            "findings": [asdict(finding) for finding in self.findings],
            "timing": self.timing,
        }

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> RobustnessReport:
        """What `to_dict` gave.

        Raises:
            ValueError: something else, or a version that this one does not know.
        """
        function = "RobustnessReport.from_dict"
        if not isinstance(content, Mapping) or content.get("format") != FORMAT:
            raise ValueError(
                f"{function}: expected `content` of a saved report, got {_checks.got(content)}"
            )
        if content.get("version") != VERSION:
            raise ValueError(
                f"{function}: expected `content` of version {VERSION}, got {content.get('version')!r}"
            )
        missing = [f.name for f in fields(RobustnessReport) if f.name not in content]
        if missing:
            raise ValueError(
                f"{function}: expected `content` of a complete report, got none of {missing}"
            )

        def tensor(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64)

        return RobustnessReport(
            protocol=Protocol.from_dict(content["protocol"]),
            class_names=tuple(content["class_names"]),
            index=tensor(content["index"]),
            targets=tensor(content["targets"]),
            predictions={name: tensor(p) for name, p in content["predictions"].items()},
            fooled_at={name: tensor(f) for name, f in content["fooled_at"].items()},
            stages={name: tuple(s) for name, s in content["stages"].items()},
            groups=None if content["groups"] is None else tensor(content["groups"]),
            group_names=tuple(content["group_names"]),
            manifest=content["manifest"],
            findings=tuple(Finding(**finding) for finding in content["findings"]),
            timing=content["timing"],
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """As JSON, whole or not at all.

        Raises:
            TypeError: what is no path.
            OSError: the file cannot be written.
        """
        target = _checks.path("RobustnessReport.save", "path", path)
        partial = target.with_name(f"{target.name}.partial")
        try:
            partial.write_text(json.dumps(self.to_dict()), "utf-8")
            os.replace(partial, target)
        except OSError as error:
            raise OSError(
                f"RobustnessReport.save: expected to write {str(target)!r}, got {error}"
            ) from error

    @staticmethod
    def load(path: str | os.PathLike[str]) -> RobustnessReport:
        """What `save` wrote.

        Raises:
            TypeError: what is no path.
            FileNotFoundError: no such file.
            ValueError: a damaged file, or something else.
        """
        file = _checks.path("RobustnessReport.load", "path", path)
        if not file.is_file():
            raise FileNotFoundError(
                f"RobustnessReport.load: expected `path` to be a file, got {str(path)!r}"
            )
        try:
            content = json.loads(file.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(
                f"RobustnessReport.load: expected a complete report in {str(path)!r}, got {error}"
            ) from error
        return RobustnessReport.from_dict(content)
