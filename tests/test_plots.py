# SPDX-License-Identifier: Apache-2.0
import sys

import numpy as np
import pytest
from PIL import Image

from hf_lip.plots import plot_certified_accuracy, plot_envelope, plot_probabilities, plot_provenance


def test_curve_is_the_step_function():
    ax = plot_certified_accuracy([0.5, 0.2, 0.0], [True, True, False], title="digits", label="cpl")
    line = next(line for line in ax.lines if "ACR" in str(line.get_label()))
    assert line.get_drawstyle() == "steps-post"
    assert line.get_xdata().tolist() == [0.0, 0.2, 0.5]
    assert line.get_ydata() == pytest.approx([200 / 3, 100 / 3, 0.0])
    assert line.get_label() == "cpl (ACR 0.233)"
    assert ax.get_title() == "digits"
    assert ax.get_xlim()[1] < 1.0


def test_a_second_curve_goes_into_the_same_axes_and_both_fit():
    ax = plot_certified_accuracy([2.0], [True], label="a")
    assert plot_certified_accuracy([0.5], [True], ax=ax, label="b") is ax
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a (ACR 2.000)", "b (ACR 0.500)"]
    assert ax.get_xlim()[1] > 2.0


def test_file_is_written_whole_and_over_the_old_one(tmp_path):
    path = tmp_path / "plots" / "curve.png"
    rng = np.random.default_rng(0)
    for _ in range(2):
        plot_certified_accuracy(rng.exponential(0.3, 50), rng.random(50) < 0.9, path=path)
    with Image.open(path) as image:
        assert image.size == (960, 630)
    assert [file.name for file in path.parent.iterdir()] == ["curve.png"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "curve.png"
    path.write_bytes(b"old")

    def fail(self, *args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        plot_certified_accuracy([0.1], [True], path=path)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["curve.png"]


def test_envelope(tmp_path):
    runs = {"sigma 0.25": ([0.1, 0.3], [True, True]), "sigma 1": ([0.0, 2.0], [True, True])}
    ax = plot_envelope(runs, path=tmp_path / "envelope.png", title="digits")
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["sigma 0.25 (ACR 0.200)", "sigma 1 (ACR 1.000)", "envelope"]
    line = next(line for line in ax.lines if line.get_label() == "envelope")
    assert line.get_xdata().tolist() == [0.0, 0.1, 0.3, 2.0]
    assert line.get_ydata() == pytest.approx([100.0, 50.0, 50.0, 0.0])
    with Image.open(tmp_path / "envelope.png") as image:
        assert image.size == (960, 630)


def test_probabilities(tmp_path):
    ax = plot_probabilities([0.1, 0.61, 0.62, 0.97], [False, True, True, True], path=tmp_path / "p.png")
    heights = [patch.get_height() for patch in ax.patches]
    assert sum(heights) == pytest.approx(100.0)
    assert max(heights) == pytest.approx(50.0)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["right (3)", "wrong or abstained (1)"]
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_no_certified_image_at_all():
    ax = plot_certified_accuracy([0.0, 0.3], [False, False])
    assert ax.get_xlim()[1] > 0.0


def test_provenance_of_a_long_text(tmp_path):
    tokens = [f"token{number}" for number in range(129)] + ["$x_1$ which is long"]
    values = np.random.default_rng(0).random((3, 130))
    rows = {"all heads": values[0], "head 0": values[1], "head 1": values[2]}
    figure = plot_provenance(tokens, rows, answer=129, path=tmp_path / "p.png", title="answer $")
    lines, bar = figure.axes[:3], figure.axes[3:]
    assert len(bar) == 1
    labels = [label for ax in lines for label in ax.get_xticklabels()]
    assert [label.get_text() for label in labels] == [*tokens[:129], "$x_1$ which…"]
    assert [label.get_fontweight() for label in labels[-2:]] == ["normal", "bold"]
    assert [label.get_text() for label in lines[0].get_yticklabels()] == list(rows)
    shown = np.concatenate([ax.images[0].get_array().filled(np.nan) for ax in lines], 1)
    np.testing.assert_array_equal(shown[:, :130], values)
    assert {ax.images[0].get_clim() for ax in lines} == {(0.0, values.max())}
    with Image.open(tmp_path / "p.png") as image:
        assert image.width < 2500


def test_provenance_with_negative_weights_and_with_none():
    figure = plot_provenance(["a", "b"], {"head": [0.5, -0.9]})
    assert figure.axes[0].images[0].get_clim() == (-0.9, 0.9)
    assert plot_provenance(["a"], {"head": [0.0]}).axes[0].images[0].get_clim() == (0.0, 1.0)
    for tokens, rows in (([], {"head": []}), (["a"], {}), (["a"], {"head": [1.0, 2.0]})):
        with pytest.raises(ValueError, match="`rows`"):
            plot_provenance(tokens, rows)


def test_global_state_of_matplotlib_is_left_alone(monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    plot_certified_accuracy([0.1], [True])
    assert "matplotlib.pyplot" not in sys.modules


def test_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "hf_lip\[demo\]"'):
        plot_certified_accuracy([0.1], [True])
