"""States that several processes write: agreed on, balanced, whole or absent, read on any world size and layout."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.checkpoint import sharded
from tunesmith.checkpoint.agreement import FileAgreement, checkpoint_group
from tunesmith.checkpoint.async_saver import AsyncSaver
from tunesmith.checkpoint.sharded import ShardedWriter, save_shards, tensors_source
from tunesmith.checkpoint.shards import Shard, cut_rows
from tunesmith.checkpoint.state import list_states, load_latest, load_state
from tunesmith.checkpoint.stored import fill, load
from tunesmith.errors import CheckpointError, ParallelError

Ranks = Callable[..., list[Any]]


def whole_tensors(step: int) -> dict[str, Tensor]:
    """What the processes hold together; odd sizes, several dtypes."""
    generator = torch.Generator().manual_seed(step)
    return {
        "model.rows": torch.randn(7, 5, generator=generator),
        "model.columns": torch.randn(6, 8, generator=generator).to(torch.bfloat16),
        "model.fused": torch.randn(12, 3, generator=generator),
        "optimizer.rows.codes": torch.randint(0, 255, (7, 5), dtype=torch.uint8, generator=generator),
        "optimizer.rows.step": torch.tensor(float(step)),
        "model.norm": torch.randn(9, generator=generator),
        "model.tall": torch.randn(1, 4, generator=generator),
        "rng.torch": torch.randint(0, 255, (11,), dtype=torch.uint8, generator=generator),
    }


def rows_of(size: int, rank: int, world_size: int) -> tuple[int, int]:
    """As FSDP2 cuts: parts of one size, the last ones smaller or empty."""
    chunk = -(-size // world_size)
    return min(size, rank * chunk), min(size, (rank + 1) * chunk)


def cut_for(rank: int, world_size: int, tensors: dict[str, Tensor]) -> list[Shard]:
    """By rows, by columns, two row ranges of a fused tensor, and what everybody holds."""
    shards = []
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        if name in ("model.rows", "optimizer.rows.codes", "model.tall"):
            first, last = rows_of(shape[0], rank, world_size)
            shards.append(Shard(name, tensor[first:last].clone(), shape, ((first, last), (0, shape[1]))))
        elif name == "model.columns":
            first, last = rows_of(shape[1], rank, world_size)
            shards.append(Shard(name, tensor[:, first:last], shape, ((0, shape[0]), (first, last))))
        elif name == "model.fused":  # two projections of 8 and 4 rows, each cut over the processes
            ranges = [rows_of(8, rank, world_size), tuple(8 + row for row in rows_of(4, rank, world_size))]
            local = torch.cat([tensor[start:stop] for start, stop in ranges])
            shards += cut_rows(name, local, shape, ranges)
        else:
            shards.append(Shard(name, tensor.clone(), shape, tuple((0, size) for size in shape)))
    return shards


def save_on_ranks(folder: Path, step: int, keep: int = 2) -> str:
    agreement = checkpoint_group()
    shards = cut_for(agreement.rank, agreement.world_size, whole_tensors(step))
    return save_shards(folder, step, shards, {"rank": agreement.rank}, keep=keep, agreement=agreement).name


def load_on_ranks(folder: Path, step: int) -> list[str]:
    """Names of tensors that came back otherwise than they were saved."""
    agreement = checkpoint_group()
    state = load_latest(folder, agreement=agreement)[1]
    expected = cut_for(agreement.rank, agreement.world_size, whole_tensors(step))
    here = [Shard(s.name, torch.full_like(s.tensor, 1), s.global_shape, s.slices) for s in expected]
    fill(state.stored, here)
    return [
        mine.name for mine, theirs in zip(here, expected, strict=True) if not torch.equal(mine.tensor, theirs.tensor)
    ]


@pytest.mark.parametrize("writers", [1, 2, 4])
def test_saved_on_any_number_loads_on_any_number(tmp_path: Path, ranks: Ranks, writers: int) -> None:
    assert ranks(save_on_ranks, writers, tmp_path, 3) == ["step-00000003"] * writers
    for readers in (1, 2, 4):
        assert ranks(load_on_ranks, readers, tmp_path, 3) == [[]] * readers
    state = load_latest(tmp_path)[1]
    assert (state.step, state.facts) == (3, {"rank": 0})
    assert state.tensors.keys() == whole_tensors(3).keys()
    for name, tensor in whole_tensors(3).items():
        assert torch.equal(state.tensors[name], tensor), name
        assert state.tensors[name].dtype == tensor.dtype


def write_balanced(folder: Path) -> dict[str, int]:
    """Ten tensors that all processes hold. Returns: bytes by file."""
    agreement = checkpoint_group()
    tensors = {f"model.{number}": torch.zeros(100 + number) for number in range(10)}
    shards = [Shard(name, tensor, tuple(tensor.shape), ((0, len(tensor)),)) for name, tensor in tensors.items()]
    path = save_shards(folder, 1, shards, {}, keep=1, agreement=agreement)
    return {file.name: file.stat().st_size for file in path.glob("*.safetensors")}


def test_what_all_hold_is_written_once_and_spread(tmp_path: Path, ranks: Ranks) -> None:
    sizes = list(ranks(write_balanced, 4, tmp_path)[0].values())
    assert len(sizes) == 4
    assert sum(sizes) < 10 * 4 * 105 + 4 * 400
    assert max(sizes) < 1.7 * min(sizes)


def bad_shards(folder: Path, kind: str) -> str:
    """What every process is told when what they hold does not fit."""
    agreement = checkpoint_group()
    first = agreement.rank == 0
    shape, slices, tensor = (4, 2), ((2 * agreement.rank, 2 * agreement.rank + 2), (0, 2)), torch.zeros(2, 2)
    if kind == "overlap" and not first:
        slices = ((1, 3), (0, 2))
    elif kind == "missing" and not first:
        slices = ((2, 3), (0, 2))
        tensor = torch.zeros(1, 2)
    elif kind == "dtype" and not first:
        tensor = tensor.half()
    elif kind == "outside" and not first:
        slices = ((3, 5), (0, 2))
    step = agreement.rank if kind == "steps" else 1
    try:
        save_shards(folder, step, [Shard("model.w", tensor, shape, slices)], {}, keep=1, agreement=agreement)
    except CheckpointError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("overlap", "parts of model.w overlap"),
        ("missing", "parts of model.w are not all of it: 6 of 8 values"),
        ("dtype", "processes disagree on model.w"),
        ("outside", "model.w: a tensor of shape"),
        ("steps", "different steps"),
    ],
)
def test_what_does_not_fit_is_refused_on_all(tmp_path: Path, ranks: Ranks, kind: str, message: str) -> None:
    assert all(message in answer for answer in ranks(bad_shards, 2, tmp_path, kind))
    assert list_states(tmp_path) == []


def full_on_one(folder: Path, doomed: int) -> tuple[int | None, list[str]]:
    """One process may write next to nothing: what it and the others are told, and what is left."""
    agreement = checkpoint_group()
    shards = cut_for(agreement.rank, agreement.world_size, whole_tensors(1))
    save_shards(folder, 1, shards, {}, keep=2, agreement=agreement)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if agreement.rank == doomed:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    number = None
    try:
        save_shards(folder, 2, shards, {}, keep=2, agreement=agreement)
    except OSError as error:
        number = error.errno
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    agreement.gather(None)
    left = sorted(path.name for path in folder.iterdir())
    agreement.gather(None)
    save_shards(folder, 3, shards, {}, keep=2, agreement=agreement)
    return number, left


@pytest.mark.parametrize("doomed", [0, 1])
def test_a_disk_that_is_full_on_one_is_an_error_on_all(tmp_path: Path, ranks: Ranks, doomed: int) -> None:
    outcomes = ranks(full_on_one, 2, tmp_path, doomed)
    assert outcomes == [(errno.EFBIG, ["step-00000001"])] * 2
    assert [path.name for path in list_states(tmp_path)] == ["step-00000001", "step-00000003"]


def _write_forever(folder: Path, rank: int, world_size: int, session: str, first: int) -> None:
    agreement = FileAgreement(folder, rank, world_size, session)
    writer = ShardedWriter(folder, keep=2, agreement=agreement, file_bytes=200)
    for step in range(first, 10**6):
        shards = cut_for(rank, world_size, whole_tensors(step))
        writer.finish(writer.begin(step, shards), tensors_source(shards), {"step": step})


@pytest.mark.parametrize("seed", range(3))
def test_a_kill_at_any_moment_leaves_whole_states(tmp_path: Path, seed: int) -> None:
    """Four processes save all the time; one is killed, then the others as a launcher does, again and again."""
    context = multiprocessing.get_context("fork")
    generator, world_size, reached = random.Random(seed), 4, 0
    for start in range(4):
        session = f"{seed}-{start}"
        workers = [
            context.Process(target=_write_forever, args=(tmp_path, rank, world_size, session, reached + 1), daemon=True)
            for rank in range(world_size)
        ]
        for worker in workers:
            worker.start()
        _wait_for_state_after(tmp_path, reached)
        time.sleep(generator.uniform(0, 0.05))
        doomed = generator.randrange(world_size)
        for number in [doomed, *(n for n in range(world_size) if n != doomed)]:
            os.kill(workers[number].pid or 0, signal.SIGKILL)
        for worker in workers:
            worker.join()
        states = list_states(tmp_path)
        assert 1 <= len(states) <= 3  # keep, and one whose turn to go it was
        for path in states:
            state = load_state(path)
            assert all(torch.equal(state.tensors[name], t) for name, t in whole_tensors(state.step).items())
        reached = load_latest(tmp_path)[1].step
    shards = cut_for(0, 1, whole_tensors(reached + 1))
    save_shards(tmp_path, reached + 1, shards, {}, keep=1)
    assert [path.name for path in tmp_path.glob("*step-*")] == [f"step-{reached + 1:08d}"]


def _die_while_writing(folder: Path, rank: int, world_size: int, doomed: int) -> None:
    """Save twice through a group; in the second save one process is gone, and the others write down what they hear."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size)
    agreement = checkpoint_group()
    checkpoints = folder / "checkpoints"
    saver = AsyncSaver(checkpoints, keep=2, agreement=agreement)
    shards = cut_for(rank, world_size, whole_tensors(1))
    saver.save(1, shards, {})
    saver.wait()
    if rank == doomed:
        sharded.write_file = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    saver.save(2, shards, {})
    try:
        saver.wait()
    except ParallelError as error:
        (folder / f"said-{rank}").write_text(str(error), encoding="utf-8")
    os._exit(0)


