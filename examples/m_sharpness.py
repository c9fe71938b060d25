"""DistributedDataParallel with joint perturbations, and with each process's own: m-sharpness.

    torchrun --nproc-per-node=2 -m examples.m_sharpness

On CPUs, over gloo, on the digits that come with scikit-learn.
"""

import argparse

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import sharpkern as sk


def train(m_sharpness, train_set, epochs, batch_size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    parallel = DistributedDataParallel(model)
    # model= the wrapper: the first pass of "rank" runs under its no_sync().
    opt = sk.SAM(
        parallel.parameters(), torch.optim.SGD, rho=0.2, lr=0.05, momentum=0.9, model=parallel, m_sharpness=m_sharpness
    )
    sampler = DistributedSampler(train_set)  # each process has a part of every batch
    loader = DataLoader(train_set, batch_size // dist.get_world_size(), sampler=sampler)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for x, y in loader:

            def closure(x=x, y=y):
                loss = cross_entropy(parallel(x), y)
                loss.backward()
                return loss

            opt.step(closure)
    return model, opt


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64, help="of all processes together")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    images, labels = (torch.tensor(a) for a in load_digits(return_X_y=True))
    images = images.float() / 16
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train_part, test_part = order[:1200], order[1200:]
    train_set = TensorDataset(images[train_part], labels[train_part])

    for m_sharpness in ("global", "rank"):
        model, opt = train(m_sharpness, train_set, options.epochs, options.batch_size)
        with torch.no_grad():
            accuracy = (model(images[test_part]).argmax(1) == labels[test_part]).float().mean().item()

        # The norms of the first gradients differ where each process has its own; the weights have the same bits.
        mine = torch.cat([opt.stats["grad_norm"].reshape(1), *(p.detach().flatten() for p in model.parameters())])
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        if dist.get_rank() == 0:
            norms = ", ".join(f"{one[0]:.4f}" for one in everyone)
            same = all(torch.equal(one[1:], mine[1:]) for one in everyone)
            weights = "the same" if same else "not the same"
            print(f"{m_sharpness:6}: test accuracy {accuracy:.1%}, norms {norms}, {weights} weights")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
