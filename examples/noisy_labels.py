"""Image classification with wrong labels: SGD, stopped early or not, against SAM and AESAM.

    python -m examples.noisy_labels
    python -m examples.noisy_labels --data-dir DIR --train-size 20000

On the digits that come with scikit-learn, or on the four files of Fashion-MNIST.
"""

import argparse
from pathlib import Path
from statistics import mean

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import sharpkern as sk
from experiments.data import CLASSES, Data, hold_out, load_data, with_noise


def make_model(pixels):
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(pixels, 256), nn.BatchNorm1d(256), nn.ReLU()),
        *(nn.Linear(256, 256), nn.BatchNorm1d(256), nn.ReLU()),
        nn.Linear(256, CLASSES),
    )


def make_optimizer(name, model, rho, total_steps):
    sgd = dict(lr=0.03, momentum=0.9, weight_decay=5e-4)
    if name == "SGD":
        return torch.optim.SGD(model.parameters(), **sgd)
    # model=: batch statistics are what the first pass left, at the weights themselves.
    if name == "SAM":
        return sk.SAM(model.parameters(), torch.optim.SGD, rho=rho, model=model, **sgd)
    return sk.AESAM(model.parameters(), torch.optim.SGD, rho=rho, total_steps=total_steps, model=model, **sgd)


@torch.no_grad()
def accuracy(model, x, y):
    model.eval()
    return 100 * (model(x).argmax(1) == y).float().mean().item()


def train(name, data, test, options, seed):
    """(accuracy on the held-out labels, on the test set) after each epoch; and the gradients computed, in those of an
    epoch of SGD."""
    torch.manual_seed(seed)
    model = make_model(data.train_x[0].numel()).to(data.train_x.device)
    steps = options.epochs * -(-len(data.train_y) // options.batch_size)
    opt = make_optimizer(name, model, options.rho, steps)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=steps)
    history, gradients = [], 0

    for _ in range(options.epochs):
        model.train()
        for batch in torch.randperm(len(data.train_y)).split(options.batch_size):

            def closure(batch=batch):
                nonlocal gradients
                gradients += 1
                opt.zero_grad()
                loss = cross_entropy(model(data.train_x[batch]), data.train_y[batch])
                loss.backward()
                return loss

            opt.step(closure)  # SGD calls it once, SAM twice, AESAM once or twice
            schedule.step()
        history.append((accuracy(model, data.test_x, data.test_y), accuracy(model, *test)))
    return history, gradients * options.epochs / steps


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder of Fashion-MNIST's four files; without it the digits")
    parser.add_argument("--train-size", type=int, help="training images; all by default")
    parser.add_argument("--noise", type=float, default=40, help="wrong training labels, in percent")
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rho", type=float, default=1.5, help="SAM's radius, large for wrong labels")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", type=torch.device, default="cpu")
    options = parser.parse_args(arguments)

    dataset = "digits" if options.data_dir is None else "fashion-mnist"
    data = load_data(dataset, options.data_dir, options.train_size, options.device)
    test = data.test_x, data.test_y
    print(f"{len(data.train_y)} images, {options.noise:g} % of their labels wrong; {options.seeds} seeds")
    print("            last epoch   best held-out epoch    gradients")
    for name in ("SGD", "SAM", "AESAM"):
        last, best, epochs, gradients = [], [], [], []
        for seed in range(options.seeds):
            noisy = Data(data.train_x, with_noise(data.train_y, options.noise, seed), *test)
            # A fifth of the images is held out to choose the epoch. Its labels are as wrong as the others.
            part = hold_out(noisy, len(data.train_y) // 5, seed)
            history, passes = train(name, part, test, options, seed)
            epoch = max(range(options.epochs), key=lambda i: history[i][0])
            last.append(history[-1][1])
            best.append(history[epoch][1])
            epochs.append(epoch + 1)
            gradients.append(passes)
        print(
            f"{name:6} {mean(last):14.2f} % {mean(best):9.2f} % ({mean(epochs):4.1f}) {mean(gradients):12.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
