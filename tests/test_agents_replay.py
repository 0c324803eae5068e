"""Replay and the networks of agents: rings wrap, sampling is uniform, pixels are scaled once."""

from __future__ import annotations

import pytest
import torch
from cases import untyped
from closeness import assert_close, assert_same_bits
from torch import Tensor, nn

from birl_ext.agents.networks import MLP, NatureCNN, OneHot, StateActionMLP, Twin, head_network
from birl_ext.agents.target import Target
from birl_ext.environments.transitions import Transitions
from birl_ext.errors import DtypeError, OptionError, ShapeError
from birl_ext.replay.buffer import ReplayBuffer


def rows(first: int, count: int, dtype: torch.dtype = torch.float32) -> Transitions:
    """Transitions whose every field tells which one it is."""
    number = torch.arange(first, first + count)
    return Transitions(
        number.to(dtype).view(-1, 1, 1).expand(-1, 2, 3),
        number,
        (number + 1).to(dtype).view(-1, 1, 1).expand(-1, 2, 3),
        number % 2 == 0,
        -number.float(),
    )


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("sizes", [[3], [5], [7], [4, 4], [1, 9, 2], [12], [5, 5, 5], [23, 1]])
def test_the_ring_holds_the_last_ones(sizes: list[int]) -> None:
    buffer, total = ReplayBuffer(5), 0
    for size in sizes:
        buffer.append(rows(total, size))
        total += size
    held = min(total, 5)
    assert len(buffer) == held
    drawn = buffer.sample(400, generator())
    assert set(drawn.action.tolist()) == set(range(total - held, total))
    for field, want in zip(drawn, rows(0, total).select(drawn.action), strict=True):
        assert_same_bits(field, want, label="a row is torn")


def test_sampling_is_uniform() -> None:
    """χ² with 49 degrees of freedom: above 85.4 once in a thousand."""
    buffer = ReplayBuffer(50)
    buffer.append(rows(0, 70))
    counts = torch.bincount(buffer.sample(50_000, generator()).action - 20, minlength=50)
    chi_square = float(((counts - 1000.0) ** 2 / 1000).sum())
    assert chi_square < 85.4
    half = ReplayBuffer(100)
    half.append(rows(0, 30))
    counts = torch.bincount(half.sample(30_000, generator()).action, minlength=30)
    assert len(counts) == 30
    assert float(((counts - 1000.0) ** 2 / 1000).sum()) < 58.3  # 29 degrees


def test_pixels_stay_bytes() -> None:
    buffer = ReplayBuffer(8)
    buffer.append(rows(0, 4, torch.uint8))
    drawn = buffer.sample(3, generator())
    assert drawn.observation.dtype is drawn.next_observation.dtype is torch.uint8
    held = buffer.state_dict()["held"]
    assert held["observation"].dtype is torch.uint8
    assert held["observation"].shape == (4, 2, 3)  # what is held, not what is reserved


def test_a_snapshot_goes_on_like_the_original() -> None:
    ours, theirs = ReplayBuffer(6), ReplayBuffer(6)
    ours.append(rows(0, 8))
    state = ours.state_dict()
    ours.append(rows(8, 3))
    theirs.load_state_dict(state)
    theirs.append(rows(8, 3))
    for a, b in zip(ours.sample(50, generator()), theirs.sample(50, generator()), strict=True):
        assert_same_bits(a, b, label="sample")
    with pytest.raises(OptionError, match="stored capacity is 6"):
        ReplayBuffer(7).load_state_dict(state)


def moments(count: int, ends: float, seed: int) -> list[tuple[Transitions, list[int], list[bool]]]:
    """Of three environments, not all of them at each moment; observations say where and when."""
    source, found = generator(seed), []
    clock = [0, 0, 0]
    for _ in range(count):
        where = [e for e in range(3) if float(torch.rand((), generator=source)) < 0.8] or [0]
        over = [float(torch.rand((), generator=source)) < ends for _ in where]
        now = torch.tensor([100 * clock[e] + e for e in where])
        batch = Transitions(now, now, now + 100, torch.tensor(over), now.float())
        for e in where:
            clock[e] += 1
        found.append((batch, where, over))
    return found


