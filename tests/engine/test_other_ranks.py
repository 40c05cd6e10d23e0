"""A run goes on on another number of ranks: the same weights and AdamW states, to the bit, and the same steps after."""

import sys
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
import torch
from safetensors import safe_open

from prime_fast.engine import shards
from prime_fast.engine.writing import write


@pytest.mark.parametrize("before", [1, 2, 3, 5])
@pytest.mark.parametrize("now", [1, 2, 4])
def test_any_number_of_ranks_reads_what_any_number_wrote(before, now, tmp_path):
    """Of parameters that no number divides, or that have fewer elements than there are ranks."""
    for size in (1, 3, 30, 101):
        whole, parameter = torch.randn(size), SimpleNamespace(ds_numel=size)
        for rank in range(before):
            start, stop = shards._range(parameter, rank, before)
            write(tmp_path, {shards.file_name(rank): {"weight/x": whole[start:stop]}})
        files = [safe_open(tmp_path / shards.file_name(rank), "pt") for rank in range(before)]
        read = []
        for rank in range(now):
            start, stop = shards._range(parameter, rank, now)
            read.append(torch.full((stop - start,), torch.nan))
            shards._read(files, "weight/x", parameter, start, read[-1])
        assert torch.cat(read).equal(whole)


def test_a_run_goes_on_on_other_ranks(workspace, tmp_path):
    """Whole states to the bit, over gloo: 1 -> 2 -> 4 and 2 -> 1 ranks, in bfloat16 1 -> 2; a step of each agrees with
    that of another number, and a step of PRIME on two ranks with the one that one rank would have made."""
    program = Path(__file__).with_name("other_ranks.py")
    command = [sys.executable, str(program), str(workspace / "config.yaml"), str(tmp_path)]
    result = processes.run(command, env=processes.environment(OMP_NUM_THREADS="1"))
    assert result.returncode == 0 and "any number of ranks goes on" in result.stdout, result.stderr[-3000:]
