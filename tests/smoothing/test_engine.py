# SPDX-License-Identifier: Apache-2.0
import threading

import numpy as np
import pytest
import torch
from torch import nn

from hf_lip.ops.simplex import ScoreMap
from hf_lip.smoothing.engine import ESTIMATION, SELECTION, Sampler, ScoreSums, draws_of, packed_draws
from hf_lip.smoothing.noise import GaussianNoise, noisy_copies
from hf_lip.smoothing.samples import Moments


SHAPE = (2, 4, 4)


@pytest.fixture
def image():
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20, 4)).eval().requires_grad_(False)


def sampler_of(network, batch_size=16, sigma=0.7, **arguments):
    return Sampler(network, GaussianNoise(sigma, 3), num_classes=4, batch_size=batch_size, **arguments)


def noisy(image, index, phase, count, first=0):
    return noisy_copies(image, sigma=0.7, seed=3, index=index, first_draw=first, num_draws=count, phase=phase)


# batches


def test_batches_are_full_and_hold_the_documented_draws(image):
    seen = []

    def base(batch):
        seen.append(batch.clone())
        return batch.flatten(1)[:, :4]

    with sampler_of(base) as sampler:
        prepared = sampler.noise.prepare(image)
        batches = list(draws_of(prepared, 5, ESTIMATION, 37, 16))
        results = [(rows, logits.clone()) for rows, logits in sampler.run(batches)]
    assert [tuple(batch.shape) for batch in seen] == [(16, *SHAPE)] * 3
    assert [rows[0].num_draws for rows, _ in results] == [16, 16, 5]
    rows = torch.cat([batch[: part[0].num_draws] for batch, (part, _) in zip(seen, results)])
    assert torch.equal(rows, noisy(image, 5, ESTIMATION, 37))
    logits = torch.cat([logits[part[0].place] for part, logits in results])
    assert torch.equal(logits, rows.flatten(1)[:, :4])


def test_packed_draws_share_batches_and_keep_their_rows():
    images = [np.full(SHAPE, float(k)) for k in range(4)]
    whole = list(packed_draws([(k, images[k], 10 + k) for k in range(4)], SELECTION, 10, 16))
    placed = [[(row.index, row.first_draw, row.num_draws, row.start) for row in batch] for batch in whole]
    assert placed == [
        [(10, 0, 10, 0), (11, 0, 6, 10)],
        [(11, 6, 4, 0), (12, 0, 10, 4), (13, 0, 2, 14)],
        [(13, 2, 8, 0)],
    ]
    # an image that is left out leaves its rows to nobody
    part = list(packed_draws([(k, images[k], 10 + k) for k in (1, 3)], SELECTION, 10, 16))
    kept = [[row for row in batch if row[0] in (11, 13)] for batch in placed]
    assert [[(row.index, row.first_draw, row.num_draws, row.start) for row in batch] for batch in part] == kept


def test_rows_of_a_packed_batch_are_written_where_they_belong(image):
    other = 1.0 - image
    with sampler_of(lambda batch: batch.flatten(1)[:, :4].clone()) as sampler:
        prepared = [(0, sampler.noise.prepare(image), 4), (1, sampler.noise.prepare(other), 9)]
        (rows, logits), *_ = sampler.run(packed_draws(prepared, SELECTION, 6, 16))
    for part, pixels in zip(rows, (image, other)):
        expected = noisy(pixels, part.index, SELECTION, 6).flatten(1)[:, :4]
        assert torch.equal(logits[part.place], expected)


@pytest.mark.parametrize("batch_size", [1, 3, 16, 100])
def test_votes_are_the_networks_own(network, image, batch_size):
    # 100 % 3 == 1: a last batch of one draw
    with sampler_of(network, batch_size) as sampler:
        counts = sampler.votes(draws_of(sampler.noise.prepare(image), 5, ESTIMATION, 100, batch_size))
    expected = network(noisy(image, 5, ESTIMATION, 100)).argmax(dim=1).bincount(minlength=4)
    assert list(counts) == [5]
    assert counts[5].tolist() == expected.tolist()
    assert sorted(expected.tolist())[-2] > 5


@pytest.mark.parametrize("options", [{"threads": 1}, {"threads": 4}, {"workers": 2}, {"workers": 5, "threads": 1}])
def test_threads_and_workers_do_not_change_votes(network, image, options):
    before = torch.get_num_threads()
    expected = network(noisy(image, 5, ESTIMATION, 500)).argmax(dim=1).bincount(minlength=4)
    with sampler_of(network, 16, **options) as sampler:
        for _ in range(2):
            counts = sampler.votes(draws_of(sampler.noise.prepare(image), 5, ESTIMATION, 500, 16))[5]
            assert counts.tolist() == expected.tolist()
    assert torch.get_num_threads() == before


