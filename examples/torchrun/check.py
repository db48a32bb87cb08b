"""Whether the processes of a torch.distributed job have found each other, and agree.

Started by .compute, whose first lines say how.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

FEATURES = 8
STEPS = 20
SAMPLES_PER_PROCESS = 32


def main():
    # All it needs to know is in the environment.
    dist.init_process_group("gloo", timeout=timedelta(minutes=15))
    rank, size = dist.get_rank(), dist.get_world_size()
    assert (rank, size) == (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    print(f"rank {rank} of {size}, {os.environ['LOCAL_RANK']} on its machine", flush=True)

    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    assert total.item() == size * (size + 1) / 2, f"the sum is {total.item()}"

    check_training(rank, size)
    dist.barrier()
    dist.destroy_process_group()
    print(f"all {size} processes agree", flush=True)


def check_training(rank, size):
    """That a model trained by all, each on its own data, is the one trained on all data."""
    random = torch.Generator().manual_seed(0)
    samples = torch.randn(size, SAMPLES_PER_PROCESS, FEATURES, generator=random)
    wanted = samples @ torch.randn(FEATURES, 1, generator=random)

    torch.manual_seed(rank)
    model = DistributedDataParallel(torch.nn.Linear(FEATURES, 1))
    # DistributedDataParallel began with the parameters of rank 0.
    torch.manual_seed(0)
    alone = torch.nn.Linear(FEATURES, 1)
    loss = train(model, samples[rank], wanted[rank])
    train(alone, samples.flatten(0, 1), wanted.flatten(0, 1))

    mine = torch.cat([it.detach().flatten() for it in model.parameters()])
    everybodys = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(everybodys, mine)
    for other, theirs in enumerate(everybodys):
        assert torch.equal(mine, theirs), f"the parameters of rank {other} and {rank} differ"
    expected = torch.cat([it.detach().flatten() for it in alone.parameters()])
    assert torch.allclose(mine, expected, atol=1e-5), f"{mine} should be {expected}"
    print(f"trained to a loss of {loss:.4f}", flush=True)


def train(model, samples, wanted):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(samples), wanted)
        loss.backward()
        optimizer.step()
    return loss.item()


if __name__ == "__main__":
    main()