@pytest.mark.parametrize("capacity", [1, 7, 1000])
@pytest.mark.parametrize("at_once", [1, 6])
def test_a_path_goes_on_to_the_end_of_its_episode_or_of_what_is_held(
    capacity: int, at_once: int
) -> None:
    buffer, every = ReplayBuffer(capacity, linked=True), moments(60, 0.2, seed=1)
    ends: dict[int, bool] = {}
    for start in range(0, 60, at_once):
        some = every[start : start + at_once]
        batch = Transitions(*(torch.cat(part) for part in zip(*(m[0] for m in some), strict=True)))
        where, over = [e for m in some for e in m[1]], [end for m in some for end in m[2]]
        buffer.append(batch, where, over)
        ends |= dict(zip(batch.action.tolist(), over, strict=True))
    held = set(buffer.sample(5000, generator()).action.tolist())
    found, present = buffer.ahead(300, 4, generator())
    plain = buffer.sample(300, generator())
    for part, whole in zip(found, plain, strict=True):
        assert torch.equal(part[:300], whole)
    table = found.action.view(4, 300)
    for path in range(300):
        want = [int(table[0, path])]
        while len(want) < 4 and not ends[want[-1]] and want[-1] + 100 in held:
            want.append(want[-1] + 100)
        there = present[:, path].tolist()
        assert there == [k < len(want) for k in range(4)]
        assert table[:, path].tolist() == want + [want[-1]] * (4 - len(want))
    assert bool(present[{1: 0, 7: 1, 1000: 3}[capacity]].any())


def test_links_go_on_like_the_original() -> None:
    ours, theirs = (ReplayBuffer(20, linked=True) for _ in range(2))
    every = moments(16, 0.1, seed=2)
    for moment in every[:8]:
        ours.append(*moment)
    theirs.load_state_dict(ours.state_dict())
    for moment in every[8:]:
        ours.append(*moment)
        theirs.append(*moment)
    one, other = (buffer.ahead(60, 5, generator()) for buffer in (ours, theirs))
    assert torch.equal(one[1], other[1])
    assert bool(one[1][4].any())
    for a, b in zip(one[0], other[0], strict=True):
        assert_same_bits(a, b, label="path")
    for buffer in (ReplayBuffer(20), theirs):
        state = (ours if buffer is not theirs else ReplayBuffer(20)).state_dict()
        with pytest.raises(OptionError, match="stored replay is linked and this one is not"):
            buffer.load_state_dict(state)


def test_an_episode_that_began_anew_is_no_path() -> None:
    """An environment that could not be put back after a resume starts from somewhere else."""
    buffer = ReplayBuffer(8, linked=True)
    for first in (0, 50):
        now = torch.tensor([first])
        buffer.append(Transitions(now, now, now + 1, now < 0, now.float()), [0], [False])
    assert not bool(buffer.ahead(30, 2, generator())[1][1].any())


def test_nothing_follows_what_is_no_longer_held() -> None:
    """All observations alike: another row lies where an environment that paused was seen last."""
    buffer, now = ReplayBuffer(3, linked=True), torch.zeros(1, dtype=torch.int64)
    for where, over in ((0, False), (1, True), (1, True), (1, True), (1, True), (0, True)):
        buffer.append(Transitions(now, now, now, now > 0, now.float()), [where], [over])
    assert not bool(buffer.ahead(30, 2, generator())[1][1].any())


def test_a_replay_without_links_knows_no_paths() -> None:
    buffer = ReplayBuffer(4)
    buffer.append(rows(0, 2))
    with pytest.raises(OptionError, match="does not know what follows"):
        buffer.ahead(1, 2, generator())
    with pytest.raises(OptionError, match="not told where"):
        ReplayBuffer(4, linked=True).append(rows(0, 2))


def test_rows_that_do_not_fit_are_refused() -> None:
    buffer = ReplayBuffer(4)
    with pytest.raises(OptionError, match="empty"):
        buffer.sample(1, generator())
    with pytest.raises(ShapeError, match="reward has shape"):
        buffer.append(rows(0, 2)._replace(reward=torch.zeros(3)))
    buffer.append(rows(0, 2))
    with pytest.raises(DtypeError, match=r"observation is torch\.uint8"):
        buffer.append(rows(0, 2, torch.uint8))
    with pytest.raises(ShapeError, match=r"action has shape \(2, 1\)"):
        buffer.append(rows(0, 2)._replace(action=torch.zeros(2, 1, dtype=torch.int64)))
    with pytest.raises(OptionError, match="capacity is 0"):
        ReplayBuffer(0)


# Networks


def test_pixels_are_scaled_exactly_once() -> None:
    network = NatureCNN((2, 40, 44), 3, generator=generator())
    pixels = torch.randint(256, (5, 2, 40, 44), generator=generator(), dtype=torch.uint8)
    found = network(pixels)
    hidden = pixels.double() / 255
    layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    shapes = [tuple(layer.weight.shape) for layer in layers]
    assert shapes[:3] == [(32, 2, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3)]
    for layer, stride in zip(layers[:3], (4, 2, 1), strict=True):
        assert layer.bias is not None
        weight, bias = layer.weight.double(), layer.bias.double()
        hidden = nn.functional.conv2d(hidden, weight, bias, stride=stride).relu()
    hidden = hidden.flatten(1) @ layers[3].weight.double().T + untyped(layers[3]).bias.double()
    want = hidden.relu() @ layers[4].weight.double().T + untyped(layers[4]).bias.double()
    assert_close(found.double(), want.detach().numpy(), bound=1e-5, label="network by hand")
    for scaled in (pixels.float(), pixels.float() / 255):
        with pytest.raises(DtypeError, match="leave the scaling"):
            network(scaled)