@pytest.mark.skipif(not torch.backends.openmp.is_available(), reason="workers need OpenMP")
def test_workers_run_at_the_same_time_after_a_first_batch_alone(network, image):
    names, both = [], threading.Barrier(2, timeout=60)

    def base(batch):
        names.append(threading.current_thread().name)
        assert (torch.get_num_threads() == 1) or len(names) == 1
        if len(names) > 1:
            # passes only if two batches are under way at once
            both.wait()
        return network(batch)

    with sampler_of(base, workers=2) as sampler:
        sampler.votes(draws_of(sampler.noise.prepare(image), 5, ESTIMATION, 16 * 9, 16))
    assert names[0] == "MainThread"
    assert all(name.startswith("noise") for name in names[1:])
    assert len(set(names)) == 3


def test_large_batches_are_not_given_to_workers(network, image, monkeypatch):
    monkeypatch.setattr("hf_lip.smoothing.engine._LARGEST_WORKER_BATCH", 100)
    names = set()

    def base(batch):
        names.add(threading.current_thread().name)
        return network(batch)

    with sampler_of(base, workers=2) as sampler:
        sampler.votes(draws_of(sampler.noise.prepare(image), 5, ESTIMATION, 100, 16))
    assert names == {"MainThread"}


def test_a_draw_meets_the_same_batch_row_whatever_else_is_there(image):
    # a base classifier that depends on the row, as kernels may in their last bits
    def base(batch):
        rows = torch.arange(len(batch))
        return torch.stack([rows % 3, rows % 5, 2.0 * torch.ones(len(batch)), rows * 0.0], dim=1)

    images = [(place, image, index) for place, index in enumerate((4, 7, 8))]
    with sampler_of(base) as sampler:
        prepared = [(place, sampler.noise.prepare(pixels), index) for place, pixels, index in images]
        together = sampler.votes(packed_draws(prepared, SELECTION, 13, 16))
        alone = {}
        for one in prepared:
            alone |= sampler.votes(packed_draws([one], SELECTION, 13, 16))
    assert {index: counts.tolist() for index, counts in together.items()} == {
        index: counts.tolist() for index, counts in alone.items()
    }
    assert len({tuple(counts) for counts in together.values()}) == 3


@pytest.mark.parametrize("workers", [1, 3])
def test_images_of_other_shapes_can_follow(image, workers):
    with sampler_of(lambda batch: batch.flatten(1)[:, :4].clone(), workers=workers) as sampler:
        for pixels in (image, torch.rand(2, 6, 3), image):
            counts = sampler.votes(draws_of(sampler.noise.prepare(pixels), 0, ESTIMATION, 20, 16))[0]
            expected = noisy(pixels, 0, ESTIMATION, 20).flatten(1)[:, :4].argmax(dim=1).bincount(minlength=4)
            assert counts.tolist() == expected.tolist()


@pytest.mark.parametrize("workers", [1, 3])
def test_stopping_early_leaves_a_sampler_that_works(network, image, workers):
    with sampler_of(network, workers=workers) as sampler:
        prepared = sampler.noise.prepare(image)
        expected = sampler.votes(draws_of(prepared, 1, ESTIMATION, 64, 16))[1]
        for _ in range(5):
            run = sampler.run(draws_of(prepared, 0, ESTIMATION, 10**9, 16))
            next(run)
            run.close()
            assert sampler.votes(draws_of(prepared, 1, ESTIMATION, 64, 16))[1].tolist() == expected.tolist()


def test_closing_ends_the_threads(network, image):
    before = set(threading.enumerate())
    with sampler_of(network, threads=3) as sampler:
        sampler.votes(draws_of(sampler.noise.prepare(image), 1, ESTIMATION, 64, 16))
        assert set(threading.enumerate()) > before
    assert set(threading.enumerate()) == before


def test_the_base_classifier_receives_float32_without_gradients_and_may_write(network, image):
    def base(batch):
        assert batch.dtype == torch.float32
        assert torch.is_inference_mode_enabled()
        logits = network(batch)
        batch.fill_(float("nan"))
        return logits

    with sampler_of(base) as sampler:
        counts = sampler.votes(draws_of(sampler.noise.prepare(image), 5, ESTIMATION, 100, 16))[5]
    assert counts.tolist() == network(noisy(image, 5, ESTIMATION, 100)).argmax(dim=1).bincount(minlength=4).tolist()


def test_progress_counts_draws_not_rows(network, image):
    done = []
    with sampler_of(network, progress=done.append) as sampler:
        sampler.votes(draws_of(sampler.noise.prepare(image), 5, ESTIMATION, 37, 16))
    assert done == [16, 16, 5]


# tallies


