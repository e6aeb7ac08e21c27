"""The result of an evaluation: the class that each sample was taken for under each attack, and its figures."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from ferdlib import _checks
from ferdlib._checks import InvalidValue, got, public
from ferdlib.checkpoints import write_file
from ferdlib.evaluation import table
from ferdlib.evaluation.protocols import Protocol
from ferdlib.evaluation.result import AttackResult

FORMAT = "ferdlib.RobustnessReport"
VERSION = 1
WORST_CASE = "worst case"
# From so many classes on the papers give the worst 10 % in place of the worst class.
MANY_CLASSES = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One trust check and its evidence.

    Attributes:
        check: a sentence that should hold.
        verdict: "fine", "doubtful" (the robustness may be overestimated), or "not checked".
        evidence: the numbers, in a sentence.

    Example:
        >>> print(Finding(check="the model is deterministic", verdict="fine", evidence="two passes agree"))
        fine: the model is deterministic (two passes agree)
    """

    check: str
    verdict: Literal["fine", "doubtful", "not checked"]
    evidence: str

    def __str__(self) -> str:
        return f"{self.verdict}: {self.check} ({self.evidence})"


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
        index: int64 `(N,)`, indices of the samples in the data set, rising.
        targets: int64 `(N,)`, their labels.
        predictions: for "clean" and each attack int64 `(N,)`, the class that each sample was taken for.
        fooled_at: the same, the first stage that fooled a sample; the number of stages if none did.
        stages: the names of each attack's stages: iterates, or the members of AutoAttack after "clean", which is
            "before" where it was run on survivors.
        groups: int64 `(N,)`, if the rows are groups instead of classes; `group_names` names them.
        manifest: versions, device, model and data with their fingerprints.
        findings: of the trust checks, if they were asked for.
        timing: date, and the seconds of each attack.
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
        """K."""
        return len(self.class_names)

    @property
    def row_names(self) -> tuple[str, ...]:
        """Names of the groups if there are some, else of the classes."""
        return self.class_names if self.groups is None else self.group_names

    @property
    def rows(self) -> Tensor:
        """Row that each sample is in, int64 `(N,)`."""
        return self.targets if self.groups is None else self.groups

    @property
    def absent(self) -> tuple[str, ...]:
        """Names of the rows without samples."""
        counts = torch.bincount(self.rows, minlength=len(self.row_names)).tolist()
        return tuple(name for name, n in zip(self.row_names, counts, strict=True) if n == 0)

    @property
    def columns(self) -> tuple[str, ...]:
        """ "clean", the attacks in their order, "worst case"."""
        return (*self.predictions, WORST_CASE)

    def members(self, attack: str) -> tuple[str, ...]:
        """The columns `"AutoAttack/apgd-ce"` and so on of an AutoAttack; none of another attack."""
        kinds = {spec.name: spec.kind for spec in self.protocol.attacks}
        if kinds.get(attack) != "autoattack":
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

    @public
    def __getitem__(self, column: str) -> AttackResult:
        _checks.choice(self._known, column=column)
        predictions, k = self._predictions(column), self.num_classes
        return AttackResult(column, predictions, self.targets, k, self.row_names, self.rows)

    def _predictions(self, column: str) -> Tensor:
        if column in self.predictions:
            return self.predictions[column]
        if column == WORST_CASE:
            found = self.targets.clone()
            for k, predicted in enumerate(self.predictions.values()):
                found = torch.where(self.winner == k, predicted, found)
            return found
        # AutoAttack's members are cumulative: a sample counts as fooled from the stage that fooled it.
        attack, _, member = column.rpartition("/")
        fallen = self.fooled_at[attack] <= self.stages[attack].index(member)
        return torch.where(fallen, self.predictions[attack], self.targets)

    @cached_property
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

    @public
    def survival(self, attack: str) -> Tensor:
        """Share of each row that no stage up to the t-th has fooled, `(R, stages)`.

        For PGD and CW the t-th stage is the iterate x^(t), from the start to the last step.
        """
        _checks.choice(tuple(self.predictions), attack=attack)
        count, length = len(self.row_names), len(self.stages[attack]) + 1
        # A row and a stage as one number; the last stage is that of samples which withstood all.
        cells = self.rows * length + self.fooled_at[attack]
        fallen = torch.bincount(cells, minlength=count * length).reshape(count, length)
        return 1 - fallen[:, :-1].cumsum(dim=1) / fallen.sum(dim=1, keepdim=True).double()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RobustnessReport):
            return NotImplemented
        # By plain values, because tensors have no equality as a whole.
        mine, theirs = self.to_dict(), other.to_dict()
        del mine["timing"], theirs["timing"]
        return mine == theirs

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        parts = [
            self._title(),
            "in %, with 95 % intervals; NSD and target entropy as fractions. The interval of NSD is for the true\n"
            "accuracies: sampling noise only adds to the measured one, which may lie above it.\n",
            *(f"{table.aligned(rows)}\n" for rows in self._tables()),
            *map(table.one_line, [*self._notes(), *map(str, self.findings)]),
        ]
        return "\n".join(parts)

    def to_markdown(self) -> str:
        """Both tables, and under them all that a reader needs to judge and repeat them."""
        # A paragraph each, in the order of the text.
        winners, *notes = map(table.markdown, self._notes())
        attacks = [table.markdown(str(attack)) for attack in self.protocol.attacks]
        protocol = table.markdown(f"{self.protocol.name} (seed {self.protocol.seed})")
        parts = [
            f"**{table.markdown(self._title())}**",
            "In %, with 95 % intervals (NSD and target entropy as fractions): average and NSD by the bootstrap, "
            "worst class and worst 10 % from bounds that hold for all rows together, each row by Wilson. The "
            "target entropy is a mean over classes. Indented: AutoAttack up to that member.",
            *map(table.piped, self._tables()),
            f"{winners}.",
            *notes,
            "\n".join([f"Protocol {protocol}:", "", *(f"- {attack}" for attack in attacks)]),
        ]
        if self.findings:
            findings = (f"- {table.markdown(str(finding))}" for finding in self.findings)
            parts.append("\n".join(["Trust checks:", "", *findings]))
        if self.manifest:
            parts.append(self._origin())
        return "\n\n".join(parts) + "\n"

    def to_latex(self) -> str:
        """The papers' line: average, worst and NSD under each attack, with booktabs."""
        name = str(self.manifest.get("model", {}).get("class", "model"))
        worst: table.Worst = "10%" if len(self.row_names) >= MANY_CLASSES else "class"
        return table.paper_latex({name: {c: self[c] for c in self.predictions}}, worst)

    def to_csv(self) -> str:
        """A line for each attack and row: counts, accuracy, Wilson bounds."""
        return table.comma_separated([table.FIELDS, *table.class_lines(self._results())])

    def to_pandas(self) -> Any:
        """The lines of `to_csv` as a `pandas.DataFrame`."""
        try:
            import pandas
        except ImportError as error:
            said = "RobustnessReport.to_pandas: expected pandas, got none; pip install pandas"
            raise ImportError(said) from error
        return pandas.DataFrame(table.class_lines(self._results()), columns=table.FIELDS)

    def _results(self) -> dict[str, AttackResult]:
        return {column: self[column] for column in self.columns}

    def _tables(self) -> tuple[table.Rows, table.Rows]:
        """Figures of each attack and, indented, of AutoAttack's members; and the rows under each attack."""
        results = self._results()
        headings = []
        for column, found in results.items():
            members = [(f"  {m.rpartition('/')[2]}", self[m]) for m in self.members(column)]
            headings += [(column, found), *members]
        title = "class" if self.groups is None else "group"
        return table.figure_rows(headings), table.class_rows(results, title)

    def _title(self) -> str:
        model = self.manifest.get("model", {})
        size = f" ({model['parameters']:,} parameters)" if model.get("parameters") else ""
        rows = f"{len(self.row_names)} {'classes' if self.groups is None else 'groups'}"
        return (
            f"{model.get('class', 'model')}{size}, {len(self):,} samples of {rows}, protocol "
            f"{self.protocol.name} (seed {self.protocol.seed})"
        )

    def _notes(self) -> list[str]:
        """Winners, attacks on survivors, and rows without samples."""
        none, *fooled = torch.bincount(self.winner + 1, minlength=len(self.columns)).tolist()
        fallen = [f"{name} {n:,}" for name, n in zip(self.predictions, fooled, strict=True)]
        notes = [f"first fooled by: {', '.join(fallen)}; by none {none:,}"]
        notes += [
            f"{spec.name} was run on what withstood all before it: its rows are the worst case up to there"
            for spec in self.protocol.attacks
            if spec.survivors
        ]
        if absent := self.absent:
            notes.append(f"no samples, left out of every figure: {table.listed(absent)}")
        return notes

    def _origin(self) -> str:
        manifest = self.manifest
        versions = ", ".join(f"{name} {v}" for name, v in manifest["versions"].items())
        precision = "".join(f", {name} {v}" for name, v in manifest["precision"].items() if v)
        return (
            f"Made {self.timing.get('created', '')} on {manifest['device']}{precision} with {versions}. Model "
            f"`{manifest['model']['fingerprint'] or 'callable'}`, data `{manifest['data']['fingerprint']}`."
        )

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
    @public
    def from_dict(content: Mapping[str, Any]) -> RobustnessReport:
        """Read what `to_dict` gave; ValueError for something else, or a version that is not known here."""
        if not isinstance(content, Mapping) or content.get("format") != FORMAT:
            raise InvalidValue(f"expected `content` of a saved report, got {got(content)}")
        if (version := content.get("version")) != VERSION:
            raise InvalidValue(f"expected `content` of version {VERSION}, got {version!r}")
        missing = [f.name for f in fields(RobustnessReport) if f.name not in content]
        if missing:
            raise InvalidValue(f"expected `content` of a complete report, got none of {missing}")

        def tensor(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device="cpu")

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

    @public
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON, whole or not at all; OSError where that is impossible."""
        target = _checks.path("path", path)
        try:
            write_file(target, json.dumps(self.to_dict()))
        except OSError as error:
            said = f"RobustnessReport.save: expected to write {str(target)!r}, got {error}"
            raise OSError(said) from error

    @staticmethod
    @public
    def load(path: str | os.PathLike[str]) -> RobustnessReport:
        """Read what `save` wrote; FileNotFoundError without a file, ValueError for a damaged or another one."""
        file = _checks.file("path", path)
        try:
            content = json.loads(file.read_text("utf-8"))
        except ValueError as error:
            said = f"expected a complete report in {str(path)!r}, got {error}"
            raise InvalidValue(said) from error
        return RobustnessReport.from_dict(content)