@pytest.mark.parametrize("doomed", [0, 2])
def test_those_who_lose_a_process_are_told_and_the_state_before_stays(tmp_path: Path, doomed: int) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_die_while_writing, args=(tmp_path, rank, 3, doomed)) for rank in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [-signal.SIGKILL if n == doomed else 0 for n in range(3)]
    said = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("said-*")}
    assert said.keys() == {f"said-{rank}" for rank in range(3) if rank != doomed}
    assert all("lost the others while saving a checkpoint" in text for text in said.values())
    checkpoints = tmp_path / "checkpoints"
    assert [path.name for path in list_states(checkpoints)] == ["step-00000001"]
    assert load_latest(checkpoints)[1].step == 1
    save_shards(checkpoints, 3, cut_for(0, 1, whole_tensors(3)), {}, keep=2)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000001", "step-00000003"]


def _wait_for_state_after(folder: Path, step: int) -> None:
    ends = time.monotonic() + 60
    while time.monotonic() < ends:
        if any(int(path.name[5:]) > step for path in list_states(folder)):
            return
        time.sleep(0.002)
    raise AssertionError("no state was written")


def test_a_process_that_never_comes_is_named(tmp_path: Path) -> None:
    agreement = FileAgreement(tmp_path, 0, 2, "a", patience=timedelta(seconds=0.05))
    with pytest.raises(ParallelError, match="process 1 wrote no part"):
        save_shards(tmp_path, 1, cut_for(0, 2, whole_tensors(1)), {}, keep=1, agreement=agreement)
    assert list_states(tmp_path) == []