def test_low_precision_logits_are_counted_in_int64_and_float32(image):
    def base(batch):
        return torch.nn.functional.one_hot(torch.zeros(len(batch), dtype=torch.int64), 4).to(torch.bfloat16)

    with sampler_of(base, 4096) as sampler:
        counts = sampler.votes(draws_of(sampler.noise.prepare(image), 0, ESTIMATION, 8192, 4096))[0]
    # bfloat16 would stop counting at 256
    assert counts.tolist() == [8192, 0, 0, 0]
    assert counts.dtype == np.int64


@pytest.mark.parametrize("score_map", [ScoreMap("softmax", 2.0), ScoreMap("sparsemax", 0.5)])
def test_moments_are_those_of_the_scores(network, image, score_map):
    # 37 = 2 * 16 + 5, and 33 leaves a batch of one
    for n in (37, 33, 1):
        with sampler_of(network) as sampler:
            batches = draws_of(sampler.noise.prepare(image), 5, ESTIMATION, n, 16)
            moments = sampler.tally(batches, lambda index: ScoreSums(index, score_map))[5].moments()
        expected = Moments.from_scores(score_map.apply(network(noisy(image, 5, ESTIMATION, n))).numpy())
        assert moments.n == n
        np.testing.assert_allclose(moments.sums, expected.sums, rtol=1e-6)
        np.testing.assert_allclose(moments.squares, expected.squares, rtol=1e-5, atol=1e-15)


def test_moments_keep_their_digits_where_scores_hardly_vary():
    # E[x^2] - E[x]^2 in float32 would be negative here
    sums = ScoreSums(0, ScoreMap("softmax", 1.0))
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([9.2, 0.0]) + 1e-3 * torch.randn(100_000, 2, dtype=torch.float64, generator=generator)
    for part in logits.split(777):
        sums.add(part)
    exact = torch.softmax(logits, dim=1)[:, 0].var().item()
    assert exact < 1e-11
    assert sums.moments().variance[0] == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_for_some_noise_are_an_error(network, image, value):
    def base(batch):
        logits = network(batch).clone()
        # one draw in a few
        logits[batch[:, 0, 0, 0] > 2.0, 1] = value
        return logits

    broken = int((noisy(image, 5, ESTIMATION, 200)[:, 0, 0, 0] > 2.0).sum())
    assert 0 < broken < 20
    with sampler_of(base) as sampler:
        prepared = sampler.noise.prepare(image)
        with pytest.raises(ValueError, match=rf"Image 5: .* NaN or infinite logits for {broken} noisy copies"):
            sampler.votes(draws_of(prepared, 5, ESTIMATION, 200, 16))
        with pytest.raises(ValueError, match=r"Image 5: .* NaN or infinite logits"):
            sampler.tally(
                draws_of(prepared, 5, ESTIMATION, 200, 16), lambda index: ScoreSums(index, ScoreMap("softmax", 1.0))
            )
        # rows that are filled up do not count, and the sampler goes on
        assert sampler.votes(draws_of(sampler.noise.prepare(torch.zeros(SHAPE)), 1, ESTIMATION, 3, 16))[1].sum() == 3


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (lambda batch: torch.zeros(1, 4), r"logits \(B, num_classes\) for B images"),
        (lambda batch: torch.zeros(len(batch), 4, 1), r"logits \(B, num_classes\) for B images"),
        (lambda batch: torch.zeros(len(batch), 5), "returns 5 classes, `num_classes` is 4"),
    ],
)
def test_logits_of_a_wrong_shape(image, base, message):
    with sampler_of(base) as sampler, pytest.raises(ValueError, match=message):
        sampler.votes(draws_of(sampler.noise.prepare(image), 5, ESTIMATION, 20, 16))


def test_a_class_count_that_changes_is_an_error(image):
    calls = []

    def base(batch):
        calls.append(0)
        return torch.zeros(len(batch), 4 if len(calls) < 3 else 3)

    with sampler_of(base) as sampler, pytest.raises(ValueError, match="returns 3 classes, `num_classes` is 4"):
        sampler.votes(draws_of(sampler.noise.prepare(image), 5, ESTIMATION, 100, 16))


@pytest.mark.parametrize("name", ["batch_size", "num_classes", "threads", "workers"])
def test_bad_numbers(network, name):
    arguments = {"num_classes": 4, "batch_size": 16, name: 0}
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1"):
        Sampler(network, GaussianNoise(0.5, 0), **arguments)


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_of_the_base_classifier_comes_through(image, workers):
    calls = []

    def base(batch):
        calls.append(0)
        if len(calls) == 4:
            raise RuntimeError("no kernel")
        return batch.flatten(1)[:, :4].clone()

    with sampler_of(base, workers=workers) as sampler, pytest.raises(RuntimeError, match="no kernel"):
        sampler.votes(draws_of(sampler.noise.prepare(image), 5, ESTIMATION, 100, 16))
