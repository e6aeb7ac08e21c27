"""What the figures draw, read back from the artists and compared with values worked out by hand."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from bad_input import plots as _plots  # noqa: F401  enters the calls
from bad_input.table import CALLS
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ferdlib import plots
from ferdlib.attacks import least_pgd_steps

nan = math.nan
A, B = torch.tensor([0.9, 0.25, 0.5]), torch.tensor([nan, 0.75, 0.375])
COUNTS = torch.tensor([[6, 2, 0], [0, 0, 0], [1, 4, 5]])
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def example(name, k=3, **options):
    """Each function on something small with k classes."""
    rows, classes = torch.linspace(0.2, 0.8, k), torch.arange(k)
    if name == "plot_classes":
        return plots.plot_classes({"a": rows, "b": rows.flip(0)}, **options)
    if name == "plot_confusion":
        return plots.plot_confusion(torch.eye(k).long() * 3 + 1, **options)
    if name == "plot_weights":
        return plots.plot_weights(1 / rows, rows, **options)
    if name == "plot_sweep":
        runs = torch.arange(12.0).reshape(3, 4)
        return plots.plot_sweep([1, 2, 3], {"a": runs}, xlabel="x", ylabel="y", **options)
    if name == "plot_images":
        x = torch.full((k, 3, 4, 4), 0.5)
        return plots.plot_images(x, classes, num_classes=k, per_class=2, **options)
    return plots.plot_survival(classes % 5, classes, num_classes=k, steps=3, **options)


def draw(ax):
    """All of a rendering, errors and the places of texts included, but its pixels."""
    ax.figure.draw_without_rendering()


def close(actual, expected, atol=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol, equal_nan=True)


def texts(artists):
    return [text.get_text() for text in artists]


def legend(ax):
    return texts(ax.get_legend().get_texts())


def apart(artists):
    """No two of these texts share a pixel."""
    boxes = [artist.get_window_extent() for artist in artists]
    return not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


every_plot = pytest.mark.parametrize("name", plots.__all__)
every_plot_of_classes = pytest.mark.parametrize("name", sorted({*plots.__all__} - {"plot_sweep"}))


@every_plot
def test_a_given_ax_is_drawn_on_and_nothing_else_changes(name):
    figure, (other, ax) = plt.subplots(1, 2)
    try:
        plt.sca(other)
        before = dict(matplotlib.rcParams), matplotlib.get_backend(), plt.get_fignums()
        assert example(name, ax=ax) is ax
        assert ax.has_data()
        assert not other.has_data()
        assert (dict(matplotlib.rcParams), matplotlib.get_backend(), plt.get_fignums()) == before
        assert plt.gca() is other
        draw(ax)
    finally:
        plt.close(figure)


@every_plot
def test_a_new_figure_is_none_of_pyplots(name):
    assert example(name) is not example(name)
    assert plt.get_fignums() == []
    draw(example(name))


def test_matplotlib_comes_with_the_first_drawing_and_pyplot_never(tmp_path):
    program = (
        "import sys, torch, ferdlib.plots as plots; assert 'matplotlib' not in sys.modules\n"
        "plots.plot_classes({'a': torch.ones(3)}).figure.savefig(sys.argv[1])\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    picture = tmp_path / "classes.png"
    subprocess.run([sys.executable, "-c", program, str(picture)], check=True)
    assert picture.stat().st_size > 0


@every_plot
def test_without_matplotlib_one_sentence_says_what_to_install(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    with pytest.raises(ImportError) as caught:
        example(name)
    assert str(caught.value).startswith("ferdlib.plots: expected matplotlib, got ")
    assert str(caught.value).endswith('; pip install "ferdlib[plot]"')


@every_plot_of_classes
@pytest.mark.parametrize("k", [2, 10, 100, 200])
@pytest.mark.parametrize("named", [False, True])
def test_class_names_are_readable(name, k, named):
    """Those at the ticks belong there, in the order of the classes, and do not overlap."""
    names = [f"class name {c}" for c in range(k)] if named else None
    ax = example(name, k, class_names=names)
    draw(ax)
    expected = names or [str(c) for c in range(k)]
    if name == "plot_survival":
        every = names or [f"class {c}" for c in range(k)]
        ends = ", ends at 0.0" if k <= 12 else f" and {4 * k // 5 - 1} more, which end at 0.0"
        assert set(legend(ax)[1:]) <= {name + end for name in every for end in ("", ends)}
        assert len(legend(ax)) == (k + 1 if k <= 12 else 2)
        return
    pitch, first = (5, 1.5) if name == "plot_images" else (1, 0)  # 4 pixels and a gap
    for axis in {"plot_images": "y", "plot_confusion": "xy"}.get(name, "x"):
        labels = getattr(ax, f"get_{axis}ticklabels")()
        places = (np.array(getattr(ax, f"get_{axis}ticks")()) - first) / pitch
        assert texts(labels) == [expected[int(c)] for c in places]
        assert len(set(np.diff(places))) <= 1
        assert k <= 10 or 10 <= len(labels) <= 100 or name == "plot_images"
        assert len(labels) == k or k > 10
        if labels[0].get_rotation() == 0:
            assert apart(labels)
        else:  # slanted lines, of one height, at this distance from each other
            step = np.diff([label.get_window_extent().x1 for label in labels]).min()
            assert step * math.sin(math.radians(45)) > labels[0].get_size() * ax.figure.dpi / 72


def test_bars_and_the_worst_of_each():
    ax = plots.plot_classes({"a": A, "b": B}, ylabel="AA (%)")
    a, worst_a, b, worst_b = ax.containers
    close([bar.get_height() for bar in a], [90, 25, 50])
    close([bar.get_height() for bar in b], [nan, 75, 37.5])
    close([bar.get_x() + bar.get_width() / 2 for bar in a], [-0.2, 0.8, 1.8])
    close([bar.get_x() + bar.get_width() / 2 for bar in b], [0.2, 1.2, 2.2])
    assert [bar for bar in ax.patches if bar.get_hatch()] == [*worst_a, *worst_b]
    close(worst_a[0].get_bbox().bounds, a[1].get_bbox().bounds)
    close(worst_b[0].get_bbox().bounds, b[2].get_bbox().bounds)
    assert texts(ax.texts) == ["25.0", "37.5"]
    close([text.xy for text in ax.texts], [(0.8, 25), (2.2, 37.5)])
    assert legend(ax) == ["a", "b", "worst class"]
    assert ax.get_ylabel() == "AA (%)"
    assert ax.get_ylim()[0] == 0


def test_the_axis_ends_at_the_next_ten():
    """0.8 in float32 is 80.000001 %."""
    ax = plots.plot_classes({"a": torch.tensor([0.2, 0.8], dtype=torch.float32)})
    assert ax.get_yticks().tolist() == [0, 20, 40, 60, 80]
    assert 80 < ax.get_ylim()[1] < 85


def test_every_class_that_is_as_bad_as_the_worst_is_marked():
    tied = {"a": torch.tensor([0.5, 0.25, 0.25, 0.5])}
    ax = plots.plot_classes(tied)
    assert [bar.get_x() + bar.get_width() / 2 for bar in ax.containers[1]] == [1, 2]
    assert texts(ax.texts) == ["25.0"]
    close(plots.plot_classes(tied, kind="points").lines[1].get_xydata(), [(1, 25), (2, 25)])


@pytest.mark.parametrize("kind", ["bars", "points", "lines"])
@pytest.mark.parametrize("accuracy", [0.0, 0.02, 0.97])
def test_an_axis_of_accuracies_ends_at_0_and_100(kind, accuracy):
    """Values that find no room below 100 % stand above the frame, apart from each other."""
    rows = {f"model {i}": torch.tensor([accuracy + i / 1000, 1.0]) for i in range(7)}
    ax = plots.plot_classes(rows, kind=kind)
    draw(ax)
    assert ax.get_ylim()[0] == 0
    assert 100 < ax.get_ylim()[1] <= 103
    assert apart(ax.texts)
    assert plots.plot_weights(A, A + 0.1).get_ylim()[1] <= 103


def test_only_kind_lines_connects_classes_which_have_no_order():
    styles = [
        plots.plot_classes({"a": A}, kind=k).lines[0].get_linestyle() for k in ("points", "lines")
    ]
    assert styles == ["None", "-"]
    assert plots.plot_weights(A, A).figure.axes[-1].lines[0].get_linestyle() == "None"


def test_names_are_written_as_they_are():
    """No formulas, and none left out."""
    names = ["US$ 5", "$x_1^{", "_hidden"]
    rows = dict.fromkeys(names, A)
    sweep = dict.fromkeys(names, torch.ones(2))
    y = torch.arange(3)
    for ax in (
        plots.plot_classes(rows, class_names=names),
        plots.plot_confusion(COUNTS, class_names=names),
        plots.plot_sweep([1, 2], sweep, xlabel="x", ylabel="y"),
        plots.plot_survival(y, y, num_classes=3, steps=2, class_names=names),
    ):
        draw(ax)
        written = legend(ax) if ax.get_legend() else texts(ax.get_xticklabels())
        assert [name for name in names if any(text.startswith(name) for text in written)] == names


def test_an_absent_class_is_a_gap():
    ax = plots.plot_classes({"b": B})
    canvas = FigureCanvasAgg(ax.figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    for c, drawn in ((0, False), (1, True)):
        x, y = ax.transData.transform((c, 20)).round().astype(int)
        assert (pixels[len(pixels) - y, x] == 255).all() != drawn


@pytest.mark.parametrize("kind", ["bars", "lines"])
def test_a_model_without_any_class_has_no_worst_one(kind):
    ax = plots.plot_classes({"a": A, "none": torch.full((3,), nan)}, kind=kind)
    assert texts(ax.texts) == ["25.0"]
    draw(ax)
    draw(plots.plot_classes({"none": torch.full((3,), nan)}, kind=kind))


def test_lines_and_the_worst_of_each():
    ax = plots.plot_classes({"a": A, "b": B}, kind="lines", class_names=["x", "y", "z"])
    a, worst_a, b, worst_b = ax.lines
    close(a.get_xdata(), [0, 1, 2])
    close(a.get_ydata(), [90, 25, 50])
    close(b.get_ydata(), [nan, 75, 37.5])
    close(worst_a.get_xydata(), [(1, 25)])
    close(worst_b.get_xydata(), [(2, 37.5)])
    assert worst_a.get_markersize() > a.get_markersize()
    assert texts(ax.texts) == ["25.0", "37.5"]
    close([text.xy for text in ax.texts], [(1, 25), (2, 37.5)])
    assert texts(ax.get_xticklabels()) == ["x", "y", "z"]
    assert not ax.patches


@pytest.mark.parametrize("kind", ["bars", "lines"])
@pytest.mark.parametrize("models", [2, 4, 7, 12])
def test_values_of_the_same_worst_class_do_not_overlap(kind, models):
    rows = {f"model {i}": torch.linspace(0.2, 0.8, 10) + i / 100 for i in range(models)}
    ax = plots.plot_classes(rows, kind=kind, class_names=CIFAR10)
    draw(ax)
    assert texts(ax.texts) == [f"{20 + i}.0" for i in range(models)]
    assert apart(ax.texts)
    inside = ax.get_window_extent()
    for text in ax.texts:
        box = text.get_window_extent()
        assert inside.y0 < box.y0
        assert box.y1 < inside.y1 + 1


def test_a_value_stays_under_its_line_where_there_is_room():
    rows = {"clean": torch.tensor([0.9, 0.8]).flip(0), "PGD": torch.tensor([0.2, 0.5])}
    rows |= {"AA": torch.tensor([0.18, 0.5])}
    ax = plots.plot_classes(rows, kind="lines")
    (_, clean), (_, pgd), (_, aa) = (text.xy for text in ax.texts)
    assert clean == pytest.approx(80)
    assert aa < pgd == pytest.approx(18)


@pytest.mark.parametrize("kind", ["bars", "lines"])
def test_intervals_are_error_bars(kind):
    ends = torch.tensor([[0.8, 0.95], [nan, nan], [0.5, 0.75]])
    ax = plots.plot_classes({"a": A, "b": B}, intervals={"a": ends}, kind=kind)
    (bars,) = [c for c in ax.containers if hasattr(c, "has_yerr")]
    x = [-0.2, 0.8, 1.8] if kind == "bars" else [0, 1, 2]
    segments = [[(x[0], 80), (x[0], 95)], [(x[1], 25), (x[1], 25)], [(x[2], 50), (x[2], 75)]]
    close(bars.lines[2][0].get_segments(), segments)
    draw(ax)


def test_a_value_stands_above_its_error_bar():
    ends = torch.tensor([[0.8, 0.95], [0.2, 0.4], [0.5, 0.75]])
    close(plots.plot_classes({"a": A}, intervals={"a": ends}).texts[0].xy, (1, 40))


def test_an_interval_may_miss_its_accuracy_by_rounding():
    ends = torch.tensor([[0.8, 1.0], [-1e-8, 0.25 - 1e-7], [0.5, 0.5]])
    draw(plots.plot_classes({"a": A}, intervals={"a": ends}))


def test_confusion_in_percent_of_the_row():
    ax = plots.plot_confusion(COUNTS, class_names=["x", "y", "z"])
    errors, diagonal = ax.images
    close(errors.get_array().filled(nan), [[nan, 25, 0], [nan, nan, nan], [10, 40, nan]])
    close(diagonal.get_array().filled(nan), [[75, nan, nan], [nan] * 3, [nan, nan, 50]])
    assert errors.get_clim() == (0, 40)
    assert diagonal.get_clim() == (0, 75)
    cells = {text.get_position(): text.get_text() for text in ax.texts}  # (column, row)
    assert cells == {
        (0, 0): "75.0",
        (1, 0): "25.0",
        (2, 0): "0",
        (0, 2): "10.0",
        (1, 2): "40.0",
        (2, 2): "50.0",
    }
    assert ax.get_ylim() == (2.5, -0.5)  # the first class on top
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("predicted class", "true class")
    assert texts(ax.get_yticklabels()) == texts(ax.get_xticklabels()) == ["x", "y", "z"]
    bars = [bar.get_ylabel() for bar in ax.child_axes]
    assert bars == ["errors (% of row)", "correct (% of row)"]


def test_confusion_in_counts():
    ax = plots.plot_confusion(COUNTS, normalize=False)
    close(ax.images[0].get_array().filled(nan), [[nan, 2, 0], [nan, nan, nan], [1, 4, nan]])
    assert texts(ax.texts) == ["6", "2", "0", "1", "4", "5"]
    assert ax.child_axes[0].get_ylabel() == "errors (samples)"


def test_the_diagonal_does_not_change_the_colours_of_the_errors():
    few, many = COUNTS.clone(), COUNTS + 1000 * torch.eye(3).long()
    colours = [plots.plot_confusion(c, normalize=False).images[0].get_clim() for c in (few, many)]
    assert colours == [(0, 4), (0, 4)]


def test_confusion_without_errors_or_samples():
    ax = plots.plot_confusion(5 * torch.eye(2).long())
    assert ax.images[0].get_clim() == (0, 1)
    draw(ax)
    empty = plots.plot_confusion(torch.zeros(2, 2).long())
    assert not empty.texts
    draw(empty)


@pytest.mark.parametrize(("k", "written"), [(12, 144), (13, 0)])
def test_cells_are_written_up_to_twelve_classes(k, written):
    ax = plots.plot_confusion(torch.full((k, k), 3) + 300 * torch.eye(k).long())
    draw(ax)
    assert len(ax.texts) == written
    widest = 0.95 * ax.get_window_extent().width / k
    assert all(text.get_window_extent().width < widest for text in ax.texts)


def test_weights_beside_accuracies():
    w = torch.tensor([0.2, nan, 1.8])
    ax = plots.plot_weights(w, B, weights_label="probability", accuracy_label="PGD (%)")
    bars, (first, twin) = ax.patches, ax.figure.axes
    close([bar.get_height() for bar in bars], [nan, 75, 37.5])
    close([bar.get_x() + bar.get_width() / 2 for bar in bars], [0, 1, 2])
    assert first is ax
    (line,) = twin.lines
    close(line.get_ydata(), [0.2, nan, 1.8])
    assert (ax.get_ylabel(), twin.get_ylabel()) == ("PGD (%)", "probability")
    assert ax.get_ylim()[0] == twin.get_ylim()[0] == 0
    assert twin.get_ylim()[1] > 1.8
    assert ax.yaxis.label.get_color() != twin.yaxis.label.get_color()
    draw(ax)


def test_weights_of_nothing():
    draw(plots.plot_weights(torch.zeros(3), torch.full((3,), nan)))


def test_sweep_is_mean_deviation_and_runs_in_ascending_order():
    runs = np.random.default_rng(0).normal(size=(3, 4))
    figures = {"a": torch.from_numpy(runs), "b": torch.tensor([1.0, 2.0, nan])}
    ax = plots.plot_sweep([0.5, 0.1, 0.9], figures, xlabel="γ", ylabel="NSD")
    order = [1, 0, 2]
    mean, sd = runs.mean(axis=1)[order], runs.std(axis=1, ddof=1)[order]
    a, dots, b = ax.lines
    close(a.get_xdata(), [0.1, 0.5, 0.9])
    close(a.get_ydata(), mean)
    close(dots.get_xdata(), np.repeat([0.1, 0.5, 0.9], 4))
    close(dots.get_ydata(), runs[order].flatten())
    assert dots.get_linestyle() == "None"
    close(b.get_ydata(), [2, 1, nan])
    (band,) = ax.collections
    corners = band.get_paths()[0].vertices
    for x, lower, upper in zip([0.1, 0.5, 0.9], mean - sd, mean + sd, strict=True):
        at = corners[np.isclose(corners[:, 0], x), 1]
        close([at.min(), at.max()], [lower, upper])
    assert (ax.get_xlabel(), ax.get_ylabel(), legend(ax)) == ("γ", "NSD", ["a", "b"])


def test_sweep_with_intervals():
    """In ascending order; a figure without them has none, and nan draws none."""
    ends = torch.tensor([[0.5, 3.0], [1.0, 2.0], [nan, nan]])
    figures = {"a": torch.tensor([1.0, 1.5, 2.0]), "b": torch.ones(3)}
    ax = plots.plot_sweep([2, 1, 3], figures, intervals={"a": ends}, xlabel="x", ylabel="y")
    (bars,) = ax.collections
    close(np.array(bars.get_segments()[:2]), [[(1, 1), (1, 2)], [(2, 0.5), (2, 3)]])
    draw(ax)


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_sweep_of_single_runs_has_no_band(shape):
    ax = plots.plot_sweep([1, 2, 3], {"a": torch.ones(shape)}, xlabel="x", ylabel="y")
    assert len(ax.lines) == 1
    assert not ax.collections


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_one_picture_with_a_row_for_each_class(channels):
    x = torch.rand(6, channels, 6, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([2, 0, 2, 0, 0, 0])
    ax = plots.plot_images(
        x, labels, num_classes=3, per_class=3, class_names=["first", "second", "third"]
    )
    expected = np.full(
        (3 * 6 + 2, 3 * 8 + 2, 3), 0.85
    )  # grey gaps of one pixel: 6 / 16, rounded up
    for row, column, i in [(0, 0, 1), (0, 1, 3), (0, 2, 4), (2, 0, 0), (2, 1, 2)]:
        image = x[i].permute(1, 2, 0).numpy()
        expected[7 * row : 7 * row + 6, 9 * column : 9 * column + 8] = image
    (picture,) = ax.images
    close(picture.get_array(), expected, atol=1e-7)
    assert picture.get_interpolation() == "nearest"
    close(ax.get_yticks(), [2.5, 9.5, 16.5])
    assert texts(ax.get_yticklabels()) == ["first", "second", "third"]
    assert len(ax.get_xticks()) == 0


def test_gaps_grow_with_the_images():
    ax = plots.plot_images(torch.rand(1, 3, 32, 32), torch.tensor([0]), num_classes=2, per_class=2)
    assert ax.images[0].get_array().shape == (66, 66, 3)


def test_images_of_no_class_are_blank():
    empty = torch.empty(0, dtype=torch.int64)
    ax = plots.plot_images(torch.empty(0, 1, 4, 4), empty, num_classes=2)
    close(ax.images[0].get_array(), 0.85, atol=1e-7)


def test_long_class_names_fit_beside_the_images():
    labels = torch.arange(10)
    ax = plots.plot_images(torch.rand(10, 3, 32, 32), labels, num_classes=10, class_names=CIFAR10)
    draw(ax)
    assert min(label.get_window_extent().x0 for label in ax.get_yticklabels()) >= 0


def test_survival_by_hand():
    """Class 0 loses a sample at 0 and one at 2 of four; class 2 all but one of two; 1 is absent."""
    fooled_at, targets = torch.tensor([0, 2, 4, 4, 1, 4]), torch.tensor([0, 0, 0, 0, 2, 2])
    ax = plots.plot_survival(
        fooled_at, targets, num_classes=3, steps=3, class_names=["cat", "dog", "deer"]
    )
    mean, cat, deer = ax.lines
    close(mean.get_xdata(), [0, 1, 2, 3])
    close(cat.get_ydata(), [75, 75, 50, 50])
    close(deer.get_ydata(), [100, 50, 50, 50])
    close(mean.get_ydata(), [87.5, 62.5, 50, 50])
    assert {line.get_drawstyle() for line in ax.lines} == {"steps-mid"}
    assert cat.get_linewidth() == deer.get_linewidth() == 2.5  # equals
    assert legend(ax) == ["mean over classes", "cat, ends at 50.0", "deer, ends at 50.0"]
    assert (ax.get_xlim(), ax.get_ylim()) == ((-0.5, 3.5), (0, 102))


def test_survival_of_many_classes_names_the_worst_alone():
    targets = torch.arange(26) % 13
    fooled_at = torch.where(targets == 7, 2, 4)
    ax = plots.plot_survival(fooled_at, targets, num_classes=13, steps=3)
    assert legend(ax) == ["mean over classes", "class 7, ends at 0.0"]
    worst = ax.lines[1 + 7]
    close(worst.get_ydata(), [100, 100, 0, 0])
    others = [line for line in ax.lines[1:] if line is not worst]
    assert {line.get_color() for line in others} == {"0.75"}
    assert worst.get_color() != "0.75"
    assert worst.get_linewidth() > max(line.get_linewidth() for line in others)


def test_survival_of_nothing():
    empty = torch.empty(0, dtype=torch.int64)
    draw(plots.plot_survival(empty, empty, num_classes=2, steps=1))


def test_least_pgd_steps_are_survival_without_the_last_iterate(tiny_model):
    model, seen, k, steps = tiny_model(), [], 4, 5
    x = torch.rand(64, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    y = model(x).argmax(dim=1)
    _, counts = least_pgd_steps(
        model,
        x,
        y,
        eps=0.3,
        step_size=0.03,
        steps=steps,
        rng=torch.Generator().manual_seed(1),
        on_step=lambda step, x_adv, logits: seen.append(logits.argmax(dim=1) == y),
    )
    alive = torch.stack(seen).int().cummin(dim=0).values.double()
    ax = plots.plot_survival(counts, y, num_classes=k, steps=steps - 1)
    expected = [100 * alive[:, y == c].mean(dim=1) for c in range(k) if (y == c).any()]
    close([line.get_ydata() for line in ax.lines[1:]], torch.stack(expected))
    assert 0 < alive[-1].mean() < alive[0].mean()


@every_plot
def test_bad_input_is_refused_before_anything_is_drawn(name):
    for changes, error, _ in (call := CALLS[getattr(plots, name)]):
        ax = Figure().add_subplot()
        with pytest.raises(error):
            call.function(**call.valid | {"ax": ax} | changes)
        assert not ax.has_data()