@pytest.fixture
def state_path(tmp_path: Path) -> Path:
    """A state in several files."""
    return save_shards(tmp_path, 5, cut_for(0, 1, whole_tensors(5)), {}, keep=1, file_bytes=150)


def test_a_large_state_is_several_files(state_path: Path) -> None:
    assert len(list(state_path.glob("tensors-*-of-*.safetensors"))) > 2
    assert all(torch.equal(load_state(state_path).tensors[name], t) for name, t in whole_tensors(5).items())


def test_any_box_is_read(state_path: Path) -> None:
    tensors = load_state(state_path).stored
    expected = whole_tensors(5)["model.fused"]
    for slices in ([[3, 9], [0, 3]], [[0, 12], [1, 2]], [[5, 5], [0, 3]], [[7, 8], [2, 3]]):
        (a, b), (c, d) = slices
        assert torch.equal(load(tensors, {"model.fused": ((12, 3), slices)})["model.fused"], expected[a:b, c:d])


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"model.row": ((7, 5), ((0, 7), (0, 5)))}, "no tensor 'model.row', did you mean 'model.rows'"),
        ({"model.rows": ((8, 5), ((0, 8), (0, 5)))}, r"model.rows is \[7, 5\] there, \[8, 5\] here"),
        ({"model.rows": ((7, 5), ((0, 8), (0, 5)))}, r"model.rows is \[7, 5\] in .*no part"),
    ],
)
def test_what_is_not_there_is_named(state_path: Path, wanted: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(load_state(state_path).stored, wanted)


def test_another_dtype_is_named_and_nothing_is_filled(state_path: Path) -> None:
    first, second = torch.zeros(9), torch.zeros(12, 3, dtype=torch.float16)
    shards = [Shard("model.norm", first, (9,), ((0, 9),)), Shard("model.fused", second, (12, 3), ((0, 12), (0, 3)))]
    with pytest.raises(CheckpointError, match=r"model.fused is torch.float32 there, torch.float16 here"):
        fill(load_state(state_path).stored, shards)
    assert not first.any()


def test_states_that_changed_names_are_found_out(tmp_path: Path) -> None:
    """Each whole in itself, but of another step than its name says."""
    one = save_shards(tmp_path, 1, cut_for(0, 1, whole_tensors(1)), {}, keep=3)
    two = save_shards(tmp_path, 2, cut_for(0, 1, whole_tensors(2)), {}, keep=3)
    one.rename(tmp_path / "x")
    two.rename(one)
    (tmp_path / "x").rename(two)
    with pytest.raises(CheckpointError, match=r"step-00000002 is corrupted: it holds the state of step 1"):
        load_latest(tmp_path)


def test_a_manifest_is_checked_to_the_byte(state_path: Path) -> None:
    manifest = state_path / "manifest.json"
    text = manifest.read_text(encoding="utf-8")
    for changed in (text[:-1], text + " ", text.replace("  ", " ", 1), json.dumps(json.loads(text))):
        manifest.write_text(changed, encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"manifest.json is not as it was written"):
            load_state(state_path)


def test_leftovers_go_unless_somebody_may_still_write_there(tmp_path: Path) -> None:
    """Of a process that is gone, of this one, of another machine's that was silent for hours; not of a neighbour."""
    gone = multiprocessing.get_context("fork").Process(target=int)
    gone.start()
    gone.join()
    leftovers = {"gone": gone.pid, "own": os.getpid(), "nearby": os.getppid(), "elsewhere": os.getppid()}
    folders = {
        name: tmp_path / f".step-00000001.tmp-{pid}-{number:08x}"
        for number, (name, pid) in enumerate(leftovers.items())
    }
    for folder in folders.values():
        folder.mkdir()
        (folder / "tensors.safetensors").write_bytes(b"half")
    for path in (folders["elsewhere"], folders["elsewhere"] / "tensors.safetensors"):
        os.utime(path, (time.time() - 7200, time.time() - 7200))
    save_shards(tmp_path, 2, cut_for(0, 1, whole_tensors(2)), {}, keep=1)
    assert {path.name for path in tmp_path.iterdir()} == {folders["nearby"].name, "step-00000002"}


def changed_later(folder: Path) -> tuple[int, int]:
    """A process gets another tensor after the first save: the plan is made again, by all. Returns: plans made."""
    agreement = checkpoint_group()
    writer = ShardedWriter(folder, keep=1, agreement=agreement)
    shards = cut_for(agreement.rank, agreement.world_size, whole_tensors(1))
    numbers = []
    for step in (1, 2, 3, 4):
        if step == 3 and agreement.rank == 1:
            shards.append(Shard("optimizer.late", torch.ones(3), (3,), ((0, 3),)))
        ticket = writer.begin(step, shards)
        numbers.append(ticket.number)
        writer.finish(ticket, tensors_source(shards), {})
    return numbers[1], numbers[3]


def test_the_plan_is_kept_until_something_changes(tmp_path: Path, ranks: Ranks) -> None:
    assert ranks(changed_later, 2, tmp_path) == [(1, 2), (1, 2)]
    assert torch.equal(load_latest(tmp_path)[1].tensors["optimizer.late"], torch.ones(3))
