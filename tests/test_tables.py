"""Names that mean something to a file format are shown as they are."""

import csv
import io

import pytest
import torch

from ferdlib.evaluation import AttackResult, table

Y = torch.tensor([0, 0, 1, 1, 2, 2])


def result(names=("a", "b", "c")):
    """Class 0 all right, the others half."""
    return AttackResult.of(
        "PGD", torch.tensor([0, 0, 1, 0, 2, 0]), Y, num_classes=3, row_names=names
    )


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("[2pt] ours", "{[}2pt] ours"),  # else an argument of the \\ before it
        ("*ours", "{*}ours"),
        ("A<B>|C", r"A\textless{}B\textgreater{}\textbar{}C"),
        ("a--b---c", "a-{}-b-{}-{}-c"),
        ("two\n\nlines", "two  lines"),  # an empty line ends a paragraph, and the cell
        ("50 %_$", r"50 \%\_\$"),
    ],
)
def test_latex(name, written):
    text = table.paper_latex({"RSLAD": {"clean": result()}, name: {"clean": result()}}, "class")
    assert text.splitlines()[7].startswith(f"{written} & ")


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("a\nb", "a b"),
        ("<b>&", "&lt;b&gt;&amp;"),
        ("a|b", r"a\|b"),
        ("a\\|b", r"a\\\|b"),
        ("*a* _b_ `c`", r"\*a\* \_b\_ \`c\`"),
        ("[a](b)", r"[a\](b)"),
        ("  member", "&nbsp;&nbsp;member"),
    ],
)
def test_markdown(name, written):
    text = table.piped([["", "x"], [name, "1.0 [0.5, 1.5]"]])
    assert text.splitlines()[2:] == [f"| {written} | 1.0 [0.5, 1.5] |"]


def test_a_terminal_gets_one_line_for_a_row():
    text = table.aligned([["", "x"], ["a\r\nb\x1b[2J", "1  2"]])
    assert text.splitlines()[2:] == ["a  b [2J  1  2"]


@pytest.mark.parametrize("name", ["=1+1", "+cmd", "-cmd|x", "@sum", " =1"])
def test_csv_has_no_formulas(name):
    text = table.comma_separated([(name, -0.5, "-1", "+3.5", "a-b", torch.nan)])
    assert next(csv.reader(io.StringIO(text))) == [f"'{name}", "-0.5", "-1", "+3.5", "a-b", ""]


def test_classes_that_are_as_bad_as_the_worst_are_counted():
    ((_, row),) = [table.figure_rows([("PGD", result())])]
    assert row[3] == "b and 1 more"


def test_of_many_names_the_first_ten_are_listed():
    names = [f"c{k}" for k in range(21)]
    assert table.listed(names[:20]) == ", ".join(names[:20])
    assert table.listed(names) == ", ".join(names[:10]) + " and 11 more"