def test_indices_and_pixels_do_not_pass_for_features() -> None:
    with pytest.raises(DtypeError, match="NatureCNN"):
        MLP(3, 2, generator=generator())(torch.zeros(4, 3, dtype=torch.uint8))
    with pytest.raises(ShapeError, match="channels, height, width"):
        NatureCNN((84, 84), 2, generator=generator())
    table = OneHot(3, MLP(3, 2, hidden=(), generator=generator()))
    assert table(torch.tensor([0, 2])).shape == (2, 2)
    with pytest.raises(DtypeError, match=r"observation is torch\.float32 .*indices"):
        table(torch.ones(2))
    for outside in (3, -1):
        with pytest.raises(OptionError, match=rf"observation is {outside} \(allowed: 0 to 2\)"):
            table(torch.tensor([0, outside]))


def test_indices_are_looked_at_where_that_can_be_done_alone() -> None:
    table = OneHot(3, MLP(3, 2, hidden=(), generator=generator()))
    given = torch.tensor([0, 2, 1])
    want = table(given)
    assert torch.allclose(torch.func.vmap(table)(given.unsqueeze(1)).squeeze(1), want)
    whole = torch.compile(table, backend="eager", fullgraph=True)
    assert torch.allclose(whole(given), want)
    assert table.to("meta")(given.to("meta")).shape == (3, 2)


def test_the_usual_network_fits_the_observation() -> None:
    assert isinstance(head_network((4, 84, 84), torch.uint8, 2, generator=generator()), NatureCNN)
    network = head_network((2, 3), torch.float32, 4, generator=generator())
    assert network(torch.zeros(5, 2, 3)).shape == (5, 4)
    critic = StateActionMLP(6, 2, hidden=(8,), generator=generator())
    assert critic(torch.zeros(5, 2, 3), torch.zeros(5, 2)).shape == (5,)


def test_weights_come_from_the_generator_alone() -> None:
    before = torch.get_rng_state()
    networks = [
        [
            MLP(3, 2, generator=source),
            NatureCNN((1, 36, 36), 2, generator=source),
            StateActionMLP(3, 2, generator=source),
        ]
        for source in (generator(1), generator(1), generator(2))
    ]
    assert torch.equal(before, torch.get_rng_state())
    for one, same, other in zip(*networks, strict=True):
        for a, b, c in zip(one.parameters(), same.parameters(), other.parameters(), strict=True):
            assert_same_bits(a, b, label="same seed")
            assert not torch.equal(a, c)
            assert a.isfinite().all()


def test_a_twin_needs_two() -> None:
    source = generator()
    critics = Twin(MLP(3, 2, generator=source), MLP(3, 2, generator=source))
    first, second = critics(torch.ones(4, 3))
    assert not torch.equal(first, second)
    with pytest.raises(OptionError, match="same module"):
        Twin(critics.first, critics.first)


# Target copies


class Counter(nn.Module):
    """A parameter and a buffer that can be set."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.register_buffer("seen", torch.zeros(1))
        self.seen: Tensor

    def set(self, value: float) -> None:
        with torch.no_grad():
            self.weight.fill_(value)
            self.seen.fill_(value)

    def forward(self) -> Tensor:
        return torch.cat([self.weight, self.seen])


def test_a_hard_target_moves_every_period() -> None:
    source = Counter()
    target = Target(source, rate=1.0, period=3)
    seen = []
    for step in range(1, 8):
        source.set(0.1 * step)
        target.follow()
        seen.append(target().tolist())
    for got, want in zip(seen, [0, 0, 3, 3, 3, 6, 6], strict=True):
        # the very number: not an interpolation that is nearly it
        exact = float(torch.tensor(0.1 * want))
        assert got == [exact, exact]


def test_a_soft_target_goes_part_of_the_way() -> None:
    source = Counter()
    target = Target(source, rate=0.25, period=1)
    source.set(1.0)
    for step in range(1, 5):
        target.follow()
        assert target()[0].item() == pytest.approx(1 - 0.75**step, rel=1e-6)
    assert target()[1].item() == 1.0
    for wrong in ({"rate": 0.0, "period": 1}, {"rate": 1.5, "period": 1}, {"rate": 1, "period": 0}):
        with pytest.raises(OptionError):
            Target(source, **wrong)
